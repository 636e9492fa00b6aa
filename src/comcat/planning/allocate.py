"""Choosing one option per layer under a budget: convex hulls, a greedy walk, and a fill of what remains.

Each layer brings a list of options (costs and an estimated loss each). On the lower convex hulls of loss over cost,
taking cuts by loss per saved cost is optimal for the sum of the losses; the last cut overshoots by less than one
step, and what is left of the budget is spent on the best affordable upgrades among all options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import BudgetError, PlanError
from ..layers.base import Choice, Layer
from ..layers.cost import Shape
from .curves import Curve
from .units import Unit

#: Budgets are met from below within this fraction.
TOLERANCE = 0.005
#: At most this many ranks per low-rank matrix, and its square of combinations, are considered, evenly spaced.
_RANKS = 160


@dataclass(frozen=True)
class Options:
    """The options of one layer, the dense one included."""

    layer: Layer
    parts: tuple[np.ndarray, ...]  # widths per part name, each (n,); -1 stands for dense
    names: tuple[str, ...]
    costs: dict[str, np.ndarray]  # by unit: (n,) integers
    loss: np.ndarray  # (n,)

    def choice(self, index: int) -> Choice:
        return {name: int(w[index]) for name, w in zip(self.names, self.parts, strict=True) if w[index] >= 0}


def spaced_widths(limit: int, multiple: int, count: int | None = None) -> np.ndarray:
    """Multiples below ``limit``, thinned evenly to ``count``."""
    widths = np.arange(multiple, limit, multiple)
    if count is not None and len(widths) > count:
        widths = widths[np.unique(np.linspace(0, len(widths) - 1, count).astype(int))]
    return widths


def layer_options(
    layer: Layer, curves: dict[str, Curve], shape: Shape, multiple: int, units: Mapping[str, Unit]
) -> Options:
    """All options of a layer: the parts that have a curve, every multiple, dense included.

    The parts of one form are combined. A rank at or above break-even, which would not shrink its layer, is no option.
    """
    forms = layer.forms
    names = tuple(dict.fromkeys(part for form in forms for part in form))
    tables = [_form_options(layer, form, curves, names, multiple, form == forms[-1]) for form in forms]
    widths = {part: np.concatenate([table[part] for table, _ in tables]) for part in names}
    loss = np.concatenate([loss for _, loss in tables])
    costs = {name: np.broadcast_to(unit.layer(layer, widths, shape), loss.shape) for name, unit in units.items()}
    return Options(layer, tuple(widths.values()), names, costs, loss)


def _form_options(
    layer: Layer, form: tuple[str, ...], curves: dict[str, Curve], names: tuple[str, ...], multiple: int, last: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Every combination of the widths of a form's parts: (widths by part, losses); ``last``: the dense layer too."""
    axes, losses = [], []
    low_rank = sum(part not in layer.linear_in_width for part in form)
    for part in form:
        count = None if part in layer.linear_in_width else min(_RANKS, round(_RANKS ** (2 / low_rank)))
        widths = np.arange(0)
        if part in curves and part in layer.full:
            widths = spaced_widths(min(layer.reach(part), len(curves[part]) - 1), multiple, count)
        dense = np.array([-1] if last or len(form) > 1 else [], dtype=int)
        axes.append(np.append(widths, dense))
        losses.append(np.append(curves[part][widths] if len(widths) else np.zeros(0), np.zeros(len(dense))))
    grid = np.meshgrid(*axes, indexing="ij")
    total = sum(np.meshgrid(*losses, indexing="ij"), np.zeros(()))
    absent = np.full(total.size, -1)
    return {part: grid[form.index(part)].ravel() if part in form else absent for part in names}, total.ravel()


