"""The per-head normal form of an attention layer, and where a host keeps it.

    scores_h = scale * (x W_q,h + b_q,h)(x W_k,g + b_k,g)^T
    out      = sum_h softmax(scores_h)(x W_v,g + b_v,g) W_o,h + b_o        g: the group of keys and values of head h

Weights are kept transposed as ``nn.Linear`` has them, one slice per head, so that reducing a head is one batched
product and no D x D matrix is ever formed. Source: COMCAT (arXiv 2305.17235), Eq. 1-3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..models.running import double, wide

#: A gate has one row for every row of the values, whose channel it multiplies.
Role = Literal["query", "key", "value", "gate"]
ROLES: tuple[Role, ...] = ("query", "key", "value")
#: Which components (heads, r) of a full head a role keeps, where they have to stay at their places.
Places = Mapping[Role, Tensor]


@dataclass(frozen=True)
class Input:
    """A linear layer that holds the rows of one or several of query, key and value.

    Attributes:
        path: of the layer inside the attention module.
        roles: whose rows it holds, one after the other.
        by_head: the rows of one head lie together: head 0's query, key, value, then head 1's.
    """

    path: str
    roles: tuple[Role, ...]
    by_head: bool = False


@dataclass(frozen=True)
class Stream:
    """The projections of one stream of tokens, as paths inside the attention module.

    Attributes:
        output: None where the stream's result is not used, or the layer has no output projection.
        inner: the layer leaves its output projection to its block; what is added to the output then has the heads'
            width and goes through the same projection.
        by_component: the output projection takes the first component of every head, then the second of every head.
    """

    name: str
    inputs: tuple[Input, ...]
    output: str | None
    inner: bool = False
    by_component: bool = False

    @classmethod
    def separate(cls, name: str, query: str, key: str, value: str, output: str | None, inner: bool = False) -> Stream:
        """From one linear layer for each of query, key and value."""
        return cls(name, (Input(query, ("query",)), Input(key, ("key",)), Input(value, ("value",))), output, inner)

    @classmethod
    def fused(cls, qkv: str, output: str, by_head: bool = False) -> Stream:
        """From one linear layer for all three."""
        return cls("tokens", (Input(qkv, ROLES, by_head),), output)

    def path(self, role: Role) -> str:
        """The linear layer that holds a role, or where none does (scores of another kind) the last one."""
        return next((one.path for one in self.inputs if role in one.roles), self.inputs[-1].path)

    @property
    def paths(self) -> list[str]:
        """Of all its linear layers."""
        return [*(one.path for one in self.inputs), *([] if self.output is None else [self.output])]

    @property
    def query(self) -> str:
        return self.path("query")

    @property
    def key(self) -> str:
        return self.path("key")

    @property
    def value(self) -> str:
        return self.path("value")


@dataclass(frozen=True)
class Heads:
    """How many heads an attention layer has, and how wide they are.

    Attributes:
        num: of queries, H; groups: of keys and values, G, each of which serves H / G neighbouring heads.
        width: of a query or key, d; value_width: of a value, d_v.
    """

    num: int
    width: int
    groups: int
    value_width: int

    @classmethod
    def of(cls, num: int, width: int, groups: int | None = None, value_width: int | None = None) -> Heads:
        """With as many groups as heads, and values as wide as queries, where nothing else is said."""
        return cls(num, width, groups or num, value_width or width)

    def count(self, role: Role) -> int:
        """Heads of queries, or of keys and values."""
        return self.num if role == "query" else self.groups

    def wide(self, role: Role) -> int:
        """Width of one head."""
        return self.value_width if role in ("value", "gate") else self.width

    def split(self, rows: Tensor, one: Input) -> dict[Role, Tensor]:
        """Rows (..., n) in the last axis, as a linear layer puts them out, by role: (..., heads, width)."""
        sizes = [self.count(role) * self.wide(role) for role in one.roles]
        if one.by_head:
            count = self.count(one.roles[0])
            rows = rows.unflatten(-1, (count, -1))
            parts = rows.split([self.wide(role) for role in one.roles], -1)
            return dict(zip(one.roles, parts, strict=True))
        parts = rows.split(sizes, -1)
        return {r: p.unflatten(-1, (self.count(r), -1)) for r, p in zip(one.roles, parts, strict=True)}


@dataclass(frozen=True)
class HeadWeights:
    """The weights of one attention layer: H heads of width d, G groups, input D, output D_out."""

    query: Tensor  # (H, d, D)
    key: Tensor  # (G, d, D)
    value: Tensor  # (G, d_v, D)
    query_bias: Tensor | None  # (H, d)
    key_bias: Tensor | None  # (G, d)
    value_bias: Tensor | None  # (G, d_v)
    output: Tensor  # (H, d_v, D_out), D_out = 0 where nothing is put out
    output_bias: Tensor | None  # (D_out,)
    gate: Tensor | None = None  # (G, d_v, D) where it lies beside the values
    gate_bias: Tensor | None = None  # (G, d_v)

    @classmethod
    def of(cls, module: nn.Module, heads: Heads, stream: Stream, output: nn.Module | None = None) -> HeadWeights:
        """Views on the weights of a module's linear layers, of the frozen ones where PEFT has wrapped them.

        Args:
            output: the output projection where the stream names none; the first H d_v of its inputs are the heads'.
        """
        weights: dict[str, Tensor] = {}
        biases: dict[str, Tensor] = {}
        for one in stream.inputs:
            linear = unwrapped(module.get_submodule(one.path))
            rows = heads.split(linear.weight.detach().flatten(1).mT, one)  # (D, heads, width)
            weights |= {role: part.movedim(0, -1) for role, part in rows.items()}
            if linear.bias is not None:
                biases |= heads.split(linear.bias.detach(), one)  # type: ignore[arg-type]
        if output is None and stream.output is not None:
            output = module.get_submodule(stream.output)
        out = None if output is None else unwrapped(output)
        width = heads.num * heads.value_width
        columns = weights["value"].new_empty(width, 0) if out is None else out.weight.detach().flatten(1).mT[:width]
        for role in ("query", "key"):  # such as have no matrix here belong to no product
            weights.setdefault(role, columns.new_zeros(heads.count(role), heads.width, 0))
        return cls(
            **weights,
            query_bias=biases.get("query"),
            key_bias=biases.get("key"),
            value_bias=biases.get("value"),
            output=split_output(columns, heads.num, stream.by_component),
            output_bias=None if out is None or out.bias is None else out.bias.detach(),
            gate_bias=biases.get("gate"),
        )

    def rows(self, one: Input) -> tuple[Tensor, Tensor | None]:
        """Weight (n, D) and bias (n,) of a linear layer with the rows of these roles, in float64."""
        weight = joined_heads([double(getattr(self, role)) for role in one.roles], one.by_head)
        biases = [getattr(self, f"{role}_bias") for role in one.roles]
        if any(bias is None for bias in biases):
            return weight, None
        return weight, joined_heads([double(bias) for bias in biases], one.by_head)

    def free_moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Moments of queries (H, d, d), keys (G, d, d) and values (G, d_v, d_v) for white inputs.

        With them, the factors are the truncated SVDs of ``W_q W_k^T`` and ``W_v W_o``.
        """
        return gram(self.query), gram(self.key), gram(self.value)


