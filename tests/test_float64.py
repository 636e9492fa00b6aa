"""Devices without float64: closed forms run on the host, and what is built is on the device again."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from comcat.hosts import find_layers
from comcat.layers import attention_factors, factors, ffn, gates, heads
from comcat.linalg import factorize, rotary
from comcat.models import running
from conftest import calibrated, vit

MODULES = (factorize, rotary, factors, attention_factors, ffn, heads, gates)


def test_wide_is_the_host_where_there_is_no_float64() -> None:
    assert running.wide("cpu") == torch.device("cpu")
    assert running.wide("cuda:1") == torch.device("cuda:1")
    assert running.wide("mps") == torch.device("cpu")


@pytest.mark.parametrize("module", MODULES)
def test_closed_forms_ask_for_float64_in_one_place(module: Any) -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "double"]


@pytest.mark.parametrize("calibrate", [False, True])
def test_factors_of_a_model_on_such_a_device(calibrate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for one: its tensors have no values, so that the host gets random ones."""
    host = vit(dtype=torch.float32)
    calibration = calibrated(host, fisher=True) if calibrate else None

    def double(x: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=torch.float64) if x.is_meta else x.double()

    monkeypatch.setattr(running, "has_float64", lambda device: device.type != "meta")
    for module in MODULES:
        monkeypatch.setattr(module, "double", double)
    model = host.to("meta")
    moments = calibration.to("meta").moments if calibration is not None else {}
    assert all(moment.device.type == "cpu" for one in moments.values() for moment in one.values())
    for site in find_layers(model).layers:
        for names in ([name for name in site.full if name != "neurons"], ["neurons"] if "neurons" in site.full else []):
            made = site.factors(moments.get(site.name))
            if not names:
                continue
            assert {made.energy(name).device.type for name in names} == {"cpu"}
            built = made.build(dict.fromkeys(names, 2))
            assert {p.device.type for module in built.values() for p in module.parameters()} == {"meta"}
            assert {p.dtype for module in built.values() for p in module.parameters()} == {torch.float32}
            for gate in site.gates(made, tuple(names)):
                assert {t.device.type for t in (*gate.parameters(), *gate.buffers())} == {"meta"}
