"""One option per layer under a budget: near the brute-force optimum, and always within the budget."""

from itertools import product

import numpy as np
import pytest

from comcat.errors import BudgetError, PlanError
from comcat.hosts import find_layers
from comcat.layers.base import Layer
from comcat.layers.cost import Shape, break_even
from comcat.planning.allocate import Options, allocate, layer_options, lower_hull
from comcat.planning.units import units_with
from conftest import vit

LAYERS = {layer.kind: layer for layer in find_layers(vit()).layers}
SHAPE = Shape(7, 7)


def option(cost: list[int], loss: list[float]) -> Options:
    cost = np.array(cost)
    return Options(
        LAYERS["head"], (np.arange(len(cost)),), ("rank",), {"params": cost, "macs": 7 * cost}, np.array(loss, float)
    )


def random_options(rng: np.random.Generator, sites: int, convex: bool) -> list[Options]:
    found = []
    for _ in range(sites):
        cost = np.sort(rng.choice(np.arange(1, 60), 7, replace=False))
        loss = np.sort(rng.exponential(1.0, 7))[::-1]
        if convex:  # losses saved per cost fall: the hull holds every option
            slopes = np.sort(rng.exponential(1.0, 6))[::-1]
            loss = np.append(np.cumsum((slopes * np.diff(cost))[::-1])[::-1], 0.0)
        found.append(option(cost, loss))
    return found


def brute(options: list[Options], limit: int) -> float:
    picks = product(*(range(len(o.loss)) for o in options))
    return min(
        sum(o.loss[i] for o, i in zip(options, pick, strict=True))
        for pick in picks
        if sum(o.costs["params"][i] for o, i in zip(options, pick, strict=True)) <= limit
    )


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_close_to_brute_force(seed: int, convex: bool) -> None:
    rng = np.random.default_rng(seed)
    options = random_options(rng, 3, convex)
    low, high = (sum(f(o.costs["params"]) for o in options) for f in (np.min, np.max))
    largest = sum(float(o.loss.max() - o.loss.min()) for o in options) / len(options)
    for limit in np.linspace(low, high, 7).astype(int):
        chosen = allocate(options, "params", int(limit), 0, str, tolerance=1.0)
        assert sum(o.costs["params"][i] for o, i in zip(options, chosen, strict=True)) <= limit
        got = sum(o.loss[i] for o, i in zip(options, chosen, strict=True))
        assert brute(options, limit) - 1e-9 <= got <= brute(options, limit) + largest


@pytest.mark.parametrize("seed", range(10))
def test_optimal_where_a_corner_of_the_hull_meets_the_budget(seed: int) -> None:
    """The greedy walk over convex curves is exact at every budget that it passes."""
    options = random_options(np.random.default_rng(seed), 3, convex=True)
    position = [len(o.loss) - 1 for o in options]
    while any(position):
        rates = [
            (o.loss[p - 1] - o.loss[p]) / (o.costs["params"][p] - o.costs["params"][p - 1]) if p else np.inf
            for o, p in zip(options, position, strict=True)
        ]
        position[int(np.argmin(rates))] -= 1
        limit = sum(int(o.costs["params"][p]) for o, p in zip(options, position, strict=True))
        chosen = allocate(options, "params", limit, 0, str, tolerance=1.0)
        got = sum(o.loss[i] for o, i in zip(options, chosen, strict=True))
        assert got == pytest.approx(brute(options, limit))


def test_what_is_fixed_counts() -> None:
    options = [option([1, 10], [1, 0]), option([2, 20], [3, 0])]
    assert allocate(options, "params", 130, 100, str) == [1, 1]
    assert allocate(options, "params", 121, 100, str, tolerance=0.1) == [0, 1]
    assert allocate(options, "params", 112, 100, str) == [1, 0]


def test_units() -> None:
    options = [option([1, 10], [1, 0])]
    assert allocate(options, "macs", 70, 0, str) == [1]
    assert allocate(options, "macs", 69, 0, str, tolerance=1.0) == [0]


