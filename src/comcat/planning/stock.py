"""Plans of models that need no comcat: one width for the heads of all attention layers, one for all FFNs.

    attention    r_qk = r_vo = w        in every layer
    FFN          m hidden units         in every layer (in a model of stages: the same share of each)
    classifier   dense

The curves are those of every method, summed over the layers; two widths are few enough to look at all of them.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from ..errors import BudgetError, PlanError
from ..layers.base import Choice, Layer, check_parts
from ..models.stock_forms import Group, constructor_of, offered
from ..prepared import Prepared
from .allocate import out_of_reach
from .plan import Plan
from .planner import Curves, Planner, Solution


def stock_groups(ready: Prepared, parts: tuple[str, ...]) -> tuple[list[Group], list[str]]:
    """What can be narrowed by settings of the model's own constructor, and why the rest cannot.

    Raises:
        ModelError: no library builds this model again. PlanError: nothing can be narrowed, or one of qk and vo alone.
    """
    if ("qk" in parts) != ("vo" in parts):
        raise PlanError(
            "a stock model has one width for queries, keys and values: select both of qk and vo, or neither"
        )
    constructor = constructor_of(ready.model)
    kinds: dict[str, list[Layer]] = {}
    for layer in ready.inventory.layers:
        if layer.one_width and set(map(layer.part_of, layer.one_width)) <= set(parts):
            kinds.setdefault(layer.kind, []).append(layer)
    groups, reasons = [], []
    for kind, layers in kinds.items():
        stuck = next((layer for layer in layers if not _free(layer)), None)
        group = None if stuck is not None else offered(constructor, ready.model, layers)
        if group is not None:
            groups.append(group)
        elif stuck is not None:
            reasons.append(f"{kind} stays dense: '{stuck.name}' ({_why(stuck)})")
        else:
            what = "width of its heads" if kind == "attention" else "number of its hidden units"
            reasons.append(f"{kind} stays dense: none of the {constructor.settings} sets the {what}, and nothing else")
    if not groups:
        why = "; ".join(reasons) or f"it has no layer with a part among {', '.join(parts)}"
        raise PlanError(f"{type(ready.model).__name__} has no narrower stock form: {why}. Plan without stock=True")
    return groups, reasons


def _free(layer: Layer) -> bool:
    return (
        layer.plain() and set(layer.one_width) <= set(layer.full) and len({layer.full[p] for p in layer.one_width}) == 1
    )


def _why(layer: Layer) -> str:
    if "pairs" in layer.full:
        return "its rotary queries and keys keep the width that the angles are for"
    if "channels" in layer.full:
        return "an operation on the channels of the values expects all of them"
    return next(iter(layer.dense_parts.values()), "its projections are no linear layers of one width")


class StockPlanner(Planner):
    """Under the constraint of :mod:`comcat.planning.stock`; arguments and errors as :class:`Planner`."""

    def __init__(self, ready: Prepared, *args: Any) -> None:
        budget, calibration, method, parts, multiple, size, progress, latency, _, forward = (*args, *[None] * 10)[:10]
        parts = tuple(part for part in check_parts(parts) if part in ("qk", "vo", "ffn"))
        self.groups, self.reasons = stock_groups(ready, parts)
        kept = {part for group in self.groups for layer in group.layers for part in map(layer.part_of, layer.one_width)}
        parts = tuple(part for part in parts if part in kept)
        super().__init__(
            ready, budget, calibration, method, parts, multiple, size, progress, latency, "neurons", forward
        )

    def refuse_unreachable(self) -> None:
        smallest = self.fixed + self._rest() + sum(int(self._costs(group).min()) for group in self.groups)
        if smallest > self.limit:
            error = out_of_reach(self._shown(self.limit), self._shown(smallest))
            raise BudgetError("; ".join([str(error), *self.reasons]))

    def plan(self) -> Plan:
        made = super().plan()
        for reason in self.reasons:
            warnings.warn(reason, stacklevel=4)
        return made

    def solve(self, curves: Curves) -> Solution:
        """The pair of widths of least loss within the budget; of equally good ones the larger."""
        costs = [self._costs(group) for group in self.groups]
        losses = [self._losses(group, curves) for group in self.groups]
        grid = np.meshgrid(*costs, indexing="ij")
        cost: Any = sum(grid) + self.fixed + self._rest()
        loss: Any = sum(np.meshgrid(*losses, indexing="ij"))
        loss = np.where(cost <= self.limit, loss, np.inf)
        if not np.isfinite(loss).any():
            raise PlanError("no loss that was estimated is finite; calibrate again, in a wider dtype")
        best = np.flatnonzero(loss.ravel() <= loss.min())
        pick = np.unravel_index(best[cost.ravel()[best].argmax()], cost.shape)
        choices: dict[str, Choice] = {layer.name: {} for layer in self.inventory.layers}
        for group, index in zip(self.groups, pick, strict=True):
            for layer in group.layers:
                choices[layer.name] = group.choice(layer, self._widths(group)[index])
        return choices, float(loss[pick])

    def _widths(self, group: Group) -> list[int]:
        return [*group.widths(self.multiple), group.full]

    def _costs(self, group: Group) -> np.ndarray:
        """Of all layers of a group, at all of its widths."""
        return np.array(
            [sum(self.price(layer, group.choice(layer, w)) for layer in group.layers) for w in self._widths(group)]
        )

    def _losses(self, group: Group, curves: Curves) -> np.ndarray:
        found = np.zeros(len(self._widths(group)))
        for layer in group.layers:
            widths = [int(group.width(layer, w) or 0) for w in self._widths(group)]
            found += sum(curves[layer.name][part][widths] for part in layer.one_width)
        return found

    def _rest(self) -> int:
        """What the layers cost that are in no group."""
        inside = {layer.name for group in self.groups for layer in group.layers}
        return sum(self.price(layer, {}) for layer in self.inventory.layers if layer.name not in inside)


def stock_widths(ready: Prepared, plan: Plan) -> dict[str, Any]:
    """The settings of the model's constructor that a plan comes to.

    Raises:
        PlanError: its widths are not the same in every layer of a kind, or not ones that a setting gives.
    """
    planned = {name for name, choice in plan.layers.items() if choice}
    parts = tuple(dict.fromkeys(p for n in planned for p in map(ready.inventory[n].part_of, plan.layers[n])))
    if not planned:
        return {}
    if extra := set(parts) - {"qk", "vo", "ffn"}:
        raise PlanError(f"a stock model keeps its {', '.join(sorted(extra))} dense; make the plan with stock=True")
    settings: dict[str, Any] = {}
    for group in stock_groups(ready, parts)[0]:
        names = {layer.name for layer in group.layers}
        if not names & planned:
            continue
        first = group.layers[0]
        width = plan.layers.get(first.name, {}).get(first.one_width[0], group.full)
        if any(plan.layers.get(layer.name, {}) != group.choice(layer, width) for layer in group.layers):
            raise PlanError(
                f"the widths of the {first.kind} layers differ, and a stock model has one for all; make the plan with "
                "stock=True"
            )
        settings[group.name] = group.value(width)
        if width < group.full and settings[group.name] is None:
            raise PlanError(f"no value of {group.name} gives a width of {width}; make the plan with stock=True")
        planned -= names
    if planned:
        raise PlanError(f"layer '{min(planned)}' cannot be narrowed in a stock model; make the plan with stock=True")
    return settings
