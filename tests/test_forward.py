"""Models that are not called as model(images): one function says how, from the statistics to the scores."""

import pytest
import torch
from torch import Tensor, nn

import comcat
from comcat.errors import ModelError
from conftest import images, vit

pytestmark = pytest.mark.usefixtures("no_source")


class Scaled(nn.Module):
    """Called with images it returns nothing of use; its answer is elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.body = vit(dtype=torch.float32)
        self.num_classes = 11

    def encode(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        self.body(x)
        return x.sum()


def encode(model: nn.Module, x: Tensor) -> Tensor:
    return model.encode(x)


def test_from_calibration_to_scores() -> None:
    model = Scaled().eval()
    x = images(model.body, 31)
    plain = comcat.calibrate(model.body, x.split(8), fisher=True, probe_images=9)
    found = comcat.calibrate(model, x.split(8), fisher=True, probe_images=9, forward=encode)
    for site, moments in found.moments.items():
        for name, moment in moments.items():
            torch.testing.assert_close(moment, plain.moments[site.removeprefix("body.")][name])
    budget, parts = comcat.Budget(params=0.8, of="parts"), ("qk", "vo", "ffn")
    expected = comcat.plan(model.body, budget, plain, "probe", parts)
    plan = comcat.plan(model, budget, found, "probe", parts, forward=encode)
    assert plan.layers == {f"body.{name}": choice for name, choice in expected.layers.items()}
    assert plan.estimate["divergence"] == pytest.approx(expected.estimate["divergence"], rel=1e-4)
    small = comcat.compress(model, plan, found)
    labels = torch.arange(31) % 11
    data = list(zip(x.split(8), labels.split(8), strict=True))
    assert comcat.evaluate(small, data, forward=encode).loss == pytest.approx(comcat.evaluate(small.body, data).loss)
    assert comcat.agreement(small, model, data, forward=encode).kl == pytest.approx(
        comcat.agreement(small.body, model.body, data).kl, rel=1e-4
    )


def test_without_it_such_a_model_is_refused() -> None:
    model = Scaled().eval()
    with pytest.raises(ModelError, match=r"a tensor of shape \(\).*not one result an image"):
        comcat.calibrate(model, [images(model.body)])
