"""The space that the rank search moves in: what is gated, what it costs, where it starts, and how it becomes a plan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..calibration.statistics import Calibration
from ..layers.base import USUAL_PARTS, Choice, Layer
from ..planning.curves import Curve
from ..planning.latency import LatencyTable
from ..planning.plan import Budget, Plan
from ..planning.planner import Planner, Solution, default_multiple
from ..prepared import Prepared, prepared
from .distribution import RankDistribution, candidate_widths
from .gated_model import GatedModel

#: How fast a component loses its worth with its distance from the expected width: a mild slope would let a flat piece
#: of a cost, such as latency has, draw widths across half their range.
_STEEPNESS = 8


class SearchSpace:
    """A gated model and the distribution over its widths, around a starting plan.

    Args:
        model: the dense model; it is copied.
        start: a plan that meets the budget; a part that it leaves dense starts dense.
        calibration: for the factors; without it they come from the weights.
        candidates: widths per part; spread: standard deviation of the distribution at the start, in candidates.
        ffn: as for :func:`comcat.plan`; ``auto`` takes the form that the starting plan has in each layer.

    Attributes:
        rows: (layer, part, candidates) per row of the distribution ``ranks``; gated: the model.

    Raises:
        BudgetError: out of reach. PlanError: the starting plan does not fit, or an unknown form.
    """

    def __init__(
        self,
        model: nn.Module | Prepared,
        budget: Budget,
        start: Plan,
        calibration: Calibration | None = None,
        *,
        candidates: int = 16,
        ffn: str = "auto",
        spread: float = 1.5,
        parts: Sequence[str] = USUAL_PARTS,
        rank_multiple: int | None = None,
        input_size: Sequence[int] | None = None,
        latency: LatencyTable | None = None,
    ) -> None:
        multiple = default_multiple(budget) if rank_multiple is None else rank_multiple
        ready = prepared(model)
        self.planner = Planner(ready, budget, calibration, "search", parts, multiple, input_size, None, latency, ffn)
        self.planner.refuse_unreachable()
        start.check(self.planner.inventory)
        self.rows: list[tuple[Layer, str, list[int]]] = []
        groups: list[list[int]] = []
        prices: list[Tensor] = []
        for layer in self.planner.inventory.layers:
            own = self._gated_parts(layer, start.layers.get(layer.name, {}), ffn)
            widths = [candidate_widths(layer, part, candidates, multiple) for part in own]
            groups.append([len(self.rows) + i for i in range(len(own))])
            prices.append(self._prices(layer, own, widths))
            self.rows += [(layer, part, choices) for part, choices in zip(own, widths, strict=True)]
        self._reaches = [layer.reach(part) for layer, part, _ in self.rows]
        started = [
            min(start.layers.get(layer.name, {}).get(part, limit), limit)
            for (layer, part, _), limit in zip(self.rows, self._reaches, strict=True)
        ]
        self.solve(started)  # one form of the FFN may not reach what both do: better known now than after the search
        self.ranks = RankDistribution(
            [choices for _, _, choices in self.rows],
            self._reaches,
            groups,
            prices,
            self.planner.fixed / self.planner.limit,
            started,
            spread,
        )
        self.gated = GatedModel(ready.model, self.planner.factors, self.rows)

    def _gated_parts(self, layer: Layer, started: Choice, ffn: str) -> list[str]:
        """The parts of one form: the one that the layer starts in, or that was asked for, else the first."""
        own = layer.selected(self.planner.parts)
        forms = [form for form in ([part for part in form if part in own] for form in layer.forms) if form]
        asked = {"neurons": forms[:1], "low-rank": forms[-1:]}.get(ffn)
        begun = [form for form in forms if not started.keys().isdisjoint(form)]
        return (asked or begun[-1:] or forms)[0]

    def _prices(self, layer: Layer, parts: list[str], widths: list[list[int]]) -> Tensor:
        """(A,) or (A1, A2) costs of the layer as shares of the budget."""
        sizes = tuple(len(choices) for choices in widths)
        table = torch.zeros(sizes, dtype=torch.float64)
        for index in np.ndindex(*sizes):
            chosen = {part: choices[i] for part, choices, i in zip(parts, widths, index, strict=True)}
            reduced = {part: width for part, width in chosen.items() if width < layer.full[part]}
            table[index] = self.planner.price(layer, reduced) / self.planner.limit
        return table

    def solve(self, widths: Sequence[float]) -> Solution:
        """The choices nearest to the expected ``widths`` of all rows that meet the budget.

        Every part is worth ``price * full * exp(8 (expected - width) / full)``: where the expected widths cost the
        budget they are the optimum, otherwise all of them move by one share of their full width.
        """
        expected: dict[str, Choice] = {layer.name: {} for layer in self.planner.inventory.layers}
        for (layer, part, _), width, limit in zip(self.rows, widths, self._reaches, strict=True):
            if width < limit - 0.5:
                expected[layer.name][part] = max(1, round(width))
        curves: dict[str, dict[str, Curve]] = {name: {} for name in expected}
        for (layer, part, _), width, limit in zip(self.rows, widths, self._reaches, strict=True):
            kept = np.minimum(np.arange(layer.full[part] + 1), limit)
            price = self._unit_price(layer, part, limit, expected[layer.name])
            curve = price * limit * np.exp(_STEEPNESS * (width - kept) / limit)
            curves[layer.name][part] = curve - curve[-1]
        return self.planner.solve(curves)

    def _unit_price(self, layer: Layer, part: str, limit: int, at: Choice) -> float:
        """What one component of a part costs around the widths ``at``; over half its range, as costs have steps."""
        middle = min(at.get(part, limit), limit - 1)
        low, high = max(1, middle - limit // 4), max(2, min(limit - 1, middle + limit // 4))
        prices = [self.planner.price(layer, {**at, part: min(width, layer.full[part])}) for width in (low, high)]
        return max(prices[1] - prices[0], 1) / max(high - low, 1)

    def as_plan(self, solution: Solution, **measured: float) -> Plan:
        """The plan of a solution; its distance from the expected widths is no estimate of a loss and is left out."""
        made = self.planner.as_plan(solution, **measured)
        made.estimate.pop("loss", None)
        return made