def test_out_of_reach_names_the_smallest() -> None:
    options = [option([10, 20], [1, 0]), option([5, 20], [1, 0])]
    with pytest.raises(BudgetError, match=r"<114> is out of reach: the smallest reachable .* is <115>"):
        allocate(options, "params", 114, 100, lambda cost: f"<{cost}>")


def test_too_coarse_widths_name_the_closest() -> None:
    with pytest.raises(BudgetError, match=r"closest below 19 is 10; ask for that figure, or use a smaller"):
        allocate([option([10, 20], [1, 0])], "params", 19, 0, str)


def test_where_no_upgrade_fits_two_sites_change_together() -> None:
    """The walk ends at 60 + 30, the next upgrade would cost 11 of the 9 that are left; 58 + 41 meets the budget."""
    options = [option([10, 50, 58, 60, 100], [9, 1, 0.7, 0.5, 0]), option([10, 30, 41, 80], [9, 1, 0.9, 0])]
    assert allocate(options, "params", 99, 0, str, tolerance=0.1) == [3, 1]
    assert allocate(options, "params", 99, 0, str) == [2, 2]
    assert allocate(options, "macs", 7 * 99 + 5, 0, str, tolerance=0.01) == [2, 2]
    with pytest.raises(BudgetError, match="closest below 98 is 90"):
        allocate(options, "params", 98, 0, str)


def test_equal_losses_leave_no_budget_unused() -> None:
    options = [option(list(range(1, 101)), [0.0] * 100)]
    assert allocate(options, "params", 57, 0, str) == [56]


def tied_losses(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count,) losses that fall to zero, with ties in what a cut costs."""
    steps = {
        "straight": np.full(count - 1, 1.0),
        "straight, any slope": np.full(count - 1, rng.random()),
        "thirds": np.full(count - 1, 1 / 3),
        "flat": np.zeros(count - 1),
        "plateau": np.r_[np.full(count // 2, rng.random()), np.zeros(count - 1 - count // 2)],
        "integers": np.sort(rng.integers(0, 4, count - 1))[::-1],
        "equal gains": np.sort(np.resize(np.repeat(rng.random(count // 10 + 1), 10), count - 1))[::-1],
        "integers, not convex": rng.integers(0, 3, count - 1),
    }[kind]
    return np.append(np.cumsum(steps[::-1])[::-1], 0.0)


TIES = [
    "straight",
    "straight, any slope",
    "thirds",
    "flat",
    "plateau",
    "integers",
    "equal gains",
    "integers, not convex",
]


@pytest.mark.parametrize("same_step", [True, False])
@pytest.mark.parametrize("kind", TIES)
def test_ties_never_exceed_the_budget(kind: str, same_step: bool) -> None:
    """Many sites whose curves are straight, flat or equal: every budget is met, in costs recomputed from the choice."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        options = []
        for _ in range(1 + seed):
            count = int(rng.integers(3, 90))
            step = 7 if same_step else int(rng.integers(1, 5000))
            cost = np.arange(1, count + 1) * step + int(rng.integers(0, 1000)) * (not same_step)
            options.append(option(cost, tied_losses(kind, count, rng)))
        low, high = (sum(int(f(o.costs["params"])) for o in options) for f in (np.min, np.max))
        for fraction in (0.0, 0.1, 0.33, 0.5, 0.8, 0.95, 1.0):
            limit = 17 + int(low + (high - low) * fraction)
            chosen = allocate(options, "params", limit, 17, str, tolerance=1.0)
            total = 17 + sum(int(o.costs["params"][i]) for o, i in zip(options, chosen, strict=True))
            finest = max(int(np.diff(np.sort(o.costs["params"])).max(initial=0)) for o in options)
            assert limit - finest <= total <= limit or "not convex" in kind
            assert total <= limit


