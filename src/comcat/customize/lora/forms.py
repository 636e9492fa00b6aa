"""The two bilinear forms of an attention layer as pairs of per-head matrices, and what an adapter adds to them.

    QK   L = [W_q; b_q] (H, D_q + 1, d)      R = W_k (H, D_k, d)
    VO   L = [W_v; b_v] (H, D_k + 1, d)      R = W_o,h^T (H, D_out, d)

Where several streams of tokens meet in one softmax (SD3, FLUX) their matrices are stacked: every stream's queries meet
every stream's keys, and every block of the product is one of these meetings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...hosts.seam import Site, Stream
from ...nn.added import AddedLayer
from .algebra import HeadUpdate, LoraWeights, lora_of_columns, lora_of_rows, update_of_columns, update_of_rows

Part = Literal["qk", "vo"]
PARTS: tuple[Part, ...] = ("qk", "vo")


@dataclass(frozen=True)
class Block:
    """The rows of one projection in a stacked matrix.

    Attributes:
        path: of the ``nn.Linear`` in its component; rows: without the bias row, which follows where there is one.
        columns: of an output projection, whose inputs, not outputs, are split into heads: how many input features it
            has; those beyond the heads' width are left alone (FLUX's single blocks). 0: any other.
    """

    path: str
    start: int
    rows: int
    bias: bool
    columns: int = 0


@dataclass(frozen=True)
class Form:
    """One bilinear form of one layer, in float64: left (H, D_l, d), right (H, D_r, d)."""

    left: Tensor
    right: Tensor
    left_blocks: tuple[Block, ...]
    right_blocks: tuple[Block, ...]


def form_of(site: Site, model: nn.Module, part: Part, key_bias: bool = False) -> Form:
    """The base weights of a layer.

    Args:
        key_bias: with the biases of the keys. Softmax ignores one that all keys share, but not two of two streams.
    """
    lefts, rights = _Stack(), _Stack()
    for stream in site.streams:
        first = stream.query if part == "qk" else stream.value
        lefts.add(f"{site.name}.{first}", *_columns(site, site.linear(first), True))
        if part == "qk":
            rights.add(f"{site.name}.{stream.key}", *_columns(site, site.linear(stream.key), key_bias))
        elif has_output(stream):
            path, linear = output_projection(site, model, stream)
            rights.add(path, _rows(site, linear), columns=base(linear).in_features)
    return Form(torch.cat(lefts.matrices, 1), torch.cat(rights.matrices, 1), tuple(lefts.blocks), tuple(rights.blocks))


class _Stack:
    """Matrices of several projections, one below the other."""

    def __init__(self) -> None:
        self.matrices: list[Tensor] = []
        self.blocks: list[Block] = []

    def add(self, path: str, matrix: Tensor, bias: bool = False, columns: int = 0) -> None:
        start = sum(m.shape[1] for m in self.matrices)
        self.blocks.append(Block(path, start, matrix.shape[1] - bias, bias, columns))
        self.matrices.append(matrix)


def has_output(stream: Stream) -> bool:
    """Whether what the heads of a stream put out is used."""
    return stream.output is not None or stream.inner


def output_projection(site: Site, model: nn.Module, stream: Stream) -> tuple[str, Any]:
    """(path, module) of what the heads' outputs go through; in FLUX's single blocks that of the block."""
    if stream.output is not None:
        return f"{site.name}.{stream.output}", site.linear(stream.output)
    path = f"{site.name.rpartition('.')[0]}.proj_out"
    return path, model.get_submodule(path)


def has_key_biases(site: Site) -> bool:
    """Whether keys of different streams have different biases."""
    return len(site.streams) > 1 and any(base(site.linear(s.key)).bias is not None for s in site.streams)


def base(linear: Any) -> nn.Linear:
    """The frozen layer, also where PEFT has wrapped it."""
    found = getattr(linear, "base_layer", linear)
    assert isinstance(found, nn.Linear)
    return found


def _columns(site: Site, linear: Any, with_bias: bool) -> tuple[Tensor, bool]:
    """(H, D (+ 1), d), and whether the last row is a bias."""
    plain = base(linear)
    weight = plain.weight.detach().double().unflatten(0, (site.num_heads, -1)).mT
    if not with_bias or plain.bias is None:
        return weight, False
    bias = plain.bias.detach().double().view(site.num_heads, 1, -1)
    return torch.cat([weight, bias], 1), True


def _rows(site: Site, linear: Any) -> Tensor:
    """(H, D_out, d) of an output projection; columns beyond the heads are not theirs."""
    weight = base(linear).weight.detach().double()[:, : site.num_heads * site.head_dim]
    return weight.unflatten(1, (site.num_heads, -1)).transpose(0, 1)


def added_to(
    site: Site, model: nn.Module, layer: AddedLayer, part: Part, key_bias: bool = False
) -> tuple[Tensor, Tensor]:
    """What an adapter adds to :func:`form_of`: left (H, D_l, r), times its strength, and right (H, D_r, r)."""
    lefts, rights = [], []
    for stream in site.streams:
        product = layer[stream.name]
        if part == "qk":
            lefts.append(_added_columns(site, stream.query, product.query, True))
            rights.append(_added_columns(site, stream.key, product.key, key_bias))
            continue
        lefts.append(_added_columns(site, stream.value, product.value, True))
        if product.output is not None:
            weight = product.output.weight.detach().double()  # (D_out, H r)
            if stream.inner:
                projection = base(output_projection(site, model, stream)[1]).weight.detach().double()
                weight = projection[:, : weight.shape[0]] @ weight
            rights.append(weight.unflatten(1, (site.num_heads, -1)).transpose(0, 1))
    return torch.cat(lefts, 1) * layer.strength.scale, torch.cat(rights, 1)


def _added_columns(site: Site, name: str, linear: nn.Linear, with_bias: bool) -> Tensor:
    """(H, D (+ 1), r), with a row for the bias where the base's projection ``name`` has one."""
    weight = linear.weight.detach().double().unflatten(0, (site.num_heads, -1)).mT
    if not with_bias or base(site.linear(name)).bias is None:
        return weight
    bias = weight.new_zeros(weight.shape[0] * weight.shape[2]) if linear.bias is None else linear.bias.detach().double()
    return torch.cat([weight, bias.view(site.num_heads, 1, -1)], 1)


