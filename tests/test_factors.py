"""Factors of a layer: what cannot be factored is an error about this layer."""

from typing import Any

import pytest
import torch

import comcat
from comcat.errors import CalibrationError
from comcat.hosts import find_layers
from conftest import vit


@pytest.fixture(scope="module")
def site() -> Any:
    return find_layers(vit())["blocks.0.mlp"]


def test_an_indefinite_moment_is_named(site: Any) -> None:
    moments = {
        "x": -torch.eye(site.linears["fc1"].in_features).double(),
        "h": torch.eye(site.linears["fc2"].in_features).double(),
    }
    with pytest.raises(CalibrationError, match=r"'blocks\.0\.mlp': a second moment is not positive semi-definite"):
        site.factors(moments).energy("fc1")


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_decomposition_that_fails_is_named(site: Any, calibrated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    x, h = (torch.eye(linear.in_features).double() for linear in (site.linears["fc1"], site.linears["fc2"]))
    moments = {"x": x, "h": h, "x_mean": x[0], "h_mean": h[0]} if calibrated else None
    what = "moments" if calibrated else "weights"
    for act in (lambda f: f.energy("fc1"), lambda f: f.build({"fc1": 2})):
        with pytest.raises(CalibrationError, match=rf"the {what} of 'blocks\.0\.mlp' are too close to singular"):
            act(site.factors(moments))
    if not calibrated:
        with pytest.raises(CalibrationError, match=r"the weights of 'blocks\.0\.mlp'"):
            comcat.compress(vit(), comcat.Plan({"blocks.0.mlp": {"fc1": 2}}))