@pytest.mark.parametrize("kind", ["straight", "integers", "plateau"])
@pytest.mark.parametrize("seed", range(4))
def test_ties_are_close_to_brute_force(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    options = [option(np.arange(1, 8) * int(rng.integers(1, 9)), tied_losses(kind, 7, rng)) for _ in range(3)]
    low, high = (sum(int(f(o.costs["params"])) for o in options) for f in (np.min, np.max))
    largest = max(float(-np.diff(o.loss).min()) for o in options)
    for limit in range(low, high + 1, 3):
        chosen = allocate(options, "params", limit, 0, str, tolerance=1.0)
        got = sum(o.loss[i] for o, i in zip(options, chosen, strict=True))
        assert got <= brute(options, limit) + 2 * largest


def test_equal_costs_of_different_widths() -> None:
    """Latency has plateaus: widths that take equally long, and wider ones that take less."""
    options = [
        option([5, 5, 5, 9, 9, 7, 12], [6, 5, 4, 3, 2.5, 2, 0]),
        option([3, 3, 3, 3], [2, 2, 1, 0]),
    ]
    assert allocate(options, "params", 10, 0, str, tolerance=1.0) == [5, 3]
    assert allocate(options, "params", 9, 0, str, tolerance=1.0) == [2, 3]
    assert allocate(options, "params", 15, 0, str) == [6, 3]


def test_a_loss_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(PlanError, match=r"losses estimated for layer 'head' hold NaN"):
        allocate([option([1, 2], [float("nan"), 0])], "params", 1, 0, str)


def test_the_hull_is_convex_and_below_everything() -> None:
    rng = np.random.default_rng(0)
    cost, loss = rng.integers(0, 50, 200), rng.random(200)
    hull = lower_hull(cost, loss)
    x, y = cost[hull], loss[hull]
    assert cost[hull[0]] == cost.min()
    assert loss[hull[-1]] == loss.min()
    assert (np.diff(x) > 0).all()
    assert (np.diff(np.diff(y) / np.diff(x)) > 0).all()
    inside = cost <= x[-1]
    assert (loss[inside] >= np.interp(cost[inside], x, y) - 1e-12).all()


def curves(kind: str) -> dict[str, np.ndarray]:
    return {part: np.linspace(1, 0, full + 1) for part, full in LAYERS[kind].full.items()}


def options_of(layer: Layer, parts: tuple[str, ...], multiple: int = 1) -> Options:
    own = {part: curve for part, curve in curves(layer.kind).items() if part in layer.selected(parts)}
    return layer_options(layer, own, SHAPE, multiple, units_with(None))


@pytest.mark.parametrize("multiple", [1, 2, 3])
@pytest.mark.parametrize(("kind", "part"), [("attention", "qk"), ("attention", "vo"), ("ffn", "ffn"), ("head", "head")])
def test_options_hold_the_dense_one_and_cost_what_their_choice_costs(kind: str, part: str, multiple: int) -> None:
    layer = LAYERS[kind]
    found = options_of(layer, (part,), multiple)
    choices = [found.choice(i) for i in range(len(found.loss))]
    assert {} in choices
    assert found.loss[choices.index({})] == 0
    for choice, params, macs in zip(choices, found.costs["params"], found.costs["macs"], strict=True):
        assert (params, macs) == layer.priced(choice, SHAPE)
        assert all(width % multiple == 0 for width in choice.values())
        assert set(choice) <= ({part} if kind == "attention" else set(layer.full))
    assert len({tuple(sorted(c.items())) for c in choices}) == len(choices) > 1


def test_low_rank_options_stay_below_break_even() -> None:
    dense = {kind: layer.priced({}, SHAPE).params for kind, layer in LAYERS.items()}
    for kind, part in (("ffn", "ffn"), ("head", "head")):
        found = options_of(LAYERS[kind], (part,))
        for i in range(len(found.loss)):
            choice = found.choice(i)
            assert found.costs["params"][i] <= dense[kind]
            for name, width in choice.items():
                if name != "neurons":
                    linear = LAYERS[kind].linears["linear" if name == "rank" else name]
                    assert width < break_even(linear.in_features, linear.out_features)


def test_a_part_that_is_not_selected_has_no_options() -> None:
    for kind, layer in LAYERS.items():
        other = ("head",) if kind != "head" else ("qk",)
        found = options_of(layer, other)
        assert [found.choice(i) for i in range(len(found.loss))] == [{}]
