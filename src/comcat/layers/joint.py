"""Attention over two streams of tokens that meet in one softmax, such as pictures and text in SD 3 and FLUX.

Every stream has matrices of its own, and every query sees the keys of both:

    scores_h = scale * [q_a; q_b] [k_a; k_b]^T          out_s = sum_h softmax(scores_h)_s [v_a; v_b] W_o,h^s

The scores of a head are one product of rank d over all tokens, whichever stream they are of. Its best rank-r form, in
the mean squared error of all scores, is that of the moments over the queries of both streams and over the keys of both,
centred together (Eckart and Young); so both share ``T_q`` and ``T_k``, and maps of their own would gain nothing. Values
share ``T_v``, since every output is a mix of both; the output weights of each stream are refitted to its statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import PlanError
from .attention import AttentionLayer, StandIn
from .base import Choice, size
from .cost import Cost, Shape
from .gates import LayerGates
from .heads import Heads, HeadWeights, Stream
from .recording import Recorder, ShapeCounter, as_rows

if TYPE_CHECKING:
    from .joint_factors import JointFactors


class JointStandIn(StandIn, Protocol):
    """How such a module runs with narrower heads."""

    def fill_context(self, small: nn.Module, weights: HeadWeights) -> None:
        """Write the second stream's weights into it."""


class JointAttention(AttentionLayer):
    """Attention with the ranks of :class:`AttentionLayer`, which both streams share.

    Args:
        context: the second stream; its output is None where nothing is made of it.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        heads: Heads,
        stream: Stream,
        stand_in: JointStandIn,
        context: Stream,
        dense_parts: Mapping[str, str] | None = None,
        *,
        running: nn.Module | None = None,
    ) -> None:
        super().__init__(name, module, heads, stream, stand_in, dense_parts, running=running)
        self.context = context

    def fill_context(self, small: nn.Module, weights: HeadWeights) -> None:
        """Write the second stream's weights into a stand-in."""
        cast(JointStandIn, self.stand_in).fill_context(small, weights)

    @property
    def streams(self) -> tuple[Stream, ...]:
        return self.stream, self.context

    def plain(self) -> bool:
        return False  # what narrows a constructor's heads knows of one stream

    @property
    def _put_out(self) -> tuple[Stream, ...]:
        """Streams of which something is made."""
        return self.streams if self.context.output is not None else (self.stream,)

    def moment_shapes(self) -> dict[str, tuple[int, ...]]:
        n = self.heads.num * self.heads.value_width
        more = {"z_context": (n, n), "z_context_mean": (n,)} if self.context.output is not None else {}
        return super().moment_shapes() | more

    def gradient_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().gradient_shapes()
        if self.context.output is not None:
            out = size(self.linears[self.context.output])[1]
            shapes["out_grad_context"] = (out, out)
        return shapes

    def shape_hooks(self, counter: ShapeCounter) -> list[Any]:
        keys = counter.keys(self.feature_axis, self.context.name)
        return [*super().shape_hooks(counter), self.linears[self.context.key].register_forward_hook(keys)]

    def record(self, recorder: Recorder) -> list[Any]:
        handles = [
            self.linears[str(stream.output)].register_forward_hook(
                recorder.inputs(f"z{mark}", f"out_grad{mark}", self.feature_axis, self._by_head)
            )
            for stream, mark in zip(self._put_out, ("", "_context"), strict=False)
        ]
        if "qk" in self.dense_parts:
            return handles
        met = _Meeting(self, recorder, len(self._put_out))
        for stream in self.streams:
            for one in stream.inputs:
                wanted = {"key"} | ({"query"} if stream in self._put_out else set())
                if not wanted.isdisjoint(one.roles):
                    handles.append(self.linears[one.path].register_forward_hook(met.hook(one, wanted)))
        return handles

    def factors(self, moments: Mapping[str, Tensor] | None = None) -> JointFactors:
        from .joint_factors import JointFactors

        return JointFactors(self, moments)

    def gates(self, factors: Any, parts: tuple[str, ...]) -> list[LayerGates]:
        raise PlanError(
            f"the ranks of '{self.name}' cannot be learned: its heads are those of two streams of tokens; choose the "
            "method spectrum or probe"
        )

    def _cost(self, qk: Any, vo: Any, shape: Shape) -> Cost:
        h, own = self.heads, shape.tokens
        more = max((shape.keys or own) - own, 0)
        cost = super()._cost(qk, vo, Shape(own, 0))
        params, macs = cost
        for one in self.context.inputs:
            linear = self.linears[one.path]
            rows = sum(h.count(role) * (vo if role == "value" else qk) for role in one.roles)
            params = params + rows * (size(linear)[0] + (linear.bias is not None))
            macs = macs + more * rows * size(linear)[0]
        if self.context.output is not None:
            linear = self.linears[self.context.output]
            out = size(linear)[1]
            biased = (linear.bias is not None) | (np.asarray(vo) < h.value_width)
            params = params + h.num * vo * out + np.where(biased, out, 0)
            macs = macs + more * h.num * vo * out
        products = h.width + h.value_width if self.stand_in.fixed else 2 * np.maximum(qk, vo)
        return Cost(params, macs + (own + more) * shape.sequence * h.num * products)

    def linear_size(self, part: str) -> tuple[int, int]:
        inner, full = super().linear_size(part)
        h, width = self.heads, size(self.linears[self.context.query])[0]
        if part != "vo":
            return inner + (h.num + h.groups) * width, full
        out = size(self.linears[self.context.output])[1] if self.context.output is not None else 0
        return inner + h.groups * width + h.num * out, full

    def check(self, choice: Choice) -> None:
        for part in ("pairs", "channels"):
            if part in choice:
                raise PlanError(f"layer '{self.name}': attention over two streams has no {part}; give qk and vo")
        super().check(choice)