def lora_of(block: Block, basis: Tensor, mix: Tensor) -> LoraWeights:
    """The LoRA of one projection from its rows of the per-head updates: basis (H, D, r), mix (H, r, d)."""
    own = basis[:, block.start : block.start + block.rows]
    if not block.columns:
        return lora_of_columns(own, mix)
    lora = lora_of_rows(own, mix)
    missing = block.columns - lora.down.shape[1]
    return LoraWeights(nn.functional.pad(lora.down, (0, missing)), lora.up)


def update_of(blocks: tuple[Block, ...], found: Mapping[str, LoraWeights], matrix: Tensor) -> HeadUpdate | None:
    """The per-head view of LoRAs on a stacked matrix (H, rows, d); None where none of its projections has one."""
    heads, rows, head_dim = matrix.shape
    parts: list[tuple[Tensor, Tensor]] = []
    for block in blocks:
        if block.path not in found:
            continue
        down, up = (t.double() for t in found[block.path])
        if block.columns:
            update = update_of_rows(LoraWeights(down[:, : heads * head_dim], up), heads)
        else:
            update = update_of_columns(LoraWeights(down, up), heads)
        basis = update.basis.expand(heads, -1, -1)
        above, below = block.start, rows - block.start - block.rows
        parts.append((nn.functional.pad(basis, (0, 0, above, below)), update.mix))
    if not parts:
        return None
    return HeadUpdate(torch.cat([b for b, _ in parts], -1), torch.cat([m for _, m in parts], 1))