def unwrapped(linear: nn.Module) -> Any:
    """A linear layer itself, also where PEFT has wrapped it."""
    return getattr(linear, "base_layer", linear)


def joined_heads(parts: list[Tensor], by_head: bool) -> Tensor:
    """The rows (n, ...) of a linear layer from those of its roles, (heads, width, ...) each."""
    return torch.cat(parts, 1).flatten(0, 1) if by_head else torch.cat([part.flatten(0, 1) for part in parts])


def split_output(rows: Tensor, heads: int, by_component: bool) -> Tensor:
    """Rows (n, ...) as an output projection takes them, by head: (heads, n / heads, ...)."""
    return rows.unflatten(0, (-1, heads)).transpose(0, 1) if by_component else rows.unflatten(0, (heads, -1))


def joined_output(output: Tensor, by_component: bool) -> Tensor:
    """(heads, width, D_out) as the weight (D_out, heads * width) of an output projection."""
    return (output.transpose(0, 1) if by_component else output).flatten(0, 1).mT


def gram(weight: Tensor) -> Tensor:
    """``W W^T`` (..., d, d) in float64."""
    weight = double(weight)
    return weight @ weight.mT


def flatten_heads(weight: Tensor) -> Tensor:
    """(H, r, D) to (H r, D): rows ordered by head, as ``nn.Linear`` stores them."""
    return weight.flatten(0, 1)


def is_identity(module: nn.Module | None) -> bool:
    """Whether a module between projection and product does nothing."""
    return module is None or type(module) is nn.Identity


def as_parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter with the dtype and device of ``like``, and with the strides that a file gives back.

    ``contiguous`` keeps any stride of an axis of length 1, and kernels round by strides.
    """
    value = value.to(dtype=like.dtype, device=like.device)
    return nn.Parameter(value.clone(memory_format=torch.contiguous_format), like.requires_grad)


def zeros_like_bias(bias: Tensor | None, size: int, like: Tensor) -> Tensor:
    """``bias`` in float64, or zeros where the layer has none."""
    return torch.zeros(size, dtype=torch.float64, device=wide(like.device)) if bias is None else double(bias)


def grouped(per_head: Tensor, groups: int) -> Tensor:
    """Sums (groups, ...) over the heads (H, ...) of each group."""
    return per_head.unflatten(0, (groups, -1)).sum(1)


def spread(per_group: Tensor, heads: int) -> Tensor:
    """(groups, ...) repeated for every head of a group: (H, ...)."""
    return per_group.repeat_interleave(heads // per_group.shape[0], 0)
