"""Held-out images: what is kept from the statistics, and the method that they choose."""

import re

import pytest
import torch

import comcat
from comcat.calibration.sampling import HeldOut
from comcat.errors import BudgetError, CalibrationError, PlanError
from comcat.layers.base import PARTS
from comcat.models.batches import Batch
from comcat.planning.choice import comparison, divergences
from comcat.planning.planner import Planner
from comcat.rank_search.start import best_training_free
from conftest import images, vit

pytestmark = pytest.mark.usefixtures("no_source")


@pytest.fixture(scope="module")
def host() -> torch.nn.Module:
    return vit(dtype=torch.float32)


@pytest.fixture(scope="module")
def calibration(host: torch.nn.Module) -> comcat.Calibration:
    return comcat.calibrate(host, images(host, 311, seed=2).split(37), fisher=True, probe_images=14)


@pytest.mark.parametrize("size", [1, 7, 37, 311])
def test_kept_images_do_not_depend_on_the_batches(size: int) -> None:
    x = torch.arange(311.0)[:, None, None, None]
    held = HeldOut(5)
    left = [held.take(Batch.of_images(batch)) for batch in x.split(size)]
    rest, batch = torch.cat([one.pixels for one in left if one is not None]), held.joined()
    assert batch is not None
    kept = batch.pixels
    assert kept.flatten().tolist() == [256, 260, 264, 268, 272]
    assert sorted([*kept.flatten().tolist(), *rest.flatten().tolist()]) == list(range(311))
    assert held.seen == 311


def test_statistics_are_those_of_the_other_images(host: torch.nn.Module) -> None:
    x = images(host, 263, seed=2)
    rest = torch.ones(263, dtype=torch.bool)
    rest[[256, 260]] = False
    found = comcat.calibrate(host, x.split(1), probe_images=300, held_out=10)
    same = comcat.calibrate(host, x[rest].split(32), held_out=0)
    assert found.held_out is not None
    assert torch.equal(found.held_out, x[[256, 260]])
    assert (found.num_images, len(found.images)) == (263, 261)  # none of them is probed with
    for site, moments in same.moments.items():
        for name, moment in moments.items():
            torch.testing.assert_close(
                found.moments[site][name], moment, rtol=1e-5, atol=1e-5 * float(moment.abs().max())
            )
    assert found.shapes == same.shapes


@pytest.mark.parametrize(("count", "options"), [(256, {}), (300, {"held_out": 0}), (300, {"probe_images": 0})])
def test_nothing_is_kept_of_few_images_or_unasked(host: torch.nn.Module, count: int, options: dict[str, int]) -> None:
    assert comcat.calibrate(host, images(host, count).split(100), **options).held_out is None


def test_the_plan_that_diverges_least_is_taken(host: torch.nn.Module, calibration: comcat.Calibration) -> None:
    assert calibration.held_out is not None
    assert len(calibration.held_out) == 7
    budget = comcat.Budget(params=0.6)
    plan = comcat.plan(host, budget, calibration)
    by_method = {name: plan.estimate[f"divergence_{name}"] for name in ("uniform", "spectrum", "probe")}
    assert plan.method == min(by_method, key=by_method.__getitem__)
    assert plan.estimate["divergence"] == by_method[plan.method] > 0
    assert len(set(by_method.values())) > 1
    planner = Planner(comcat.prepare(host), budget, calibration, "uniform", PARTS, 1, None, None)
    for name, value in by_method.items():
        other = comcat.plan(host, budget, calibration, name)
        assert divergences(planner, [other], calibration.held_out) == pytest.approx([value], rel=1e-4)
    assert plan.layers == comcat.plan(host, budget, calibration, plan.method).layers
    assert comcat.Plan.from_json(plan.to_json()) == plan
    assert comparison(comcat.plan(host, budget, calibration, "probe")) is None
    for name, value in by_method.items():
        assert f"{value:.4g}" in str(comparison(plan))
        assert (f"widths by {name}" in str(comparison(plan))) == (name == plan.method)
    assert best_training_free(host, budget, calibration).layers == plan.layers


def test_probing_that_takes_too_long_is_left_out(
    host: torch.nn.Module, calibration: comcat.Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comcat.planning.choice.AFFORDABLE", {"cpu": 0, "other": 0})
    calibration.probes.clear()
    plan = comcat.plan(host, comcat.Budget(params=0.6), calibration)
    assert "divergence_probe" not in plan.estimate
    comcat.plan(host, comcat.Budget(params=0.6), calibration, "probe")
    assert "divergence_probe" in comcat.plan(host, comcat.Budget(params=0.6), calibration).estimate  # known by now


def test_a_budget_that_one_method_cannot_meet(host: torch.nn.Module, calibration: comcat.Calibration) -> None:
    def smallest(method: str) -> int:
        with pytest.raises(BudgetError, match="out of reach") as found:
            comcat.plan(host, comcat.Budget(params=2), calibration, method)
        return int(re.findall(r"is ([\d,]+) params", str(found.value))[0].replace(",", ""))

    assert smallest("spectrum") == smallest("auto") < smallest("uniform")  # which leaves the classifier dense
    plan = comcat.plan(host, comcat.Budget(params=smallest("uniform") - 1), calibration)
    assert plan.method != "uniform"
    assert "divergence_uniform" not in plan.estimate


def test_auto_needs_held_out_images(host: torch.nn.Module) -> None:
    few = comcat.calibrate(host, [images(host, 20)], fisher=True)
    assert comcat.plan(host, comcat.Budget(params=0.7), few).method == "spectrum"
    for calibration in (few, None):
        with pytest.raises(PlanError, match=r"on images that the statistics have not seen.*more than 256 images"):
            comcat.plan(host, comcat.Budget(params=0.7), calibration, "auto")


def test_held_out_images_are_saved(host: torch.nn.Module, calibration: comcat.Calibration, tmp_path) -> None:
    calibration.save(tmp_path / "c")
    again = comcat.Calibration.load(tmp_path / "c")
    assert torch.equal(again.held_out, calibration.held_out)
    assert again.moments.keys() == calibration.moments.keys()
    calibration = comcat.Calibration(**{**again.__dict__, "held_out": again.held_out[:, :, :7]})
    calibration.save(tmp_path / "c")
    with pytest.raises(CalibrationError, match=r"damaged: its images have shape \(7, 3, 7, 21\)"):
        comcat.Calibration.load(tmp_path / "c")
