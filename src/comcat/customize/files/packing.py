"""Format 2 of an adapter file: a layer is one tensor of bytes, which holds only components that do something.

For either product, for its left and its right side, for every weight and bias of the side: a row for every component
of every head that is kept, as :mod:`comcat.customize.files.numbers` writes it; biases, and tokens, in float16 beside
nf4 and in float32 beside int8. Beside the factors' own bytes a layer takes some 300, and ranks may differ by head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from pydantic import ConfigDict
from torch import Tensor

from ...errors import CheckpointError
from .layer_factors import PARTS, Named, Part, columns, from_columns, names_of, trimmed
from .numbers import Storage, decode_rows, encode_rows, row_bytes

#: A file is never read into more numbers than this for each of its bytes: ranks that are zero almost everywhere would
#: fill the memory. Real ones stay below ten times the number of heads.
_EXPANSION = 4096


@dataclass(frozen=True)
class Packing:
    """Where the bytes of a layer belong.

    Attributes:
        heads: how many; widths: of every stream, what queries, and keys and values, are computed from, and the output's
            (0: none).
        kept: components of every head, which are the first ones; all of the layer's rank where it is not said.
    """

    heads: int
    widths: dict[str, tuple[int, int, int]]
    kept: dict[Part, list[int]] | None = None
    __pydantic_config__ = ConfigDict(extra="forbid")

    def keeping(self, counts: Mapping[Part, Tensor]) -> Packing:
        """With as many components of every head (H,)."""
        full = bool(torch.stack(list(counts.values())).unique().numel() == 1)
        return replace(self, kept=None if full else {part: count.tolist() for part, count in counts.items()})

    def names(self, biases: list[str]) -> list[tuple[Part, str, int]]:
        """(product, name, width) of every tensor in the order of the bytes."""
        found: list[tuple[Part, str, int]] = []
        for part, kinds in PARTS.items():
            for kind in kinds:
                for stream, (query, key, output) in sorted(self.widths.items()):
                    width = query if kind == "query" else output if kind == "output" else key
                    if width:
                        found.append((part, f"{stream}.{kind}.weight", width))
                    if f"{stream}.{kind}" in biases:
                        found.append((part, f"{stream}.{kind}.bias", 1))
        return found


def plain(storage: Storage) -> Storage:
    """How the few numbers that are not products are stored."""
    return "float16" if storage == "nf4" else "float32" if storage == "int8" else storage


def _kind(name: str, storage: Storage) -> Storage:
    return plain(storage) if name.endswith(".bias") else storage


def pack_layer(tensors: Named, rank: int, storage: Storage) -> tuple[int, Packing, Tensor] | None:
    """The rank that is left, where everything lies, and the bytes; None for a layer that does nothing."""
    tensors, kept = trimmed(tensors, rank)
    left = int(torch.stack(list(kept.values())).max())
    if not left:
        return None
    packing = packing_of(tensors, left).keeping(kept)
    parts = []
    for part, name, _ in packing.names(_biases(tensors)):
        here = torch.arange(left) < kept[part][:, None]  # (H, r)
        rows = columns(name, tensors[name], left).mT[here]  # (n, D)
        parts.append(encode_rows(rows, _kind(name, storage)).flatten())
    return left, packing, torch.cat(parts)


def packing_of(tensors: Mapping[str, Tensor], rank: int) -> Packing:
    """Of a layer that is kept whole."""
    streams = sorted({name.partition(".")[0] for name in tensors})
    heads = tensors[f"{streams[0]}.query.weight"].shape[0] // rank
    return Packing(heads, {stream: _widths(tensors, stream) for stream in streams})


def _widths(tensors: Mapping[str, Tensor], stream: str) -> tuple[int, int, int]:
    output = tensors.get(f"{stream}.output.weight")
    query, key = (tensors[f"{stream}.{kind}.weight"].shape[1] for kind in ("query", "key"))
    return query, key, 0 if output is None else output.shape[0]


def _biases(tensors: Named) -> list[str]:
    return [name.removesuffix(".bias") for kind in ("query", "key", "value") for name in names_of(tensors, kind)]


def layer_bytes(packing: Packing, biases: list[str], storage: Storage) -> dict[Part, int]:
    """Bytes of one component of one head of either product."""
    found = dict.fromkeys(PARTS, 0)
    for part, name, width in packing.names(biases):
        found[part] += row_bytes(width, _kind(name, storage))
    return found


def unpack_layer(content: Tensor, rank: int, packing: Packing, biases: list[str], storage: Storage) -> Named:
    """The tensors of a layer, zero where a head has fewer components than the layer.

    Raises:
        CheckpointError: the bytes are not as many as the packing says, or it says what cannot be.
    """
    names = packing.names(biases)
    _check_ranks(content, rank, packing, names)
    kept = packing.kept or {part: [rank] * packing.heads for part in PARTS}
    sizes = layer_bytes(packing, biases, storage)
    wanted = sum(sum(kept[part]) * sizes[part] for part in PARTS)
    if content.dim() != 1 or content.dtype != torch.uint8 or content.numel() != wanted:
        raise CheckpointError(f"it has {content.numel():,} bytes, not {wanted:,}")
    tensors: Named = {}
    start = 0
    for part, name, width in names:
        here = torch.arange(rank) < torch.tensor(kept[part])[:, None]  # (H, r)
        kind = _kind(name, storage)
        count, size = sum(kept[part]), row_bytes(width, kind)
        rows = decode_rows(content[start : start + count * size].view(count, size), width, kind)
        start += count * size
        matrix = rows.new_zeros(packing.heads, rank, width)
        matrix[here] = rows
        tensors[name] = from_columns(name, matrix.mT)
    return tensors


def _check_ranks(content: Tensor, rank: int, packing: Packing, names: list[tuple[Part, str, int]]) -> None:
    if packing.heads < 1 or rank < 1 or not packing.widths or any(w < 0 for _, _, w in names):
        raise CheckpointError("heads, ranks and widths must be at least 1")
    if any(query < 1 or key < 1 for query, key, _ in packing.widths.values()):
        raise CheckpointError("heads, ranks and widths must be at least 1")
    if sum(width for _, _, width in names) * packing.heads * rank > _EXPANSION * content.numel():
        raise CheckpointError("nearly all of its components are left out")
    for counts in () if packing.kept is None else (packing.kept.get(part, []) for part in PARTS):
        if len(counts) != packing.heads or not all(0 <= count <= rank for count in counts):
            raise CheckpointError(f"its {packing.heads} heads cannot have {counts} of {rank} components")