def lower_hull(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices of the lower convex hull of (cost, loss), from the cheapest option to the one of least loss."""
    order = np.lexsort((loss, cost))
    hull: list[int] = []
    for i in order:
        if hull and loss[i] >= loss[hull[-1]]:
            continue  # dearer and not better
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (loss[b] - loss[a]) * (cost[i] - cost[a]) < (loss[i] - loss[a]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(int(i))
    return np.array(hull)


def allocate(
    options: list[Options],
    unit: str,
    limit: int,
    fixed: int,
    shown: Callable[[int], str],
    tolerance: float = TOLERANCE,
) -> list[int]:
    """One option index per layer, of least total loss within the limit.

    Args:
        unit: a key of every layer's ``costs``.
        limit: largest admissible cost of the whole model; fixed: what of it no option changes.
        shown: formats a cost for error messages.

    Raises:
        BudgetError: even the smallest options exceed the limit, or the widths are too coarse to meet it closely.
        PlanError: a loss that is not finite; the layer is named.
    """
    costs = [o.costs[unit] for o in options]
    for o in options:
        if not np.isfinite(o.loss).all():
            raise PlanError(
                f"the losses estimated for layer '{o.layer.name}' hold NaN or infinite values; calibrate again, in a "
                "wider dtype"
            )
    # A tiny slope breaks ties among equal losses: the larger model wins, so no budget is left unused.
    slope = 1e-12 * max(float(o.loss.max(initial=0)) for o in options) / max(c.max() for c in costs) + 1e-300
    losses = [o.loss - slope * c for o, c in zip(options, costs, strict=True)]
    smallest = fixed + sum(int(c.min()) for c in costs)
    if smallest > limit:
        raise out_of_reach(shown(limit), shown(smallest))
    chosen = _walk(costs, losses, fixed, limit)
    total = _total(costs, chosen, fixed)
    total = _fill(chosen, costs, losses, total, limit)
    least = limit - tolerance * limit
    if total < least:
        total = _exchange(chosen, costs, losses, total, limit, least)
    if total < least:
        raise BudgetError(
            f"the widths are too coarse for this model: the closest below {shown(limit)} is {shown(total)}; "
            "ask for that figure, or use a smaller rank multiple"
        )
    if _total(costs, chosen, fixed) > limit:
        raise BudgetError(
            f"the chosen widths cost {shown(_total(costs, chosen, fixed))}, above the budget of {shown(limit)}: this "
            "is a fault of comcat; please report it with the plan's arguments"
        )
    return chosen


def _walk(costs: list[np.ndarray], losses: list[np.ndarray], fixed: int, limit: int) -> list[int]:
    """Option per layer: down the hulls from the least losses, by loss per saved cost, until the limit is met.

    On a straight piece of a hull the slopes are equal up to rounding. They are made to rise from cut to cut, so that no
    layer's cuts are taken out of order.
    """
    hulls = [lower_hull(c, v) for c, v in zip(costs, losses, strict=True)]
    cuts = []
    for g, hull in enumerate(hulls):
        slopes = -np.diff(losses[g][hull]) / np.diff(costs[g][hull])
        slopes = np.maximum.accumulate(slopes[::-1])[::-1]
        cuts += [(float(slope), -i, g) for i, slope in enumerate(slopes)]
    chosen = [int(hull[-1]) for hull in hulls]
    total = _total(costs, chosen, fixed)
    for _, minus_i, g in sorted(cuts):
        if total <= limit:
            break
        option = int(hulls[g][-minus_i])
        total -= int(costs[g][chosen[g]] - costs[g][option])
        chosen[g] = option
    return chosen


def _total(costs: list[np.ndarray], chosen: list[int], fixed: int) -> int:
    return fixed + sum(int(c[i]) for c, i in zip(costs, chosen, strict=True))


def out_of_reach(wanted: str, smallest: str, others: Sequence[str] = ()) -> BudgetError:
    """The error for a budget below the smallest widths of all parts; ``others`` are not among these, and could be."""
    reachable = f"the smallest reachable with these parts and rank multiple is {smallest}"
    more = f"; {', '.join(others)} could be reduced too (parts, --parts)" if others else ""
    return BudgetError(f"the budget of {wanted} is out of reach: {reachable}{more}")


def _fill(chosen: list[int], costs: list[np.ndarray], losses: list[np.ndarray], total: int, limit: int) -> int:
    """Spend what is left on the upgrade of largest gain that fits, until none does; changes ``chosen``."""
    while True:
        best, pick = 0.0, None
        for g, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
            fits = cost <= cost[chosen[g]] + limit - total
            index = int(np.where(fits, loss, np.inf).argmin())
            gain = loss[chosen[g]] - loss[index]
            if gain > best:
                best, pick = gain, (g, index)
        if pick is None:
            return total
        g, index = pick
        total += int(costs[g][index] - costs[g][chosen[g]])
        chosen[g] = index


def _exchange(
    chosen: list[int], costs: list[np.ndarray], losses: list[np.ndarray], total: int, limit: int, least: float
) -> int:
    """Where no single upgrade fits: the best change of two layers that ends between ``least`` and ``limit``.

    Such gaps open up in models of a few small layers only. Changes ``chosen`` if there is such a pair.
    """
    best, pick = np.inf, None
    for h, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
        order = np.argsort(cost, kind="stable")
        lowest = np.minimum.accumulate(loss[order])
        # Position of the least loss among all options up to each cost.
        first = np.maximum.accumulate(np.where(loss[order] == lowest, np.arange(len(order)), 0))
        for g in range(len(costs)):
            if g == h:
                continue
            rest = total - costs[g][chosen[g]] - cost[chosen[h]] + costs[g]  # without h, for every option of g
            position = np.searchsorted(cost[order], limit - rest, side="right") - 1
            partner = order[first[np.maximum(position, 0)]]
            fits = (position >= 0) & (rest + cost[partner] >= least)
            change = losses[g] + loss[partner] - losses[g][chosen[g]] - loss[chosen[h]]
            index = int(np.where(fits, change, np.inf).argmin())
            if fits[index] and change[index] < best:
                best, pick = float(change[index]), (g, index, h, int(partner[index]))
    if pick is None:
        return total
    g, index, h, partner_index = pick
    total += int(costs[g][index] - costs[g][chosen[g]] + costs[h][partner_index] - costs[h][chosen[h]])
    chosen[g], chosen[h] = index, partner_index
    return total
