"""The two bilinear forms of an attention layer as pairs of per-head matrices, and what an adapter adds to them.

    QK   L = [W_q; b_q] (H, D_q + 1, d)      R = W_k (H, D_k, d)
    VO   L = [W_v; b_v] (H, D_k + 1, d)      R = W_o,h^T (H, D_out, d)

Where several streams of tokens meet in one softmax (SD3, FLUX) their matrices are stacked: every stream's queries meet
every stream's keys, and every block of the product is one of these meetings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...hosts.addable import AddableAttention
from ...layers.heads import Heads, HeadWeights, Stream, unwrapped
from ...models.running import double
from ...nn.added import AddedLayer, AddedProduct
from .algebra import HeadUpdate, LoraWeights, lora_of_columns, lora_of_rows, update_of_columns, update_of_rows

ProductName = Literal["qk", "vo"]
PRODUCTS: tuple[ProductName, ...] = ("qk", "vo")


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


def form_of(attention: AddableAttention, model: nn.Module, part: ProductName, key_bias: bool = False) -> Form:
    """The base weights of a layer.

    Args:
        key_bias: with the biases of the keys. Softmax ignores one that all keys share, but not two of two streams.
    """
    lefts, rights = _Stack(), _Stack()
    for stream in attention.streams:
        weights = attention.weights(stream, model)
        output = attention.output(stream, model)
        if part == "qk":
            lefts.add(f"{attention.name}.{stream.query}", weights.query, weights.query_bias)
            rights.add(f"{attention.name}.{stream.key}", weights.key, weights.key_bias if key_bias else None)
            continue
        lefts.add(f"{attention.name}.{stream.value}", weights.value, weights.value_bias)
        if output is not None:
            path, linear = output
            rights.add(path, weights.output, columns=unwrapped(linear).in_features)
    return Form(lefts.matrix, rights.matrix, tuple(lefts.blocks), tuple(rights.blocks))


class _Stack:
    """Matrices of several projections, one below the other."""

    def __init__(self) -> None:
        self._matrices: list[Tensor] = []
        self.blocks: list[Block] = []

    def add(self, path: str, weight: Tensor, bias: Tensor | None = None, columns: int = 0) -> None:
        """``weight`` (H, d, D), ``bias`` (H, d)."""
        start = sum(m.shape[1] for m in self._matrices)
        self.blocks.append(Block(path, start, weight.shape[2], bias is not None, columns))
        self._matrices.append(_with_bias(weight, bias))

    @property
    def matrix(self) -> Tensor:
        return torch.cat(self._matrices, 1)


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """(H, d, D) and (H, d) to (H, D (+ 1), d) in float64."""
    matrix = double(weight).mT
    return matrix if bias is None else torch.cat([matrix, double(bias).unsqueeze(1)], 1)


def has_key_biases(attention: AddableAttention) -> bool:
    """Whether keys of different streams have different biases."""
    linears = [unwrapped(attention.linear(stream.key)) for stream in attention.streams]
    return len(linears) > 1 and any(linear.bias is not None for linear in linears)


def added_to(
    attention: AddableAttention, model: nn.Module, layer: AddedLayer, part: ProductName, key_bias: bool = False
) -> tuple[Tensor, Tensor]:
    """What an adapter adds to :func:`form_of`: left (H, D_l, r), times its strength, and right (H, D_r, r)."""
    lefts, rights = [], []
    for stream in attention.streams:
        base, added = attention.weights(stream, model), _added_weights(layer[stream.name])
        if part == "qk":
            lefts.append(_with_bias(added.query, _bias_row(base.query_bias, added.query, added.query_bias)))
            own = _bias_row(base.key_bias, added.key, added.key_bias) if key_bias else None
            rights.append(_with_bias(added.key, own))
            continue
        lefts.append(_with_bias(added.value, _bias_row(base.value_bias, added.value, added.value_bias)))
        output = double(added.output)  # (H, r, D_out)
        if stream.inner:  # what is added to the heads goes through their projection
            output = output @ double(base.output).flatten(0, 1)
        rights.append(output.mT)
    return torch.cat(lefts, 1) * layer.strength.scale, torch.cat(rights, 1)


def _added_weights(product: AddedProduct) -> HeadWeights:
    """What is added, per head, as if it were an attention layer of its own."""
    heads = Heads.of(product.num_heads, product.query.out_features // product.num_heads)
    output = None if product.output is None else "output"
    return HeadWeights.of(product, heads, Stream.separate("added", "query", "key", "value", output))


def _bias_row(base: Tensor | None, added: Tensor, bias: Tensor | None) -> Tensor | None:
    """The constants (H, r) beside what is added (H, r, D) where the base has a bias: zeros where there are none."""
    if base is None:
        return None
    return added.new_zeros(added.shape[:2]) if bias is None else bias


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
        down, up = (double(t) for t in found[block.path])
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
