"""Latency as a budget: what a table says a plan costs, and which table may be used; made-up times throughout."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import comcat
from comcat.errors import BudgetError, CalibrationError, ModelError
from comcat.hosts import find_layers
from comcat.layers.base import USUAL_PARTS
from comcat.models.profile import layer_shapes
from comcat.planning import timing
from comcat.planning.allocate import TOLERANCE
from comcat.planning.latency import Grid, LayerTimes, nested
from comcat.planning.planner import Planner
from conftest import calibrated, swin, vit

pytestmark = pytest.mark.usefixtures("no_source")

WIDE = {"embed_dim": 48, "num_heads": 3, "depth": 3, "mlp_ratio": 2.0, "num_classes": 11}


class Clock:
    """Time passes by 100 ns whenever it is looked at, and otherwise when it is told to."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        self.time += 1e-7
        return self.time

    def wait(self, mark: float) -> None:
        assert mark <= self.time

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


def measure(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, call: Any = comcat.measure_latency, **options: Any
) -> comcat.LatencyTable:
    """A table measured with a clock that the forward passes advance: by 10 ns per parameter that is used."""
    clock = Clock()
    monkeypatch.setattr(timing, "_clock", lambda device: clock)

    def spend(module: nn.Module, *_: Any) -> None:
        clock.time += 1e-8 * sum(p.numel() for p in module.parameters(recurse=False))

    with nn.modules.module.register_module_forward_hook(spend):
        return call(model, **options)


@pytest.fixture(scope="module")
def host() -> nn.Module:
    return vit(**WIDE)


@pytest.fixture(scope="module")
def table(host: nn.Module) -> comcat.LatencyTable:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return measure(monkeypatch, host, widths=5, rounds=1)


