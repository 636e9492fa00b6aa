"""Choosing one option per site under a budget: convex hulls, a greedy walk, and a fill of what remains.

Each site brings a list of options (costs and an estimated loss each). On the lower convex hulls of loss over cost,
taking cuts by loss per saved cost is optimal for the sum of the losses; the last cut overshoots by less than one
step, and what is left of the budget is spent on the best affordable upgrades among all options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import BudgetError, PlanError
from ..layers.sites import AttentionSite, Choice, FFNSite, Site, select_parts
from .cost import Cost, Shape, attention_cost, break_even, linear_cost, low_rank_cost, neurons_cost
from .curves import Curve

#: Budgets are met from below within this fraction.
TOLERANCE = 0.005
#: At most this many ranks per low-rank matrix are considered, evenly spaced.
_GRID = 160


@dataclass(frozen=True)
class Options:
    """The options of one site, the dense one included."""

    site: Site
    parts: tuple[np.ndarray, ...]  # widths per part name, each (n,); -1 stands for dense
    names: tuple[str, ...]
    costs: dict[str, np.ndarray]  # by unit: (n,) integers
    loss: np.ndarray  # (n,)

    def choice(self, index: int) -> Choice:
        return {name: int(w[index]) for name, w in zip(self.names, self.parts, strict=True) if w[index] >= 0}


def _by_unit(cost: Cost) -> dict[str, np.ndarray]:
    return {unit: np.asarray(value, dtype=np.int64) for unit, value in cost._asdict().items()}


def spaced_widths(limit: int, multiple: int, count: int | None = None) -> np.ndarray:
    """Multiples below ``limit``, thinned evenly to ``count``."""
    widths = np.arange(multiple, limit, multiple)
    if count is not None and len(widths) > count:
        widths = widths[np.unique(np.linspace(0, len(widths) - 1, count).astype(int))]
    return widths


def site_options(site: Site, curves: dict[str, Curve], parts: tuple[str, ...], shape: Shape, multiple: int) -> Options:
    """All options of a site: the parts that have a curve, every multiple, dense included.

    A rank at or above break-even, which would not shrink its layer, is no option.
    """
    full = {p: w for p, w in select_parts(site.full, site.kind, parts).items() if p in curves}
    if isinstance(site, AttentionSite):
        return _attention_options(site, curves, full, shape, multiple)
    if isinstance(site, FFNSite):
        return _ffn_options(site, curves, full, shape, multiple)
    linear = site.module
    return _join(
        site, [_linear_options(linear, curves.get("rank") if full else None, shape.tokens, multiple)], ("rank",)
    )


def _attention_options(
    site: AttentionSite, curves: dict[str, Curve], full: Choice, shape: Shape, multiple: int
) -> Options:
    d = site.head_dim
    qk, vo = (
        np.append(spaced_widths(d, multiple) if part in full else np.arange(0), d)[shape_]
        for part, shape_ in (("qk", np.s_[:, None]), ("vo", np.s_[None, :]))
    )
    qk, vo = (grid.ravel() for grid in np.broadcast_arrays(qk, vo))
    cost = attention_cost(site, qk, vo, shape)
    loss = np.zeros(len(qk))
    for part, width in (("qk", qk), ("vo", vo)):
        if part in full:
            loss = loss + curves[part][width]
    widths = tuple(np.where(w < d, w, -1) for w in (qk, vo))
    return Options(site, widths, ("qk", "vo"), _by_unit(cost), loss)


def _linear_options(
    linear: object, curve: Curve | None, tokens: int, multiple: int
) -> tuple[np.ndarray, Cost, np.ndarray]:
    size = (linear.in_features, linear.out_features)  # type: ignore[attr-defined]
    ranks = np.arange(0) if curve is None else spaced_widths(min(break_even(*size), len(curve) - 1), multiple, _GRID)
    low, dense = low_rank_cost(*size, ranks, tokens), linear_cost(*size, linear.bias is not None, tokens)  # type: ignore[attr-defined]
    cost = Cost(np.append(low.params, dense.params), np.append(low.macs, dense.macs))
    loss = np.append(np.zeros(0) if curve is None else curve[ranks], 0.0)
    return np.append(ranks, -1), cost, loss


def _join(site: Site, tables: list[tuple[np.ndarray, Cost, np.ndarray]], names: tuple[str, ...]) -> Options:
    """Every combination of the options of one or two linear layers."""
    widths: list[np.ndarray] = []
    params = macs = loss = np.zeros(())
    for axis, (w, cost, value) in enumerate(tables):
        slot = np.s_[:, None] if axis == 0 and len(tables) == 2 else np.s_[...]
        params, macs, loss = params + cost.params[slot], macs + cost.macs[slot], loss + value[slot]
        widths.append(w[slot])
    flat = tuple(np.broadcast_to(w, np.shape(loss)).ravel() for w in widths)
    return Options(site, flat, names, _by_unit(Cost(params.ravel(), macs.ravel())), loss.ravel())


def _ffn_options(site: FFNSite, curves: dict[str, Curve], full: Choice, shape: Shape, multiple: int) -> Options:
    low = _join(
        site,
        [
            _linear_options(linear, curves.get(fc) if fc in full else None, shape.tokens, multiple)
            for fc, linear in site.linears.items()
        ],
        ("fc1", "fc2"),
    )
    neurons = spaced_widths(full["neurons"], multiple) if "neurons" in full else np.arange(0)
    cost = neurons_cost(site, neurons, shape.tokens)
    absent = np.full(len(neurons), -1)
    parts = (
        np.concatenate([np.full(len(low.loss), -1), neurons]),
        *(np.concatenate([w, absent]) for w in low.parts),
    )
    loss = np.concatenate([low.loss, curves["neurons"][neurons] if len(neurons) else np.zeros(0)])
    costs = {unit: np.concatenate([low.costs[unit], more]) for unit, more in _by_unit(cost).items()}
    return Options(site, parts, ("neurons", "fc1", "fc2"), costs, loss)


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
    """One option index per site, of least total loss within the limit.

    Args:
        unit: a key of every site's ``costs``.
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
                f"the losses estimated for layer '{o.site.name}' hold NaN or infinite values; calibrate again, in a "
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
    """Option per site: down the hulls from the least losses, by loss per saved cost, until the limit is met.

    On a straight piece of a hull the slopes are equal up to rounding. They are made to rise from cut to cut, so that no
    site's cuts are taken out of order.
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


def out_of_reach(wanted: str, smallest: str) -> BudgetError:
    """The error for a budget below the smallest widths of all parts."""
    reachable = f"the smallest reachable with these parts and rank multiple is {smallest}"
    return BudgetError(f"the budget of {wanted} is out of reach: {reachable}")


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
    """Where no single upgrade fits: the best change of two sites that ends between ``least`` and ``limit``.

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
