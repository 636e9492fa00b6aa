"""Accuracy against hand-counted answers; modes restored; refusals."""

from importlib import import_module

import pytest
import torch
from torch import nn

from comcat.errors import DataError, ModelError
from comcat.evaluation.measure import agreement, evaluate
from comcat.evaluation.speed import throughput


class Answers(nn.Module):
    """Returns its input as logits, so that every answer is known."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))
        self.dropout = nn.Dropout(0.9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(x[:, :, 0, 0]) + self.shift


def batches(logits: torch.Tensor, labels: torch.Tensor, size: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(logits[:, :, None, None].split(size), labels.split(size), strict=True))


def test_counts_and_loss():
    logits = torch.randn(11, 7, generator=torch.Generator().manual_seed(0))
    order = logits.argsort(dim=1, descending=True)
    place = torch.tensor([0, 0, 0, 1, 2, 3, 4, 5, 6, 0, 4])  # where the right answer ranks
    labels = order[torch.arange(11), place]
    result = evaluate(Answers(), batches(logits, labels))
    assert result.top1 == pytest.approx(100 * 4 / 11)
    assert result.top5 == pytest.approx(100 * 9 / 11)
    assert result.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert result.images == 11
    assert result.images_per_second > 0
    assert set(result.to_dict()) == {"top1", "top5", "loss", "images", "images_per_second"}


def test_fewer_than_five_classes():
    logits = torch.tensor([[1.0, 2.0, 0.0], [3.0, 1.0, 2.0]])
    result = evaluate(Answers(), batches(logits, torch.tensor([0, 0])))
    assert (result.top1, result.top5) == (50.0, 100.0)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_dropout_off(training):
    model = Answers().train(training)
    model.dropout.train(not training)
    result = evaluate(model, batches(torch.eye(5), torch.arange(5)))
    assert result.top1 == 100.0
    assert (model.training, model.dropout.training) == (training, not training)


def test_generator_without_length_and_progress():
    seen = []
    data = batches(torch.eye(5), torch.arange(5), size=2)
    evaluate(Answers(), iter(data), progress=lambda *args: seen.append(args))
    assert seen == [("evaluate", 1, None), ("evaluate", 2, None), ("evaluate", 3, None)]
    evaluate(Answers(), iter(data[:1]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_logits(bad):
    with pytest.raises(ModelError, match=r"NaN or infinite.*Check the weights"):
        evaluate(Answers(shift=bad), batches(torch.eye(3), torch.arange(3)))


@pytest.mark.parametrize(
    ("labels", "message"), [([0, 1, 3], r"label 3 is none .* 3 outputs"), ([0, -1, 2], "no label")]
)
def test_wrong_labels(labels, message):
    with pytest.raises(DataError, match=message):
        evaluate(Answers(), batches(torch.eye(3), torch.tensor(labels)))


def test_nothing_to_evaluate():
    with pytest.raises(DataError, match="no images"):
        evaluate(Answers(), [])
    with pytest.raises(DataError, match="batches of"):
        evaluate(Answers(), [torch.zeros(2, 3, 1, 1)])
    with pytest.raises(ModelError, match=r"not \(batch, classes\)"):
        evaluate(nn.Conv2d(3, 3, 1), batches(torch.eye(3), torch.arange(3)))


def test_agreement():
    data = batches(torch.eye(4), torch.arange(4))
    same = agreement(Answers(), Answers(), data)
    assert (same.same, same.images) == (100.0, 4)
    assert same.kl == pytest.approx(0, abs=1e-6)

    class Reversed(Answers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).flip(1)

    other = agreement(Reversed(), Answers(), [x for x, _ in data])  # labels are not needed
    assert other.same == 0.0
    # KL(p || q) of softmax(1, 0, 0, 0) against its permutation: (p1 - p0) * 1.
    p = torch.tensor([1.0, 0, 0, 0]).softmax(0)
    assert other.kl == pytest.approx(float(p[0] - p[1]), rel=1e-5)


def test_throughput_in_turns(monkeypatch):
    clock = [0.0]
    turns = []

    class Takes(Answers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seconds = float(self.shift)
            clock[0] += seconds if seconds in turns else 100  # the first pass warms up
            turns.append(seconds)
            return super().forward(x)

    monkeypatch.setattr(import_module("comcat.evaluation.speed"), "now", lambda device: clock[0])
    assert throughput([Takes(0.5), Takes(2.0)], torch.randn(64, 300, 1, 1), seconds=0) == [128, 32]
    assert turns == [0.5, 2] * 4