@pytest.mark.parametrize("make", [vit, swin, lambda: vit(qk_norm=True), lambda: vit(num_classes=0)])
def test_a_layer_takes_what_it_took(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measured width has the time that the clock gave to a layer of that width, whichever layer it was."""
    model = make()
    table = measure(monkeypatch, model, widths=3, rounds=2)
    inventory = find_layers(model)
    shapes = layer_shapes(model, inventory, table.input_size)
    assert sum(layer.count for layer in table.layers.values()) == len(inventory.layers)
    for site in inventory.layers:
        grids = table.layers[site.layer_key(shapes[site.name])].grids
        assert {part for grid in grids for part in grid.parts} == set(site.full)
        for grid in grids:
            for index in np.ndindex(*map(len, grid.widths)):
                choice = {p: axis[i] for p, axis, i in zip(grid.parts, grid.widths, index, strict=True)}
                reduced = {part: width for part, width in choice.items() if width < site.full[part]}
                small = comcat.compress(model, comcat.Plan({site.name: reduced})).get_submodule(site.name)
                own = sum(p.numel() for p in small.parameters())
                assert table.cost(site, shapes[site.name], choice) == pytest.approx(100 + 10 * own, abs=2)


def test_measuring_leaves_the_model_alone(host: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit(**WIDE).train()
    modules, weights = dict(model.named_modules()), {n: t.clone() for n, t in model.state_dict().items()}
    seen: list[tuple[str, int, int]] = []
    measure(monkeypatch, model, widths=2, rounds=1, progress=lambda *args: seen.append(args))
    assert dict(model.named_modules()) == modules
    assert all(module.training for module in modules.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules.values())
    assert all(weights[n].equal(t) for n, t in model.state_dict().items())
    assert seen == [("latency", i + 1, len(seen)) for i in range(len(seen))]


def test_real_clocks_give_positive_times() -> None:
    table = comcat.measure_latency(vit(), batch_size=2, widths=2, rounds=1)
    assert (table.batch_size, table.dtype, table.input_size) == (2, "float64", (3, 14, 21))
    assert table.device
    assert table.dense > sum(layer.count * layer.dense for layer in table.layers.values()) > 0


def test_times_between_widths_are_interpolated() -> None:
    layer = LayerTimes(2, 90, (Grid(("qk", "vo"), ((2, 5), (1, 3, 5)), ((10, 20, 40), (30, 60, 90))),))
    widths = {"qk": np.array([2, 5, 2, 5, 1, 3, -1, -1]), "vo": np.array([1, 1, 2, -1, 1, 2, 4, -1])}
    assert layer.at(widths).tolist() == [10, 30, 15, 90, 10, 25, 75, 90]


def test_low_rank_matrices_save_independently() -> None:
    grids = Grid(("neurons",), ((2, 9),), (5, 40)), Grid(("fc1",), ((1, 3),), (30, 50)), Grid(("fc2",), ((1,),), (45,))
    at = LayerTimes(2, 60, grids).at
    widths = {"neurons": [2, -1, -1, -1, -1], "fc1": [-1, 2, -1, 2, 8], "fc2": [-1, -1, 1, 1, -1]}
    assert at({part: np.array(w) for part, w in widths.items()}).tolist() == [5, 40, 45, 25, 50]


# -- planning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["uniform", "spectrum", "probe"])
@pytest.mark.parametrize("kept", [0.5, 0.7, 0.9])
def test_latency_budgets_are_met_from_below(
    host: nn.Module, table: comcat.LatencyTable, method: str, kept: float
) -> None:
    calibration = calibrated(host, 32, probe_images=8)
    plan = comcat.plan(
        host, comcat.Budget(latency=kept), calibration, method, rank_multiple=1, input_size=None, latency=table
    )
    inventory = find_layers(host)
    shapes = layer_shapes(host, inventory, table.input_size)
    saved = sum(
        int(table.cost(site, shapes[site.name], {})) - int(table.cost(site, shapes[site.name], choice))
        for site in inventory.layers
        if (choice := plan.layers.get(site.name))
    )
    assert plan.estimate["latency"] == table.dense - saved
    assert (1 - TOLERANCE) * kept * table.dense <= plan.estimate["latency"] <= kept * table.dense
    assert plan.budget == {"latency": kept, "of": "model"}
    small = comcat.profile(comcat.compress(host, plan, calibration))
    assert (small.params, small.macs) == (plan.estimate["params"], plan.estimate["macs"])


def test_an_absolute_budget_is_in_nanoseconds(host: nn.Module, table: comcat.LatencyTable) -> None:
    limit = int(0.6 * table.dense)
    plan = comcat.plan(host, comcat.Budget(latency=limit), rank_multiple=1, latency=table)
    assert (1 - TOLERANCE) * limit <= plan.estimate["latency"] <= limit


def test_other_budgets_name_the_latency_too(host: nn.Module, table: comcat.LatencyTable) -> None:
    budget = comcat.Budget(params=0.6)
    plain, timed = comcat.plan(host, budget), comcat.plan(host, budget, latency=table)
    assert timed.layers == plain.layers
    assert set(timed.estimate) - set(plain.estimate) == {"latency"}


def test_widths_are_multiples_of_eight_unless_said_otherwise(host: nn.Module, table: comcat.LatencyTable) -> None:
    plan = comcat.plan(host, comcat.Budget(latency=0.62), method="spectrum", latency=table)
    assert plan.layers
    assert all(width % 8 == 0 for choice in plan.layers.values() for width in choice.values())


def test_a_width_slower_than_a_wider_one_is_not_chosen(host: nn.Module, table: comcat.LatencyTable) -> None:
    slow = {}
    for key, layer in table.layers.items():
        grids = []
        for grid in layer.grids:
            times = np.array(grid.times)
            if grid.parts == ("neurons",):
                times[2] = 10 * times[-1]
            grids.append(replace(grid, times=nested(times)))
        slow[key] = replace(layer, grids=tuple(grids))
    (bad,) = {g.widths[0][2] for layer in slow.values() for g in layer.grids if g.parts == ("neurons",)}
    for kept in (0.65, 0.75, 0.85):
        plan = comcat.plan(host, comcat.Budget(latency=kept), calibrated(host, 32), "spectrum", ("ffn",), 1, None, None,
                           replace(table, layers=slow))  # fmt: skip
        assert bad not in [choice.get("neurons") for choice in plan.layers.values()]


def test_prices_and_options_agree(host: nn.Module, table: comcat.LatencyTable) -> None:
    planner = Planner(
        comcat.prepare(host), comcat.Budget(latency=0.7), None, "search", USUAL_PARTS, 1, None, None, table
    )
    assert planner.fixed + sum(planner.price(s, {}) for s in planner.inventory.layers) == table.dense
    flat = {s.name: {p: np.linspace(1, 0, w + 1) for p, w in s.full.items()} for s in planner.inventory.layers}
    solution = planner.solve(flat)
    plan = planner.as_plan(solution, surprise=3.0)
    assert plan.method == "search"
    assert plan.estimate["surprise"] == 3.0
    cost = planner.fixed + sum(planner.price(s, solution[0][s.name]) for s in planner.inventory.layers)
    assert plan.estimate["latency"] == cost <= planner.limit


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_latency_needs_a_table(host: nn.Module) -> None:
    for ask in (comcat.plan, comcat.check_budget):
        with pytest.raises(BudgetError, match=r"give latency=comcat\.measure_latency\(model\)"):
            ask(host, comcat.Budget(latency=0.5))


def test_out_of_reach_names_what_can_be_reached(host: nn.Module, table: comcat.LatencyTable) -> None:
    for ask in (comcat.plan, comcat.check_budget):
        with pytest.raises(BudgetError, match=r"budget of 0\.\d+ ms .* out of reach: the smallest .* ms \("):
            ask(host, comcat.Budget(latency=0.01), latency=table)
        with pytest.raises(BudgetError, match=r"not below what the dense model costs \(0\.\d+ ms\)"):
            ask(host, comcat.Budget(latency=table.dense), latency=table)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"latency": 0.5, "macs": 0.5}, "one of params, macs and latency"),
        ({"latency": 0.5, "of": "parts"}, "a latency budget is of the whole model"),
        ({"latency": 1.5}, "between 0 and 1"),
        ({"latency": 1}, "keeps nothing"),
        ({"latency": True}, "a budget is a number"),
    ],
)
def test_bad_budgets_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        comcat.Budget(**args)


def test_a_table_of_another_model_is_refused(host: nn.Module, table: comcat.LatencyTable) -> None:
    def ask(model: nn.Module, latency: comcat.LatencyTable, **options: Any) -> None:
        comcat.plan(model, comcat.Budget(latency=0.6), latency=latency, **options)

    for model in (vit(**{**WIDE, "depth": 2}), vit(**{**WIDE, "mlp_ratio": 1.5}), vit()):
        with pytest.raises(CalibrationError, match=r"another model, without this one's \d layers"):
            ask(model, table)
    with pytest.raises(CalibrationError, match=r"another model, of .* parameters .* measure this one"):
        ask(host, replace(table, params=table.params + 1))
    with pytest.raises(CalibrationError, match=r"input size \(3, 14, 21\), the plan is for \(3, 28, 42\)"):
        ask(vit(**WIDE, dynamic_img_size=True), table, input_size=(3, 28, 42))


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"widths": 1}, {"rounds": 0}])
def test_measuring_nothing_is_refused(host: nn.Module, options: dict[str, int]) -> None:
    with pytest.raises(CalibrationError, match="2 widths or more"):
        comcat.measure_latency(host, **options)


def test_a_model_without_layers_is_refused() -> None:
    model = vit(num_classes=0, depth=1)
    model.blocks = nn.Sequential()
    with pytest.raises(ModelError):
        comcat.measure_latency(model)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_table_survives_its_file(table: comcat.LatencyTable, tmp_path: Path) -> None:
    table.save(tmp_path / "latency.json")
    assert comcat.LatencyTable.load(tmp_path / "latency.json") == table


def damage(data: dict[str, Any], **changes: Any) -> str:
    layer = next(iter(data["layers"].values()))
    grid = layer["grids"][0]
    return json.dumps(
        {
            **data,
            **{k: v for k, v in changes.items() if k in data},
            "layers": {"a": {**layer, "grids": [{**grid, **{k: v for k, v in changes.items() if k in grid}}]}},
        }
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"comcat_latency": 3}, "has format 3, this comcat reads up to 2; upgrade comcat"),
        ({"dense": -3}, "is damaged: dense is -3, but should be greater than 0; measure again"),
        ({"batch_size": "many"}, "is damaged: batch_size is 'many', but should be a valid integer"),
        ({"times": [1, 2]}, "is damaged: .*do not fit the widths"),
        ({"parts": ["qk"], "widths": [[2, 1]], "times": [1, 2]}, "is damaged: .*ascending"),
        ({"parts": ["qk"], "widths": [[1, 2]], "times": [1, 0]}, "is damaged: .*positive"),
    ],
)
def test_damaged_tables_are_refused(
    table: comcat.LatencyTable, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = tmp_path / "latency.json"
    file.write_text(damage(table.to_dict(), **changes))
    with pytest.raises(CalibrationError, match=message):
        comcat.LatencyTable.load(file)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot read latency table"), ("[]", "is not a latency table"), ("{}", "is not a lat")]
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "latency.json").write_text(text)
    with pytest.raises(CalibrationError, match=message):
        comcat.LatencyTable.load(tmp_path / "latency.json")


def test_missing_fields_are_refused(table: comcat.LatencyTable, tmp_path: Path) -> None:
    data = table.to_dict()
    del data["layers"]
    (tmp_path / "latency.json").write_text(json.dumps(data))
    with pytest.raises(CalibrationError, match="is damaged: layers is missing; measure again"):
        comcat.LatencyTable.load(tmp_path / "latency.json")