class _Meeting:
    """Queries, keys and gradients of both streams, put together for every pass.

    Args:
        queries: of how many streams the queries count.
    """

    def __init__(self, layer: JointAttention, recorder: Recorder, queries: int) -> None:
        self.layer, self.recorder, self.queries = layer, recorder, queries
        self._keys: list[Tensor] = []
        self._products: list[Tensor] = []

    def hook(self, one: Any, wanted: set[str]) -> Any:
        layer, recorder = self.layer, self.recorder

        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            rows = layer.heads.split(as_rows(out.detach(), layer.feature_axis), one)  # (sequences, tokens, heads, d)
            if "query" in rows and "query" in wanted:
                recorder.add("q", rows["query"].permute(2, 0, 1, 3).flatten(1, 2), second=True)
                if recorder.fisher and out.requires_grad:
                    out.register_hook(lambda g: self._gradient(one, rows["query"], g))
            if "key" in rows:
                self._key(rows["key"])

        return hook

    def _key(self, rows: Tensor) -> None:
        """A query sees the keys of both streams, which are centred together."""
        self._keys.append(rows)
        if len(self._keys) == 2:
            k = torch.cat(self._keys, 1)
            self._keys.clear()
            k = k - k.mean(1, keepdim=True)
            self.recorder.add("k", k.permute(2, 0, 1, 3).flatten(1, 2), centred=True, second=True)

    def _gradient(self, one: Any, q: Tensor, grad: Tensor) -> None:
        """``A = Q^T dL/dQ`` of an image is the sum over the queries of both streams."""
        self._products.append(self.layer.gradient_product(self.recorder, one, q, grad))
        if len(self._products) == self.queries:
            A = torch.stack(self._products).sum(0)
            self._products.clear()
            self.recorder.add_product("qk_rows", (A @ A.mT).sum(0))
            self.recorder.add_product("qk_cols", (A.mT @ A).sum(0))
