"""Metrics of the user's own: in Python, on the command line, and what is said of those that do not work."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import comcat
from comcat.errors import DataError, MetricError
from comcat.evaluation.metric import load_metric
from comcat.evaluation.results import Evaluation
from conftest import images, vit


def batches(model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = images(model, 7)
    return [(x[:5], torch.arange(5)), (x[5:], torch.arange(2))]


def test_a_number_and_several(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit(num_classes=0).train()
    seen = []

    def length(m: nn.Module, loader: Any) -> torch.Tensor:
        seen.append((m.training, torch.is_grad_enabled(), len(loader)))
        return torch.stack([m(x).norm(dim=1).mean() for x, _ in loader]).mean()

    result = comcat.evaluate(model, batches(model), evaluate=length)
    assert seen == [(False, False, 2)]
    assert model.training
    assert (result.outputs, result.images, list(result.metrics)) == ("metric", 7, ["length"])
    assert result.to_dict() == {"outputs": "metric", "images": 7, "metrics": result.metrics}
    json.dumps(result.to_dict(), allow_nan=False)
    again = Evaluation.from_dict(result.to_dict())
    assert [figure.shown() for figure in again.figures()] == [f"{result.metrics['length']:.4f}"]
    several = comcat.evaluate(model, batches(model), evaluate=lambda m, loader: {"a": 1, "b": torch.tensor([2.5])})
    assert several.metrics == {"a": 1.0, "b": 2.5}


def divided(model: nn.Module, loader: Any) -> float:
    return 1 / 0


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (divided, "the metric 'divided' raised ZeroDivisionError: division by zero"),
        (lambda m, loader: float("nan"), "the metric '<lambda>' returned nan, which is no score"),
        (lambda m, loader: None, "returned NoneType, which is no number. Return a float"),
        (lambda m, loader: "12.5", "returned '12.5', which is no number"),
        (lambda m, loader: torch.ones(3), "returned Tensor, which is no number"),
        (lambda m, loader: {"iou": 1.0, "dice": float("inf")}, "returned, as 'dice', inf, which is no score"),
        (lambda m, loader: {}, "returned no score"),
    ],
)
def test_metrics_that_do_not_work(metric: Any, message: str) -> None:
    model = vit()
    with pytest.raises(MetricError) as found:
        comcat.evaluate(model, batches(model), evaluate=metric)
    assert message in str(found.value)


def test_errors_of_comcat_pass() -> None:
    def strict(model: nn.Module, loader: Any) -> float:
        raise DataError("no labels")

    with pytest.raises(DataError, match="no labels"):
        comcat.evaluate(vit(), [], evaluate=strict)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_scores.py").write_text("number = 3\ndef half(model, loader):\n    return 0.5\n")
    (tmp_path / "broken_scores.py").write_text("raise RuntimeError('not today')\n")
    yield tmp_path
    for name in ("own_scores", "broken_scores"):
        sys.modules.pop(name, None)


def test_a_function_of_the_working_directory(place: Path) -> None:
    assert load_metric("own_scores:half")(nn.Identity(), []) == 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_scores", "'own_scores' names no metric: give module:function"),
        ("../own_scores:half", "names no metric"),
        ("own_scores:double", "'own_scores' has no function 'double'"),
        ("own_scores:number", "has no function 'number'"),
        ("json:loads", r"there is no module 'json' in the working directory .*Write json.py there"),
        ("broken_scores:half", "the module of the metric 'broken_scores:half' raised RuntimeError: not today"),
    ],
)
def test_functions_that_cannot_be_had(place: Path, name: str, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        load_metric(name)


def test_a_name_that_is_taken(place: Path) -> None:
    (place / "json.py").write_text("def loads(model, loader): return 1\n")
    with pytest.raises(MetricError, match="its name is taken by another; rename it"):
        load_metric("json:loads")
