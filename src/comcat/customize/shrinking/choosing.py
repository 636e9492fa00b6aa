"""Which components an adapter keeps under a budget of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..files.contents import pack
from ..files.header import Header
from ..files.layer_factors import PARTS, by_layer
from ..files.packing import layer_bytes, packing_of, plain
from .worth import Key, Worth

#: (component, layer, product) -> (H, r), which are kept.
Choice = dict[Key, Tensor]


class Sizes:
    """What an adapter's file takes, without writing it.

    Args:
        header: of the adapter, with its storage; tensors: its own, by their names in the file.

    Attributes:
        costs: bytes of one component of one head; shapes: heads and rank.
    """

    def __init__(self, header: Header, tensors: Mapping[str, Tensor]) -> None:
        self.header, self.storage = header, header.storage
        dtype = getattr(torch, plain(self.storage))
        self._tokens = {n: torch.zeros(t.shape, dtype=dtype) for n, t in tensors.items() if n.startswith("token.")}
        self._packings = {}
        self.costs: dict[Key, int] = {}
        self.shapes: dict[Key, tuple[int, int]] = {}
        for component, part in header.components.items():
            for layer, entry in part.layers.items():
                packing = packing_of(by_layer(tensors, component, layer), entry.rank)
                self._packings[component, layer] = packing
                for product, size in layer_bytes(packing, entry.biases, self.storage).items():
                    self.costs[component, layer, product] = size
                    self.shapes[component, layer, product] = (packing.heads, entry.rank)

    def of(self, choice: Choice) -> int:
        """Bytes of the file in format 2."""
        stored, components = dict(self._tokens), {}
        for component, part in self.header.components.items():
            layers = {}
            for layer, entry in part.layers.items():
                counts = {product: choice[component, layer, product].sum(1) for product in PARTS}
                rank = int(torch.stack(list(counts.values())).max())
                if rank:
                    content = sum(int(n.sum()) * self.costs[component, layer, product] for product, n in counts.items())
                    stored[f"{component}.{layer}"] = torch.zeros(content, dtype=torch.uint8)
                    packing = self._packings[component, layer].keeping(counts)
                    layers[layer] = replace(entry, rank=rank, packing=packing)
            if layers:
                components[component] = replace(part, layers=layers)
        return len(pack(replace(self.header, format=2, components=components), stored))

    def overhead(self, component: str, layer: str) -> int:
        """About what a layer takes beside its components: its name twice, ranks, widths, counts."""
        heads, _ = self.shapes[component, layer, "qk"]
        return 240 + 2 * len(f"{component}.{layer}") + 6 * heads

    def nothing(self) -> Choice:
        return {key: torch.zeros(shape, dtype=torch.bool) for key, shape in self.shapes.items()}

    def smallest(self) -> Choice:
        """One component of one head, the cheapest: no adapter is smaller."""
        choice = self.nothing()
        key = min(self.costs, key=lambda key: self.costs[key] + self.overhead(*key[:2]))
        choice[key][0, 0] = True
        return choice

    def check(self, max_bytes: int, more: int = 0) -> None:
        """Raise CheckpointError unless something fits, with ``more`` bytes; those of the smallest file follow."""
        needed = self.of(self.smallest()) + more
        if needed > max_bytes:
            raise CheckpointError(
                f"{max_bytes:,} bytes are too few for this adapter: the smallest file, one component of one head as "
                f"{self.storage}, takes {needed:,}"
            )


def choose(worths: Mapping[Key, Worth], sizes: Sizes, max_bytes: int) -> Choice:
    """The components that are worth most for their bytes, as many as fit.

    A layer costs something even for its first component: its name, ranks and widths.

    Raises:
        CheckpointError: not even one component fits; the bytes of the smallest file follow.
    """
    sizes.check(max_bytes)
    everything = {key: ~mask for key, mask in sizes.nothing().items()}
    if sizes.of(everything) <= max_bytes:
        return everything
    items = [
        (float(worth) / sizes.costs[key], key, head, i)
        for key, found in worths.items()
        for head, row in enumerate(found.worth.tolist())
        for i, worth in enumerate(row)
        if worth > 0
    ]
    items.sort(key=lambda item: -item[0])
    # What layers take beside their components is known only about: look again with the room that was left or missing.
    best, largest, room = sizes.smallest(), 0, max_bytes
    while True:
        choice = _filled(items, sizes, room)
        size = sizes.of(choice)
        if size <= max_bytes:
            if size <= largest or not any(bool(mask.any()) for mask in choice.values()):
                return best
            best, largest = choice, size
        elif largest:
            return best
        room += max_bytes - size or 1


def _filled(items: list[tuple[float, Key, int, int]], sizes: Sizes, room: int) -> Choice:
    choice = sizes.nothing()
    opened: set[tuple[str, str]] = set()
    for _, key, head, i in items:
        layer = key[:2]
        cost = sizes.costs[key] + (0 if layer in opened else sizes.overhead(*layer))
        if cost <= room:
            room -= cost
            opened.add(layer)
            choice[key][head, i] = True
    return choice
