"""Stand-ins that keep the host's own attention forward: its projections are swapped for narrow ones.

Source of the idea: zero columns change no score and no value. Where the host takes the width of a head from an
attribute, the attribute is set to the wider of queries and values (``narrow``); otherwise the zeros go up to the full
width, which saves what the projections cost, but nothing in the products. Which it is says :mod:`comcat.hosts.proof`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.base import like, size
from ..layers.heads import Heads, HeadWeights, Input, Places, Role, Stream, as_parameter, joined_output, spread
from ..nn.copies import copy_with
from ..nn.derived import change_class
from ..nn.linear import plain_linear
from ..nn.projections import HeadOutput, HeadProjection
from .timm_rotary import narrow_rotary


@dataclass
class KeptForward:
    """How one attention module runs with narrower heads.

    Attributes:
        running: the module, or its form with linear layers that are called.
        widths: attributes (path of the submodule, name) that hold the width of a head; totals: that of all heads;
            scales: that of the scores, which follows from it.
        context: the second stream of tokens, where there is one.
        narrow: which of the widths are set: none, those of a head, or both (``""``, ``"widths"``, ``"totals"``).
        implicit: the softmax scale is that of the narrower width, and what it lacks is in the queries: the host derives
            it from the width, or is told. Those of diffusers do either, by their processor.
    """

    running: nn.Module
    heads: Heads
    stream: Stream
    widths: tuple[tuple[str, str], ...] = ()
    totals: tuple[tuple[str, str], ...] = ()
    scales: tuple[tuple[str, str], ...] = ()
    context: Stream | None = None
    narrow: str = ""
    implicit: bool = False

    @property
    def fixed(self) -> bool:
        return not self.narrow and narrow_rotary(self.running) is None

    def build(self, qk: int, vo: int, placed: Collection[Role] = ()) -> nn.Module:
        """An empty stand-in: the module's own class, with heads of these widths.

        Args:
            placed: whose components go to places of their own within a head of the full width.
        """
        heads = self.heads
        wide: dict[Role, int] = {role: heads.wide(role) for role in ("query", "key", "value", "gate")}
        if self.narrow and not placed:
            wide = dict.fromkeys(wide, max(qk, vo))
        children: dict[str, nn.Module] = {}
        for stream in (self.stream, self.context):
            if stream is None:
                continue
            for one in stream.inputs:
                small = self._input(one, qk, vo, wide, placed)
                if small is not None:
                    children[one.path] = small
            narrower = vo < heads.value_width or wide["value"] < heads.value_width
            if stream.output is not None and narrower:
                # A reduced value carries its mean, and what it loses of it, into the output bias.
                out: Any = self.running.get_submodule(stream.output)
                bias = out.bias is not None or vo < heads.value_width
                linear = plain_linear(heads.num * vo, size(out)[1], bias, **like(out))
                children[stream.output] = HeadOutput(
                    linear, heads.num, vo, wide["value"], stream.by_component, "value" in placed
                )
        for child in children.values():
            child.train(self.running.training)
        made = copy_with(self.running, children)
        if self.narrow and not placed:
            self._tell(made, max(qk, vo))
        cls = narrow_rotary(self.running)
        if cls is not None and "query" in placed and isinstance(children.get(self.stream.query), HeadProjection):
            change_class(made, cls)
        return made

    def _input(
        self, one: Input, qk: int, vo: int, wide: Mapping[Role, int], placed: Collection[Role]
    ) -> nn.Module | None:
        """A narrow projection, or None where the original stays."""
        linear: Any = self.running.get_submodule(one.path)
        narrow = {role: vo if role in ("value", "gate") else qk for role in one.roles}
        if all(narrow[role] == wide[role] == self.heads.wide(role) for role in one.roles):
            return None
        return HeadProjection(
            size(linear)[0],
            [self.heads.count(role) for role in one.roles],
            [narrow[role] for role in one.roles],
            [wide[role] for role in one.roles],
            one.by_head,
            linear.bias is not None,
            not set(placed).isdisjoint(one.roles),
            full=[self.heads.wide(role) for role in one.roles],
            **like(linear),
        )

    def _tell(self, made: nn.Module, width: int) -> None:
        """Set the head width where the host looks for it."""
        for path, name in self.widths:
            setattr(made.get_submodule(path), name, width)
        for path, name in self.totals if self.narrow == "totals" else ():
            setattr(made.get_submodule(path), name, width * self.heads.num)
        for path, name in self.scales if self.implicit else ():
            setattr(made.get_submodule(path), name, width**-0.5)

    def fill(self, small: nn.Module, weights: HeadWeights, places: Places) -> None:
        """Write per-head weights into a stand-in."""
        self._fill(small, self.stream, weights, places)

    def fill_context(self, small: nn.Module, weights: HeadWeights) -> None:
        """Those of the second stream."""
        assert self.context is not None
        self._fill(small, self.context, weights, {})

    def _fill(self, small: nn.Module, stream: Stream, weights: HeadWeights, places: Places) -> None:
        if self.narrow and self.implicit and not places:
            weights = _scaled(weights, (self._width(small) / self.heads.width) ** 0.5)
        for one in stream.inputs:
            made: Any = small.get_submodule(one.path)
            if not isinstance(made, HeadProjection):
                continue
            original: Any = self.running.get_submodule(one.path)
            weight, bias = weights.rows(one)
            shape = made.linear.weight.shape
            made.linear.weight = as_parameter(weight.reshape(shape), original.weight)
            if bias is not None and made.linear.bias is not None:
                made.linear.bias = as_parameter(bias, original.weight)
            if made.places is not None:
                device = original.weight.device
                shown = [self._components(role, made.narrow[i], places) for i, role in enumerate(one.roles)]
                made.place([at.to(device) for at in shown])
        out: Any = None if stream.output is None else small.get_submodule(stream.output)
        if isinstance(out, HeadOutput):
            original = self.running.get_submodule(str(stream.output))
            weight = joined_output(weights.output, stream.by_component)
            out.linear.weight = as_parameter(weight.reshape(out.linear.weight.shape), original.weight)
            if out.linear.bias is not None and weights.output_bias is not None:
                out.linear.bias = as_parameter(weights.output_bias, original.weight)
            if out.places is not None:
                out.place(spread(places["value"], self.heads.num).to(original.weight.device))

    def _width(self, small: nn.Module) -> int:
        made = small.get_submodule(self.stream.query)
        return made.wide[0] if isinstance(made, HeadProjection) else self.heads.width

    def _components(self, role: Role, narrow: int, places: Places) -> Tensor:
        """(heads, narrow): which components of a full head are kept; the first ones where nothing else is said."""
        return places[role] if role in places else torch.arange(narrow).expand(self.heads.count(role), -1)


def _scaled(weights: HeadWeights, by: float) -> HeadWeights:
    bias = None if weights.query_bias is None else weights.query_bias * by
    return HeadWeights(**{**vars(weights), "query": weights.query * by, "query_bias": bias})
