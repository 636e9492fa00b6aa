"""A model is looked at once, whatever is done with it afterwards."""

from collections import Counter
from typing import Any

import pytest
import torch

import comcat
from comcat import Budget, prepared
from conftest import calibrated, images, vit
from test_cli import compress, place  # noqa: F401 - a fixture


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the expensive looks at a dense model happen."""
    counts: Counter[str] = Counter()

    def counting(name: str) -> None:
        original = getattr(prepared, name)

        def call(*args: Any) -> Any:
            counts[name] += 1
            return original(*args)

        monkeypatch.setattr(prepared, name, call)

    for name in ("proven_layers", "check_finite", "profile", "layer_shapes"):
        counting(name)
    return counts


def test_python_calls_share_one_look(counted: Counter[str]) -> None:
    model = vit()
    calibration = calibrated(vit())
    counted.clear()
    ready = comcat.prepare(model)
    comcat.check_budget(ready, Budget(params=0.6))
    plan = comcat.plan(ready, Budget(params=0.6), calibration, method="spectrum")
    small = comcat.compress(ready, plan, calibration)
    assert counted == {"proven_layers": 1, "check_finite": 1, "profile": 1, "layer_shapes": 1}
    assert small.comcat.report.params_after == plan.estimate["params"]
    comcat.compress_(ready, plan, calibration)
    assert counted == {"proven_layers": 1, "check_finite": 1, "profile": 1, "layer_shapes": 1}


def test_the_command_looks_once(counted: Counter[str], place: Any, tmp_path: Any) -> None:  # noqa: F811
    result = compress(place, tmp_path / "small", "--keep", 0.6, "--calibration-images", 16)
    assert result.code == 0, result.err
    assert counted["proven_layers"] == counted["check_finite"] == counted["profile"] == 1


def test_a_copy_is_the_same_without_another_look(counted: Counter[str]) -> None:
    model = vit()
    ready = comcat.prepare(model)
    plan = comcat.full_rank_plan(ready)
    small = comcat.compress(ready, plan)
    assert not hasattr(model, "comcat")
    with torch.no_grad():
        torch.testing.assert_close(small(images(model)), model(images(model)), rtol=1e-9, atol=1e-9)
    assert counted["proven_layers"] == 1


def test_after_compressing_in_place_it_looks_again() -> None:
    model = vit()
    ready = comcat.prepare(model)
    comcat.compress_(ready, comcat.Plan({"blocks.0.attn": {"qk": 2, "vo": 2}}))
    assert ready.inventory.layers[0].name == "blocks.0.mlp"
    with pytest.raises(comcat.PlanError, match=r"'blocks\.0\.attn' \(LowRankAttention\) cannot be reduced: already"):
        comcat.compress_(ready, comcat.Plan({"blocks.0.attn": {"vo": 1}}))
