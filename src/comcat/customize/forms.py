"""The two bilinear forms of an attention layer as pairs of per-head matrices, and what an adapter adds to them.

    QK   L = [W_q; b_q] (H, D_q + 1, d)      R = W_k (H, D_k, d)
    VO   L = [W_v; b_v] (H, D_k + 1, d)      R = W_o,h^T (H, D_out, d)

Where several streams of tokens meet in one softmax (SD3, FLUX) their matrices are stacked: every stream's queries meet
every stream's keys, and every block of the product is one of these meetings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..added import AddedLayer
from ..hosts.seam import Site, Stream
from .lora_math import HeadUpdate, LoraWeights, lora_of_columns, lora_of_rows, update_of_columns, update_of_rows

Part = Literal["qk", "vo"]
PARTS: tuple[Part, ...] = ("qk", "vo")


@dataclass(frozen=True)
class Block:
    """The rows of one projection in a stacked matrix.

    Attributes:
        path: of the ``nn.Linear`` in its component; rows: without the bias row, which follows where there is one.
        by_rows: its inputs, not its outputs, are split into heads (the output projection).
        columns: how many input features it has; those beyond the heads' width are left alone (FLUX's single blocks).
    """

    path: str
    start: int
    rows: int
    bias: bool
    by_rows: bool = False
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
    lefts, rights = [], []
    for stream in site.streams:
        if part == "qk":
            lefts.append((f"{site.name}.{stream.query}", *_columns(site, site.linear(stream.query), True)))
            rights.append((f"{site.name}.{stream.key}", *_columns(site, site.linear(stream.key), key_bias)))
        else:
            lefts.append((f"{site.name}.{stream.value}", *_columns(site, site.linear(stream.value), True)))
            if stream.output is not None or stream.inner:
                path, linear = output_projection(site, model, stream)
                rights.append((path, _rows(site, linear), False))
    left, left_blocks = _stack(lefts, by_rows=False)
    right, right_blocks = _stack(rights, by_rows=part == "vo")
    if part == "vo":
        width = {path: base(model_linear(site, model, path)).in_features for path, _, _ in rights}
        right_blocks = tuple(Block(b.path, b.start, b.rows, False, True, width[b.path]) for b in right_blocks)
    return Form(left, right, left_blocks, right_blocks)


def output_projection(site: Site, model: nn.Module, stream: Stream) -> tuple[str, Any]:
    """(path, module) of what the heads' outputs go through; in FLUX's single blocks that of the block."""
    if stream.output is not None:
        return f"{site.name}.{stream.output}", site.linear(stream.output)
    path = f"{site.name.rpartition('.')[0]}.proj_out"
    return path, model.get_submodule(path)


def has_key_biases(site: Site) -> bool:
    """Whether keys of different streams have different biases."""
    return len(site.streams) > 1 and any(base(site.linear(s.key)).bias is not None for s in site.streams)


def added_key_bias(site: Site, model: nn.Module, layer: AddedLayer) -> Tensor:
    """The right factor of :func:`added_to` for QK with rows for the biases of the keys, as ``key_bias`` has them."""
    rows = []
    for stream in site.streams:
        rows.append(_added_columns(site, layer[stream.name].key))
        if base(site.linear(stream.key)).bias is not None:
            rows.append(_added_bias(site, layer[stream.name].key, layer.rank))
    return torch.cat(rows, 1)


def model_linear(site: Site, model: nn.Module, path: str) -> Any:
    inside = path.removeprefix(f"{site.name}.")
    return site.linear(inside) if inside != path else model.get_submodule(path)


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


def _stack(parts: list[tuple[str, Tensor, bool]], by_rows: bool) -> tuple[Tensor, tuple[Block, ...]]:
    blocks, start = [], 0
    for path, matrix, bias in parts:
        blocks.append(Block(path, start, matrix.shape[1] - bias, bias, by_rows))
        start += matrix.shape[1]
    return torch.cat([matrix for _, matrix, _ in parts], 1), tuple(blocks)


def added_to(site: Site, model: nn.Module, layer: AddedLayer, part: Part) -> tuple[Tensor, Tensor]:
    """What an adapter adds to a form: left (H, D_l, r), times its strength, and right (H, D_r, r)."""
    lefts, rights = [], []
    for stream in site.streams:
        product = layer[stream.name]
        first, second = (product.query, product.key) if part == "qk" else (product.value, product.output)
        name = stream.query if part == "qk" else stream.value
        left = _added_columns(site, first)
        if base(site.linear(name)).bias is not None:
            left = torch.cat([left, _added_bias(site, first, layer.rank)], 1)
        lefts.append(left)
        if part == "qk":
            rights.append(_added_columns(site, product.key))
        elif second is not None:
            weight = second.weight.detach().double()  # (D_out, H r)
            if stream.inner:
                projection = base(output_projection(site, model, stream)[1]).weight.detach().double()
                weight = projection[:, : weight.shape[0]] @ weight
            rights.append(weight.unflatten(1, (site.num_heads, -1)).transpose(0, 1))
    return torch.cat(lefts, 1) * layer.strength.scale, torch.cat(rights, 1)


def _added_columns(site: Site, linear: nn.Linear) -> Tensor:
    return linear.weight.detach().double().unflatten(0, (site.num_heads, -1)).mT


def _added_bias(site: Site, linear: nn.Linear, rank: int) -> Tensor:
    if linear.bias is None:
        return torch.zeros(site.num_heads, 1, rank, dtype=torch.float64, device=linear.weight.device)
    return linear.bias.detach().double().view(site.num_heads, 1, rank)


def lora_of(block: Block, basis: Tensor, mix: Tensor) -> LoraWeights:
    """The LoRA of one projection from its rows of the per-head updates: basis (H, D, r), mix (H, r, d)."""
    own = basis[:, block.start : block.start + block.rows]
    if not block.by_rows:
        return lora_of_columns(own, mix)
    lora = lora_of_rows(own, mix)
    missing = block.columns - lora.down.shape[1]
    return LoraWeights(nn.functional.pad(lora.down, (0, missing)), lora.up)


def update_of(blocks: tuple[Block, ...], found: dict[str, LoraWeights], matrix: Tensor) -> HeadUpdate | None:
    """The per-head view of LoRAs on a stacked matrix (H, rows, d); None where none of its projections has one."""
    heads, rows, head_dim = matrix.shape
    parts: list[tuple[Tensor, Tensor]] = []
    for block in blocks:
        if block.path not in found:
            continue
        down, up = (t.double() for t in found[block.path])
        if block.by_rows:
            update = update_of_rows(LoraWeights(down[:, : heads * head_dim], up), heads)
        else:
            update = update_of_columns(LoraWeights(down, up), heads)
        basis = update.basis.expand(heads, -1, -1)
        above, below = block.start, rows - block.start - block.rows
        parts.append((nn.functional.pad(basis, (0, 0, above, below)), update.mix))
    if not parts:
        return None
    return HeadUpdate(torch.cat([b for b, _ in parts], -1), torch.cat([m for _, m in parts], 1))
