"""Attention: two products per head, ``W_q W_k^T`` and ``W_v W_o``, of ranks ``qk`` and ``vo``.

The host says where the four matrices are (:class:`~comcat.layers.heads.Stream`), how many heads there are, which of the
products exist, and how the layer runs with narrower ones. Where queries and keys are rotated between projection and
product (rotary embedding), the parts of the query-key product that exist by themselves are pairs of components: the
part is then called ``pairs``: all heads keep the same ones, refitted to stand in for those that go.

Where an operation on single channels stands between values and output projection (an activation, a gate, a filter per
channel), their product does not exist, but a channel is a unit as a neuron of an FFN is:

    out = sum_j act(z_j) w_o,j          z = softmax(scores) v

The part is then called ``channels``: as many of every head are kept, and the output weights are refitted to them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor, nn

from .attention_factors import AttentionFactors
from .base import Choice, Layer, given, is_pointwise, size
from .cost import Cost, Shape
from .gates import AttentionGates, LayerGates
from .heads import Heads, HeadWeights, Places, Role, Stream, split_output
from .recording import Recorder, ShapeCounter, as_rows
from .rotation import find_tables, turn_rows


class StandIn(Protocol):
    """How one attention module runs with narrower heads."""

    @property
    def fixed(self) -> bool:
        """Whether the products run at the full width whatever is kept, the rest being zeros."""

    def build(self, qk: int, vo: int, placed: Collection[Role] = ()) -> nn.Module:
        """An empty module with everything else of the original.

        Args:
            qk, vo: widths of one head's queries and keys, and of its values.
            placed: whose components go to places of their own within a head of the full width.
        """

    def fill(self, small: nn.Module, weights: HeadWeights, places: Places) -> None:
        """Write weights of these widths into it; ``places`` of what is placed."""


class AttentionLayer(Layer):
    """Attention with H heads of width d: ranks ``qk`` (or ``pairs``, up to d / 2) and ``vo`` (or ``channels``).

    Args:
        heads, stream: how many heads there are, and where their matrices are inside ``running``.
        stand_in: what builds and fills narrower ones.
        dense_parts: parts that must keep their width, and why.
        rotary: how the components of a rotated query pair up: ``half`` (i with i + d / 2), ``next`` (2 i with 2 i + 1),
            or None.
        by_channel: whether values can be left out channel by channel, where their product with the output projection
            does not exist.
        fused: whether queries and values run at one width, that of the wider, as fused kernels want it.
        running: what computes the same through linear layers that are called; default the module itself.
    """

    kind = "attention"
    levels: ClassVar = {
        "qk": (0.0625, 0.125, 0.25, 0.375, 0.5, 0.75),
        "pairs": (0.125, 0.25, 0.375, 0.5, 0.75),
        "vo": (0.125, 0.25, 0.375, 0.5, 0.625, 0.8),
        "channels": (0.125, 0.25, 0.375, 0.5, 0.625, 0.8),
    }
    linear_in_width = ("qk", "pairs", "vo", "channels")
    one_width = ("qk", "vo")
    timed_together = True

    def __init__(
        self,
        name: str,
        module: nn.Module,
        heads: Heads,
        stream: Stream,
        stand_in: StandIn,
        dense_parts: Mapping[str, str] | None = None,
        *,
        rotary: str | None = None,
        by_channel: bool = False,
        fused: bool = True,
        running: nn.Module | None = None,
    ) -> None:
        super().__init__(name, module, dense_parts)
        self.heads, self.stream, self.stand_in = heads, stream, stand_in
        self.rotary, self.by_channel, self.fused = rotary, by_channel, fused
        self._running = running

    @property
    def running(self) -> nn.Module:
        return self.module if self._running is None else self._running

    @property
    def qk_part(self) -> str:
        return "pairs" if self.rotary else "qk"

    @property
    def vo_part(self) -> str:
        return "channels" if self.by_channel else "vo"

    @property
    def forms(self) -> tuple[tuple[str, ...], ...]:  # type: ignore[override]
        return ((self.qk_part, self.vo_part),)

    @property
    def full(self) -> Choice:
        heads = self.heads
        # A classifier of few classes behind wide heads leaves the product no more rank than it has rows.
        vo = min(heads.value_width, heads.num // heads.groups * size(self.output)[1])
        widths = {self.qk_part: heads.width // 2 if self.rotary else heads.width}
        widths[self.vo_part] = heads.value_width if self.by_channel else vo
        if self.proof is not None:  # what a saved model was found to be is in its plan
            widths["channels"] = heads.value_width
            if heads.width % 2 == 0:
                widths["pairs"] = heads.width // 2
        return {part: width for part, width in widths.items() if self._product(part) not in self.dense_parts}

    @staticmethod
    def _product(part: str) -> str:
        return {"pairs": "qk", "channels": "vo"}.get(part, part)

    def part_of(self, part: str) -> str:
        return "vo" if part == "channels" else part

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Of the tokens that meet in one softmax."""
        return (self.stream,)

    @property
    def linears(self) -> dict[str, Any]:
        paths = [path for stream in self.streams for path in stream.paths]
        return {path: self.running.get_submodule(path) for path in paths}

    def originals(self) -> dict[str, nn.Module]:
        there = [path for path in self.linears if _holds(self.module, path)]
        return {
            name: one
            for path in there
            for name, one in self.module.get_submodule(path).named_modules(prefix=path)
            if one._parameters  # of a pair that is one layer in the running form, both
        }

    @property
    def output(self) -> Any:
        """The output projection."""
        return self.running.get_submodule(str(self.stream.output))

    @property
    def feature_axis(self) -> int:
        """The axis of the features."""
        return 1 if is_pointwise(self.output) else -1

    def shapes_at(self, width: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for one in self.stream.inputs:
            rows, linear = sum(map(self.heads.count, one.roles)) * width, self.linears[one.path]
            shapes[f"{self.name}.{one.path}.weight"] = (rows, size(linear)[0])
            if linear.bias is not None:
                shapes[f"{self.name}.{one.path}.bias"] = (rows,)
        shapes[f"{self.name}.{self.stream.output}.weight"] = (size(self.output)[1], self.heads.num * width)
        return shapes

    def weights(self) -> HeadWeights:
        """The dense weights, per head."""
        return self.weights_of(self.stream)

    def weights_of(self, stream: Stream) -> HeadWeights:
        """Those of one of the streams."""
        return HeadWeights.of(self.running, self.heads, stream)

    def qk_width(self, choice: Choice) -> int:
        """Width of one head's queries and keys at a choice."""
        return 2 * choice["pairs"] if "pairs" in choice else choice.get("qk", self.heads.width)

    def vo_width(self, choice: Choice) -> int:
        """Width of one head's values at a choice."""
        return choice["channels"] if "channels" in choice else choice.get("vo", self.heads.value_width)

    @staticmethod
    def placed(choice: Choice) -> tuple[Role, ...]:
        """Whose components keep their places within a full head at a choice."""
        roles: tuple[Role, ...] = ("query", "key") if "pairs" in choice else ()
        return (*roles, "value", "gate") if "channels" in choice else roles

    def moment_shapes(self) -> dict[str, tuple[int, ...]]:
        h = self.heads
        n = h.num * h.value_width
        shapes: dict[str, tuple[int, ...]] = {"z": (n, n), "z_mean": (n,)}
        if "qk" in self.dense_parts:
            return shapes
        return {"q": (h.num, h.width, h.width), "k": (h.groups, h.width, h.width), **shapes}

    def optional_shapes(self) -> dict[str, tuple[int, ...]]:
        turn = {"turn": (self.heads.groups, self.heads.width, self.heads.width)} if self.rotary else {}
        return turn | self.gradient_shapes()

    def gradient_shapes(self) -> dict[str, tuple[int, ...]]:
        h, out = self.heads, size(self.output)[1]
        square = (h.num, h.width, h.width)
        return {"qk_rows": square, "qk_cols": square, "out_grad": (out, out)}

    def shape_hooks(self, counter: ShapeCounter) -> list[Any]:
        key = self.running.get_submodule(self.stream.key)
        return [
            self.output.register_forward_hook(counter.rows(self.feature_axis)),
            key.register_forward_hook(counter.keys(self.feature_axis)),
        ]

    def record(self, recorder: Recorder) -> list[Any]:
        handles = [
            self.output.register_forward_hook(recorder.inputs("z", "out_grad", self.feature_axis, self._by_head))
        ]
        if "qk" in self.dense_parts:
            return handles
        if self.rotary:
            handles.append(self.running.register_forward_pre_hook(self._turns(recorder), with_kwargs=True))
        for one in self.stream.inputs:
            if "query" in one.roles or "key" in one.roles:
                hook = self._hook(recorder, one)
                handles.append(self.running.get_submodule(one.path).register_forward_hook(hook))
        return handles

    def _by_head(self, z: Tensor) -> Tensor:
        """Rows (..., n) that the output projection takes, head after head."""
        by_head = split_output(z.movedim(-1, 0), self.heads.num, self.stream.by_component)
        return by_head.flatten(0, 1).movedim(0, -1)

    def _hook(self, recorder: Recorder, one: Any) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            rows = self.heads.split(as_rows(out.detach(), self.feature_axis), one)  # (sequences, tokens, heads, d)
            if "query" in rows:
                recorder.add("q", rows["query"].permute(2, 0, 1, 3).flatten(1, 2), second=True)
            if "key" in rows:
                k = rows["key"]
                k = k - k.mean(1, keepdim=True)
                recorder.add("k", k.permute(2, 0, 1, 3).flatten(1, 2), centred=True, second=True)
            if "query" in rows and recorder.fisher and out.requires_grad:
                out.register_hook(lambda g: self._add_gradient(recorder, one, rows["query"], g))

        return hook

    def _turns(self, recorder: Recorder) -> Any:
        """A hook for the layer, which takes the angles from what it is called with."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = [*args, *kwargs.values()]
            tables = find_tables(values, self.heads.width, str(self.rotary))
            x = next((value for value in values if isinstance(value, Tensor)), None)
            if tables is not None and x is not None:
                rows = turn_rows(tables, x.shape[-2], self.heads.groups)
                recorder.add("turn", rows.expand(self.heads.groups, -1, -1), centred=True, second=True)

        return hook

    def gradient_product(self, recorder: Recorder, one: Any, q: Tensor, grad: Tensor) -> Tensor:
        """``A = Q^T dL/dQ`` (images, heads, d, d): the gradient of the loss in the product's own coordinates."""
        grad = self.heads.split(as_rows(grad, self.feature_axis), one)["query"]
        q, grad = (t.unflatten(0, (recorder.images, -1)).flatten(1, 2).transpose(1, 2) for t in (q, grad))
        return recorder.precise(q.mT @ grad)

    def _add_gradient(self, recorder: Recorder, one: Any, q: Tensor, grad: Tensor) -> None:
        A = self.gradient_product(recorder, one, q, grad)
        recorder.add_product("qk_rows", (A @ A.mT).sum(0))
        recorder.add_product("qk_cols", (A.mT @ A).sum(0))

    def factors(self, moments: Mapping[str, Tensor] | None = None) -> AttentionFactors:
        return AttentionFactors(self, moments)

    def empty(self, choice: Choice) -> dict[str, nn.Module]:
        self.check(choice)
        if not choice:
            return {}
        made = self.stand_in.build(self.qk_width(choice), self.vo_width(choice), self.placed(choice))
        return {self.name: made}

    def replaced(self, choice: Choice) -> dict[str, nn.Module]:
        if not choice:
            return {}
        inside = {f"{self.name}.{path}": linear for path, linear in self.linears.items()}
        return {self.name: self.module, **inside}

    def gates(self, factors: Any, parts: tuple[str, ...]) -> list[LayerGates]:
        return [AttentionGates(self, factors, parts)]

    def cost(self, widths: Mapping[str, Any], shape: Shape) -> Cost:
        heads = self.heads
        qk = given(widths, self.qk_part) * (2 if self.rotary else 1)
        vo = given(widths, self.vo_part)
        dense = (qk < 0) & (vo < 0)
        qk, vo = np.where(qk < 0, heads.width, qk), np.where(vo < 0, heads.value_width, vo)
        cost = self._cost(qk, vo, shape)
        return Cost(cost.params - np.where(dense, self._more, 0), cost.macs)

    @property
    def _more(self) -> int:
        """Parameters that :attr:`running` has and the module itself has not: zeros for biases that it leaves out."""
        running, module = ({id(p): p.numel() for p in m.parameters()} for m in (self.running, self.module))
        return sum(running.values()) - sum(module.values())

    def _cost(self, qk: Any, vo: Any, shape: Shape) -> Cost:
        """At these widths of one head."""
        h = self.heads
        params = macs = 0
        for one in self.stream.inputs:
            linear: Any = self.running.get_submodule(one.path)
            rows = sum(h.count(role) * (vo if role in ("value", "gate") else qk) for role in one.roles)
            params = params + rows * (size(linear)[0] + (linear.bias is not None))
            tokens = shape.tokens if "query" in one.roles else shape.keys or shape.tokens
            macs = macs + tokens * rows * size(linear)[0]
        out = size(self.output)[1]
        # A reduced value carries its mean, and what it loses of it, into the output bias.
        has_bias = self.output.bias is not None
        params = params + h.num * vo * out + np.where(has_bias | (np.asarray(vo) < h.value_width), out, 0)
        products = 2 * np.maximum(qk, vo) if self.fused else qk + vo
        if self.stand_in.fixed:
            products = h.width + h.value_width
        if not any("query" in one.roles for one in self.stream.inputs):
            products = 0  # what brings values together is the host's own, and stays as it is
        macs = macs + shape.tokens * (h.num * vo * out + shape.sequence * h.num * products)
        return Cost(params, macs)

    def parts_cost(self, parts: Iterable[str], shape: Shape) -> Cost:
        h, parts = self.heads, tuple(parts)
        whole = self._cost(h.width, h.value_width, shape)
        rest = self._cost(0 if self.qk_part in parts else h.width, 0 if "vo" in parts else h.value_width, shape)
        # A reduced output has a bias even where the dense one has none; that one is no part of the dense cost.
        added = size(self.output)[1] if self.output.bias is None and "vo" in parts else 0
        return Cost(int(whole.params - rest.params) + added, int(whole.macs - rest.macs))

    def linear_size(self, part: str) -> tuple[int, int]:
        h, D = self.heads, size(self.running.get_submodule(self.stream.query))[0]
        if part in ("vo", "channels"):
            rows = sum(role in ("value", "gate") for one in self.stream.inputs for role in one.roles)
            return rows * h.groups * D + h.num * size(self.output)[1], self.full.get(part, h.value_width)
        return (h.num + h.groups) * D * (2 if self.rotary else 1), self.full[part]

    def equal_share(self, part: str) -> tuple[int, int]:
        inner, full = self.linear_size(part)
        return inner * full, full

    def layer_key(self, shape: Shape) -> str:
        heads = f", {self.heads.num} heads, {shape.sequence} keys"
        return super().layer_key(shape).replace(f", {shape.tokens} tokens", f"{heads}, {shape.tokens} tokens")


def _holds(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:  # such as of projections that are parameters of the module itself
        return False
    return True
