"""Latency in a runtime: layers as small models, tables of it, and budgets met there; plans go by made-up times."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import comcat
from comcat import runtimes
from comcat.errors import BudgetError, ComcatError
from comcat.planning.latency import Grid, LatencyTable, LayerTimes
from comcat.planning.measured_widths import MeasuredWidths
from comcat.runtimes.layer_stacks import float_copy, layer_calls, stack_of
from comcat.runtimes.realizing import Realized, realize
from comcat.runtimes.stack_files import stack_sessions
from conftest import calibrated, swin, vit
from test_latency import WIDE, measure
from test_runtimes import needs

pytestmark = pytest.mark.usefixtures("no_source")
FILES = ("onnxruntime", "openvino")
#: Of the largest number: roundings of two layers in float32.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def host() -> nn.Module:
    return vit(**WIDE)


@pytest.fixture(scope="module")
def table(host: nn.Module) -> LatencyTable:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return measure(monkeypatch, host, widths=5, rounds=1)


# -- layers as small models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [vit, swin])
def test_stacks_compute_the_layer_as_the_model_calls_it(make: Any) -> None:
    ready = float_copy(comcat.prepare(make()), "onnxruntime")
    calls = layer_calls(ready, 2, ready.size())
    assert set(calls) == {layer.name for layer in ready.inventory.layers}
    for layer in ready.inventory.layers:
        call = calls[layer.name]
        stack = stack_of(layer, {}, call)
        first, second = stack.layers
        assert [p.shape for p in first.parameters()] == [p.shape for p in layer.module.parameters()]
        assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
        with torch.no_grad():
            one = call.run(first, call.x)
            x = call.x + one if stack.in_a_row else call.x
            wanted = call.run(second, x) + (x if stack.in_a_row else one)
            torch.testing.assert_close(stack(call.x), wanted)


@pytest.mark.parametrize("runtime", [*FILES, "torch"])
def test_files_of_stacks_compute_what_the_stacks_do(runtime: str, tmp_path: Path) -> None:
    needs(runtime)
    ready = float_copy(comcat.prepare(swin(depths=(1, 1))), runtime)
    calls = layer_calls(ready, 2, ready.size())
    for kind in ("attention", "ffn", "head"):
        layer = next(one for one in ready.inventory.layers if one.kind == kind)
        choices = MeasuredWidths(layer, 2, coarse=True).choices[:3]
        assert choices[0] == {}
        call = calls[layer.name]
        for choice, run in zip(
            choices, stack_sessions(layer, choices, call, runtime, "fp32", 1, tmp_path), strict=True
        ):
            with torch.no_grad():
                wanted = stack_of(layer, choice, call)(call.x).numpy()
            (got,) = run(call.x.numpy())
            assert np.abs(got - wanted).max() <= ROUNDING * np.abs(wanted).max()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("runtime", "precision"), [("onnxruntime", "int8"), ("openvino", "int8"), ("onnxruntime", "fp16")]
)
def test_stacks_are_timed_in_the_precision_of_the_file(runtime: str, precision: str, tmp_path: Path) -> None:
    """Of the largest number: 8 bits by tensor in two layers, and fp16."""
    needs(runtime)
    pytest.importorskip("nncf")
    ready = float_copy(comcat.prepare(vit(**WIDE)), runtime)
    layer = next(one for one in ready.inventory.layers if one.kind == "ffn")
    call, choice = layer_calls(ready, 2, ready.size())[layer.name], {"neurons": 24}
    with torch.no_grad():
        wanted = stack_of(layer, choice, call)(call.x).numpy()
    (run,) = stack_sessions(layer, [choice], call, runtime, precision, 1, tmp_path)
    assert run.precision == precision
    (got,) = run(call.x.numpy())
    assert 1e-6 < np.abs(got - wanted).max() / np.abs(wanted).max() < 0.1


def test_wide_parts_are_timed_at_widths_of_matrix_units() -> None:
    model = vit(embed_dim=96, num_heads=3, mlp_ratio=4.0, dtype=torch.float32)
    found = {layer.kind: MeasuredWidths(layer, 8, coarse=True) for layer in comcat.prepare(model).inventory.layers}
    axes = {parts: widths for one in found.values() for parts, widths in one.axes}
    assert all(width % 32 == 0 for width in axes[("neurons",)][0])
    assert axes[("qk", "vo")] == ((8, 16, 24, 32), (8, 16, 24, 32))
    assert axes[("fc1",)][0] == (8, 16, 24, 32, 40, 48, 56, 72)


@pytest.mark.parametrize(("runtime", "precision"), [("onnxruntime", "fp32"), ("openvino", "int8")])
def test_a_table_says_where_it_was_measured(runtime: str, precision: str, host: nn.Module, tmp_path: Path) -> None:
    needs(runtime)
    if precision == "int8":
        pytest.importorskip("nncf")
    seen: list[Any] = []
    how: dict[str, Any] = {"runtime": runtime, "precision": precision, "threads": 1}
    table = comcat.measure_latency(host, 2, widths=2, rounds=1, progress=lambda *args: seen.append(args), **how)
    assert (table.runtime, table.precision, table.threads, table.batch_size) == (runtime, precision, 1, 2)
    assert table.version[0].isdigit()
    assert f"in {runtime} and {precision}" in repr(table)
    assert seen == [("latency", i + 1, len(table.layers)) for i in range(len(table.layers))]
    assert sum(layer.count for layer in table.layers.values()) == len(comcat.prepare(host).inventory.layers)
    assert comcat.plan(host, comcat.Budget(params=0.7), latency=table).estimate["latency"] > 0
    table.save(tmp_path / "latency.json")
    assert LatencyTable.load(tmp_path / "latency.json") == table


def test_pytorch_is_a_runtime_too(host: nn.Module) -> None:
    table = comcat.measure_latency(host, widths=2, rounds=1, runtime="torch", precision="bf16", threads=1)
    assert (table.runtime, table.precision, table.dtype, table.threads) == ("torch", "bf16", "bfloat16", 1)
    assert next(host.parameters()).dtype == torch.float64


# -- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_of_the_first_format_is_of_pytorch(table: LatencyTable, tmp_path: Path) -> None:
    data = {**table.to_dict(), "comcat_latency": 1}
    for name in ("runtime", "precision", "version"):
        del data[name]
    (tmp_path / "old.json").write_text(json.dumps(data))
    old = LatencyTable.load(tmp_path / "old.json")
    assert (old.runtime, old.precision, old.version) == ("torch", "float64", table.torch)
    assert old.layers == table.layers


def made_up(table: LatencyTable, dense: int, layer: int, times: tuple[int, ...]) -> LatencyTable:
    """One kind of two layers, of these times at widths 1 and 2, in a model of ``dense`` nanoseconds."""
    return replace(table, dense=dense, layers={"a": LayerTimes(2, layer, (Grid(("rank",), ((1, 2),), times),))})


def test_a_corrected_table_saves_as_much_more(table: LatencyTable) -> None:
    before = made_up(table, 1000, 300, (100, 250))
    after = before.corrected(0.5)
    assert (after.dense, after.layers["a"]) == (1000, LayerTimes(2, 150, (Grid(("rank",), ((1, 2),), (50, 125)),)))
    saved = [one.layers["a"].dense - one.layers["a"].at({"rank": np.array([1, 2])}) for one in (before, after)]
    assert saved[1].tolist() == [0.5 * n for n in saved[0]]


def test_layers_do_not_take_longer_than_the_model(table: LatencyTable) -> None:
    """What single layers have too much is taken off all their times alike, so that they save what they did."""
    for dense, off in ((600, 0), (500, 50), (1, 99)):
        settled = made_up(table, dense, 300, (100, 250)).settled().layers["a"]
        assert (settled.dense, settled.grids[0].times) == (300 - off, (100 - off, 250 - off))


# -- planning ---------------------------------------------------------------------------------------------------------


def with_pairs(table: LatencyTable, share: float) -> LatencyTable:
    """A low-rank pair of any rank takes this share of what its FFN takes."""
    layers = {}
    for key, layer in table.layers.items():
        grids = tuple(
            replace(grid, times=tuple(int(share * layer.dense) for _ in grid.times))
            if grid.parts[0] in ("fc1", "fc2") else grid
            for grid in layer.grids
        )  # fmt: skip
        layers[key] = replace(layer, grids=grids)
    return replace(table, layers=layers)


@pytest.mark.parametrize(("share", "pairs"), [(0.98, False), (0.1, True)])
def test_the_planner_learns_what_thin_pairs_cost(
    host: nn.Module, table: LatencyTable, share: float, pairs: bool
) -> None:
    budget = comcat.Budget(latency=0.7)
    latency = with_pairs(table, share)
    plan = comcat.plan(host, budget, calibrated(host, 32), "spectrum", ("ffn",), 1, latency=latency)
    parts = {part for choice in plan.layers.values() for part in choice}
    assert ("fc1" in parts or "fc2" in parts) == pairs


# -- meeting a budget -------------------------------------------------------------------------------------------------


class MadeUpClock:
    """Models that save ``share`` of what a plan by the first table promises."""

    def __init__(self, table: LatencyTable, host: nn.Module, share: float) -> None:
        self.table, self.share = table, share
        self.shapes = {layer.name: layer for layer in comcat.prepare(host).inventory.layers}
        self.ready = comcat.prepare(host)

    def measure(self, small: nn.Module, plan: comcat.Plan, budget: int) -> Realized:
        shapes = self.ready.shapes(self.table.input_size)
        saved = sum(
            int(self.table.cost(self.shapes[name], shapes[name], {}))
            - int(self.table.cost(self.shapes[name], shapes[name], choice))
            for name, choice in plan.layers.items()
        )
        kept = 1 - self.share * saved / self.table.dense
        whole = self.table.dense
        return Realized(1.0, kept, kept, kept, kept, plan.estimate["latency"] / whole, budget / whole)


def planned(host: nn.Module, table: LatencyTable, kept: float) -> comcat.Plan:
    return comcat.plan(host, comcat.Budget(latency=kept), rank_multiple=1, latency=table)


@pytest.mark.parametrize(("share", "attempts"), [(1.0, 1), (0.8, 2), (1.25, 2)])
def test_a_budget_is_met_by_what_was_measured(
    host: nn.Module, table: LatencyTable, share: float, attempts: int
) -> None:
    clock: Any = MadeUpClock(table, host, share)
    budget, wanted = round(0.7 * table.dense), 0.7
    first = planned(host, table, wanted)
    found = realize(clock, first, budget, lambda plan: (host, plan), lambda new: planned(host, new, wanted))
    assert found.realized.met
    assert abs(found.realized.kept / wanted - 1) <= 0.05
    assert len(found.tried) == attempts
    assert found.built is found.plan
    assert found.tried[-1] is found.realized
    assert found.tried[0].planned == pytest.approx(first.estimate["latency"] / table.dense)


def test_what_cannot_be_met_ends_with_the_closest(host: nn.Module, table: LatencyTable) -> None:
    clock: Any = MadeUpClock(table, host, 0.3)
    budget, first = round(0.6 * table.dense), planned(host, table, 0.6)

    def out_of_reach(new: LatencyTable) -> comcat.Plan:
        raise BudgetError("out of reach")

    for replan in (None, out_of_reach, lambda new: first):
        found = realize(clock, first, budget, lambda plan: (host, plan), replan)
        assert not found.realized.met
        assert found.plan is first
        assert len(found.tried) == (3 if replan not in (None, out_of_reach) else 1)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "tensorrt"}, "unknown runtime 'tensorrt'; choose from torch"),
        ({"runtime": "torch", "precision": "int8"}, "torch does not compute in 'int8' here"),
        ({"runtime": "torch", "threads": 0}, "threads is 0"),
    ],
)
def test_measuring_elsewhere_is_refused(host: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ComcatError, match=message):
        comcat.measure_latency(host, **options)


def test_a_runtime_that_is_missing_says_how_to_get_it(host: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.registry, "find_spec", lambda name: None)
    with pytest.raises(ComcatError, match=r"pip install 'comcat\[openvino\]'"):
        comcat.measure_latency(host, runtime="openvino")
