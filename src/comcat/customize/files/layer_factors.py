"""The factors of one layer, by their names in a file, as per-head matrices of its two products.

    qk   left: queries of all streams, one below the other, (H, D_l, r)     right: keys, (H, D_r, r)
    vo   left: values                                                       right: outputs

Column i of left and right is component i of a head; a bias is a row of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

Part = Literal["qk", "vo"]
PARTS: dict[Part, tuple[str, str]] = {"qk": ("query", "key"), "vo": ("value", "output")}
Named = dict[str, Tensor]


def by_layer(tensors: Mapping[str, Tensor], component: str, layer: str) -> Named:
    """The tensors of one layer: ``sample.query.weight`` and so on."""
    prefix = f"{component}.{layer}."
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return {name: t for name, t in own.items() if name.count(".") == 2}


def names_of(tensors: Mapping[str, Tensor], kind: str) -> Iterator[str]:
    """Of weights and biases of one kind, stream by stream in alphabetical order."""
    for name in sorted(tensors):
        stream, this, leaf = name.split(".")
        if this == kind and leaf == "weight":
            yield name
            if f"{stream}.{kind}.bias" in tensors:
                yield f"{stream}.{kind}.bias"


def columns(name: str, tensor: Tensor, rank: int) -> Tensor:
    """A tensor of a file as (H, D, r); a bias has D = 1."""
    if name.endswith(".bias"):
        return tensor.unflatten(0, (-1, rank)).unsqueeze(1)
    return (tensor.mT if name.endswith("output.weight") else tensor).unflatten(0, (-1, rank)).mT


def from_columns(name: str, matrix: Tensor) -> Tensor:
    """The inverse of :func:`columns`, with as many columns as ``matrix`` (H, D, r) has."""
    rows = matrix.mT.flatten(0, 1)
    if name.endswith(".bias"):
        return rows.squeeze(1).contiguous()
    return (rows.mT if name.endswith("output.weight") else rows).contiguous()


def side(tensors: Mapping[str, Tensor], kind: str, rank: int) -> Tensor:
    """One side of a product, (H, D, r)."""
    return torch.cat([columns(name, tensors[name], rank) for name in names_of(tensors, kind)], 1)


def set_side(tensors: Named, kind: str, matrix: Tensor, rank: int) -> None:
    """Put a side back, in the precision of what was there; ``rank``: of what was there."""
    start = 0
    for name in list(names_of(tensors, kind)):
        old = columns(name, tensors[name], rank)
        tensors[name] = from_columns(name, matrix[:, start : start + old.shape[1]].to(old))
        start += old.shape[1]


def sides(tensors: Mapping[str, Tensor], part: Part, rank: int) -> tuple[Tensor, Tensor]:
    """Left and right of a product."""
    left, right = PARTS[part]
    return side(tensors, left, rank), side(tensors, right, rank)


def alive(tensors: Mapping[str, Tensor], part: Part, rank: int) -> Tensor:
    """(H, r): which components are not zero on both sides. Those that are do nothing and cannot learn either."""
    left, right = sides(tensors, part, rank)
    return left.ne(0).any(1) | right.ne(0).any(1)


def trimmed(tensors: Named, rank: int) -> tuple[Named, dict[Part, Tensor]]:
    """A layer without components that do nothing: every head's others first, and the rank of the largest head.

    Returns:
        The tensors, and how many components (H,) each head has. A layer that is all zero has a rank of 0.
    """
    found = {part: alive(tensors, part, rank) for part in PARTS}
    kept = {part: mask.sum(1) for part, mask in found.items()}
    largest = int(torch.stack(list(kept.values())).max())
    new = dict(tensors)
    for part, mask in found.items():
        order = mask.int().argsort(dim=1, descending=True, stable=True)[:, :largest]
        for kind, matrix in zip(PARTS[part], sides(tensors, part, rank), strict=True):
            set_side(new, kind, matrix.gather(2, order[:, None].expand(-1, matrix.shape[1], -1)), rank)
    return new, kept
