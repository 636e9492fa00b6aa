"""Statistics of other weights are told from those of this model, and how far away they are."""

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import comcat
from comcat.calibration.fingerprint import fingerprint
from comcat.errors import CalibrationError
from comcat.hosts import find_layers
from comcat.models.modes import _busy, exclusive
from conftest import calibrated, images, vit

pytestmark = pytest.mark.usefixtures("no_source")


def moved(model: nn.Module, by: float) -> nn.Module:
    """Every parameter moved by a random step of this relative length."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            step = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += by * step * parameter.norm() / step.norm()
    return other


def test_the_distance_is_that_of_the_weights() -> None:
    model = vit()
    calibration = calibrated(model, 8)
    assert calibration.distance(model, find_layers(model)).relative == 0
    for by in (1e-4, 1e-2, 0.5):
        assert calibration.distance(moved(model, by), find_layers(model)).relative == pytest.approx(by, rel=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_threads_change_no_more_than_rounding(dtype: torch.dtype) -> None:
    model = vit(dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        wide = fingerprint(copy.deepcopy(model).double())
    finally:
        torch.set_num_threads(threads)
    for name, sketch in fingerprint(model).items():
        torch.testing.assert_close(sketch, wide[name], rtol=1e-12, atol=1e-12)


def uses(model: nn.Module, calibration: comcat.Calibration) -> list[Any]:
    return [
        lambda: comcat.compress(model, comcat.full_rank_plan(model), calibration),
        lambda: comcat.plan(model, comcat.Budget(params=0.8), calibration),
        lambda: comcat.spectra(model, calibration),
    ]


def test_near_relatives_warn_and_others_are_refused() -> None:
    model = vit()
    calibration = calibrated(model, 24, probe_images=0)
    for use in uses(model, calibration):
        use()
    for use in uses(copy.deepcopy(model).half().double(), calibration):
        with pytest.warns(UserWarning, match=r"differ from those that were calibrated by 0\.0\d* % in"):
            use()
    for use in uses(moved(model, 0.5), calibration):
        with pytest.raises(CalibrationError, match=r"differ .* by \d\d\.?\d? % in .*10 % are allowed.*rebind"):
            use()
    other = moved(model, 0.5)
    calibration.rebind(other)
    comcat.spectra(other, calibration)


def test_permuted_hidden_units_and_heads_are_refused() -> None:
    model = vit()
    calibration = calibrated(model, 8)
    units, heads = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        mlp, attn, order = units.blocks[1].mlp, heads.blocks[0].attn, torch.arange(17).roll(1)
        mlp.fc1.weight.copy_(mlp.fc1.weight[order])
        mlp.fc1.bias.copy_(mlp.fc1.bias[order])
        mlp.fc2.weight.copy_(mlp.fc2.weight[:, order])
        attn.qkv.weight.copy_(attn.qkv.weight.view(3, 3, 5, 15).roll(1, 1).reshape(45, 15).clone())
        attn.qkv.bias.copy_(attn.qkv.bias.view(3, 3, 5).roll(1, 1).flatten().clone())
        attn.proj.weight.copy_(attn.proj.weight.view(15, 3, 5).roll(1, 1).reshape(15, 15).clone())
    for twin, layer in ((units, "blocks.1.mlp"), (heads, "blocks.0.attn")):
        torch.testing.assert_close(twin(images(model)), model(images(model)))
        with pytest.raises(CalibrationError, match=f"'{layer}'"):
            comcat.spectra(twin, calibration)


def test_files_without_a_fingerprint_are_taken(tmp_path: Any) -> None:
    calibration = calibrated(vit(), 8)
    calibration.weights = calibration.outputs = None
    calibration.save(tmp_path / "c")
    again = comcat.Calibration.load(tmp_path / "c")
    assert again.weights is None
    assert again.outputs is None
    comcat.spectra(moved(vit(), 0.5), again)


def test_fingerprint_and_kind_come_back(tmp_path: Any) -> None:
    calibration = calibrated(vit(num_classes=1), 8)
    calibration.save(tmp_path / "c")
    again = comcat.Calibration.load(tmp_path / "c")
    assert again.outputs == "values"
    assert calibration.weights is not None
    assert again.weights is not None
    assert set(again.weights) == set(calibration.weights)
    assert all(torch.equal(again.weights[name], sketch) for name, sketch in calibration.weights.items())
    again.weights["norm.weight"] = torch.zeros(3)
    again.save(tmp_path / "c")
    with pytest.raises(CalibrationError, match="is damaged"):
        comcat.Calibration.load(tmp_path / "c")


def test_probes_of_other_weights_are_measured_again() -> None:
    model = vit()
    calibration = calibrated(model, 24, probe_images=5)
    comcat.plan(model, comcat.Budget(params=0.8), calibration, "probe")
    known = copy.deepcopy(calibration.probes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        comcat.plan(moved(model, 1e-2), comcat.Budget(params=0.8), calibration, "probe")
    assert calibration.probes == known


def test_the_callers_autocast_does_not_reach_the_statistics() -> None:
    model = vit(dtype=torch.float32)
    plain = calibrated(model, 16, fisher=True)
    with torch.autocast("cpu", torch.bfloat16):
        again = calibrated(model, 16, fisher=True)
    for site, moments in plain.moments.items():
        for name, moment in moments.items():
            torch.testing.assert_close(again.moments[site][name], moment, rtol=1e-5, atol=1e-7)


# -- one thread at a time ---------------------------------------------------------------------------------------------


def test_threads_wait_for_a_model_and_its_parts() -> None:
    model = nn.Sequential(vit())
    inside, seen, go = threading.Event(), [], threading.Event()

    def work() -> None:
        inside.set()
        with exclusive(model[0]):
            seen.append("other")
        go.set()

    with exclusive(model):
        thread = threading.Thread(target=work)
        thread.start()
        inside.wait()
        with exclusive(model[0]):  # again, in the same thread
            pass
        seen.append("first")
    assert go.wait(60)
    thread.join()
    assert seen == ["first", "other"]
    assert not _busy


def test_one_model_calibrated_and_probed_in_threads() -> None:
    model = vit()
    expected = calibrated(model, 16, probe_images=5)
    results: list[Any] = []

    def work() -> None:
        calibration = calibrated(model, 16, probe_images=5)
        results.append((calibration, comcat.plan(model, comcat.Budget(params=0.8), calibration, "probe")))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plan = comcat.plan(model, comcat.Budget(params=0.8), expected, "probe")
    assert len(results) == 3
    for calibration, other in results:
        assert other.layers == plan.layers
        for site, moments in expected.moments.items():
            for name, moment in moments.items():
                torch.testing.assert_close(calibration.moments[site][name], moment)
