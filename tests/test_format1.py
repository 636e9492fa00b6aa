"""Files of format 1, written before descriptions carried a checksum: they are read for good."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import comcat
from conftest import vit

OLD = Path(__file__).parent / "data" / "format1"


@pytest.fixture(scope="module")
def small() -> torch.nn.Module:
    return comcat.load(OLD / "model")


def test_the_model_computes_what_it_did(small: torch.nn.Module) -> None:
    kept = load_file(OLD / "outputs.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(small(kept["images"]), kept["outputs"], rtol=1e-4, atol=1e-4)


def test_it_can_be_saved_again(small: torch.nn.Module, tmp_path: Path) -> None:
    comcat.save(small, tmp_path / "out")
    again = comcat.load(tmp_path / "out")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in small.state_dict().items())


def test_plan_calibration_and_latency_table(small: torch.nn.Module) -> None:
    plan = comcat.Plan.load(OLD / "plan.json")
    assert plan.layers == small.comcat.plan.layers
    calibration = comcat.Calibration.load(OLD / "calibration.safetensors")
    dense = vit(dtype=torch.float32)
    made = comcat.compress(dense, plan, calibration)
    assert made.comcat.report.params_after == small.comcat.report.params_after
    table = comcat.LatencyTable.load(OLD / "latency.json")
    assert table.batch_size == 1
