"""The parts of the fine-tuning engine, each against what is written in its docstring."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from comcat import FinetuneConfig, TrainingError
from comcat.training import state
from comcat.training.average import Average
from comcat.training.block_outputs import Features, block_names
from comcat.training.log import Log
from comcat.training.losses import feature_loss, hard_distillation, soft_distillation, terms
from comcat.training.randomness import get_state, isolated, seed_all, set_state
from comcat.training.schedule import Steps, fall, learning_rate
from comcat.training.state import Saved
from conftest import images, swin, vit


def logits(seed: int, count: int = 5, classes: int = 7) -> torch.Tensor:
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- losses ---------------------------------------------------------------------------------------------------


def test_soft_distillation_is_the_divergence_times_the_square_of_the_temperature():
    student, teacher, T = logits(0), logits(1), 3.0
    p, q = (teacher / T).softmax(-1), (student / T).softmax(-1)
    expected = T**2 * (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(soft_distillation(student, teacher, T), expected)
    assert float(soft_distillation(student, student + 2.5, T)) == pytest.approx(0, abs=1e-14)


def test_hard_distillation_is_the_cross_entropy_with_the_teachers_answer():
    student, teacher = logits(0), logits(1)
    rows = torch.arange(5)
    expected = -student.log_softmax(-1)[rows, teacher.argmax(-1)].mean()
    torch.testing.assert_close(hard_distillation(student, teacher), expected)


def test_the_terms_add_up_as_written():
    student, teacher, labels = logits(0), logits(1), torch.tensor([1, 2, 3, 5, 0])
    config = FinetuneConfig(distillation="hard", distillation_weight=0.3, label_smoothing=0.2, feature_weight=5.0)
    found = terms(config, student, labels, teacher, torch.tensor(0.7, dtype=torch.float64), 0.5)
    smooth = 0.8 * F.one_hot(labels, 7) + 0.2 / 7
    labelled = -(smooth * student.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(found.labels, labelled)
    torch.testing.assert_close(found.distillation, hard_distillation(student, teacher))
    torch.testing.assert_close(found.loss, 0.7 * labelled + 0.3 * found.distillation + 5.0 * 0.5 * 0.7)


def test_the_second_classifier_learns_from_the_teacher():
    first, second, teacher, labels = logits(0), logits(1), logits(2), torch.tensor([1, 2, 3, 5, 0])
    config = FinetuneConfig(distillation="soft", label_smoothing=0)
    found = terms(config, (first, second), labels, teacher)
    torch.testing.assert_close(found.labels, F.cross_entropy(first, labels))
    torch.testing.assert_close(found.distillation, soft_distillation(second, teacher, 1.0))


def test_without_a_teacher_the_labels_are_the_loss():
    found = terms(FinetuneConfig(distillation="none"), logits(0), torch.tensor([1, 2, 3, 5, 0]))
    assert found.loss is found.labels
    assert found.distillation == found.features == 0


def test_mixed_labels_are_not_smoothed_again():
    target = logits(3).softmax(-1)
    found = terms(FinetuneConfig(distillation="none", label_smoothing=0.3), logits(0), target)
    torch.testing.assert_close(found.loss, -(target * logits(0).log_softmax(-1)).sum(-1).mean())


@pytest.mark.parametrize("host", [vit, swin])
def test_features_of_identical_models_agree(host):
    model, other = host(), host()
    names = block_names(model, (0, -1))
    assert names == block_names(model, (0, -1, 0))
    hooks = [Features(model, names), Features(other, names)]
    model(images(model)), other(images(model))
    ours, theirs = (h.take() for h in hooks)
    assert list(ours) == names
    assert feature_loss(ours, theirs) == 0
    assert hooks[0].take() == {}
    for h in hooks:
        h.remove()
    model(images(model))
    assert hooks[0].take() == {}


def test_a_block_that_does_not_exist():
    with pytest.raises(TrainingError, match="block 2, but the teacher has 2: 0 to 1"):
        block_names(vit(), (2,))


# -- schedule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup", "total"), [(0, 11), (3, 11), (10, 11), (0, 1), (0, 2)])
def test_learning_rate_from_the_warm_up_to_the_last_step(warmup, total):
    steps = Steps(batches=11, accumulate=1, total=total, warmup=warmup)
    rates = [learning_rate(step, steps, 1e-3, 1e-5) for step in range(total)]
    assert rates[warmup] == pytest.approx(1e-3)
    assert rates[:warmup] == pytest.approx([1e-3 * (k + 1) / max(1, warmup) for k in range(warmup)])
    if total - warmup > 1:
        assert rates[-1] == pytest.approx(1e-5)
    assert all(a > b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))


def test_steps_of_fractions_of_epochs_and_windows():
    steps = Steps.of(FinetuneConfig(epochs=2.5, accumulate=3, warmup_epochs=0.5), batches=7)
    assert (steps.per_epoch, steps.total, steps.warmup) == (3, 8, 2)
    assert [steps.position(s) for s in range(5)] == [(0, 0), (0, 3), (0, 6), (1, 0), (1, 3)]
    assert [steps.window(b) for b in (0, 3, 6)] == [3, 3, 1]
    assert steps.evaluations(1.0) == {3, 6, 8}
    assert steps.evaluations(None) == {8}
    assert Steps.of(FinetuneConfig(max_steps=2), batches=7).total == 2


def test_the_factor_of_the_features_falls_to_zero():
    for form in ("cosine", "linear"):
        assert (fall(0, form), fall(1, form)) == (1, pytest.approx(0))
        assert fall(0.5, form) == pytest.approx(0.5)
    assert fall(1, "none") == 1


# -- configuration --------------------------------------------------------------------------------------------


def test_configuration_survives_plain_data():
    config = FinetuneConfig(feature_blocks=(0, -1), ema=0.99, layer_decay=0.7, betas=(0.8, 0.9))
    assert FinetuneConfig.from_dict(config.to_dict()) == config
    assert FinetuneConfig.from_dict({"lr": "1e-3"}).lr == 1e-3  # what YAML makes of it


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "no setting 'epoch'; did you mean epochs"),
        ({"zzz": 3}, "the fields are epochs"),
        ({"epochs": 0}, "epochs and lr must be above 0"),
        ({"epochs": True}, "epochs is True, but must be a number"),
        ({"lr": "fast"}, "lr is 'fast', but must be a number"),
        ({"lr": math.inf}, "lr is inf"),
        ({"lr": 1e-7}, "min_lr 1e-06 is above lr 1e-07"),
        ({"accumulate": 0}, "accumulate is 0, but must be at least 1"),
        ({"accumulate": 1.5}, "must be a whole number"),
        ({"mixup_prob": 1.5}, "at most 1"),
        ({"label_smoothing": 1}, "below 1"),
        ({"betas": [0.9]}, "betas has 1 values"),
        ({"betas": 0.9}, "must be a list of numbers"),
        ({"feature_blocks": ["a"]}, "feature_blocks is 'a', but must be a whole number"),
        ({"precision": "fp8"}, "precision is 'fp8'; choose one of no, bf16, fp16"),
        ({"compile": 1}, "must be true or false"),
    ],
)
def test_wrong_configuration(values, message):
    with pytest.raises(TrainingError, match=message):
        FinetuneConfig.from_dict(values)


# -- average, randomness, files -------------------------------------------------------------------------------


def test_the_average_is_the_recursion_with_its_warm_up():
    model = torch.nn.Linear(3, 2)
    expected = [p.detach().clone() for p in model.parameters()]
    average = Average(model, decay=0.5)
    for step in range(9):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, model.parameters(), strict=True)]
    own = [p.detach().clone() for p in model.parameters()]
    with average.swapped():
        for p, e in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach(), e)
    assert all(torch.equal(p, o) for p, o in zip(model.parameters(), own, strict=True))


def draw() -> tuple:
    numpy = np.random.mtrand._rand  # the global generator
    return random.random(), numpy.rand(), numpy.randn(), torch.rand(()).item(), random.gauss(0, 1)


def test_isolated_draws_depend_on_their_key_alone():
    seed_all(1)
    expected = draw()
    seed_all(1)
    with isolated(0, 5, 3):
        first = draw()
    assert draw() == expected
    with isolated(0, 5, 4):
        second = draw()
    with isolated(0, 5, 3):
        assert draw() == first
    assert first != second


def test_random_state_comes_back():
    seed_all(2)
    draw()
    tensors, plain = get_state(torch.device("cpu"))
    expected = draw()
    draw()
    set_state(tensors, plain, torch.device("cpu"))
    assert draw() == expected


def test_checkpoints_rotate_and_leave_nothing_half_written(tmp_path):
    for step in (1, 5, 20, 100000000):
        state.write(tmp_path, Saved(step, {"model": {"w": torch.full((2, 3), step)}}, {"a": [1.5, None]}), keep=2)
    (tmp_path / "checkpoints" / ".step-00000007.tmp").mkdir()
    (tmp_path / "checkpoints" / "notes").mkdir()
    state.clean(tmp_path)
    assert [step for step, _ in state.checkpoints(tmp_path)] == [100000000, 20]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-100000000", "step-00000020", "notes"}
    saved = state.read(state.checkpoints(tmp_path)[1][1])
    assert saved.step == 20
    assert torch.equal(saved.tensors["model"]["w"], torch.full((2, 3), 20))
    assert saved.plain["a"] == [1.5, None]


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path, monkeypatch):
    state.write(tmp_path, Saved(1, {"model": {"w": torch.ones(2)}}, {}), keep=2)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "_write", full)
    with pytest.raises(state.CheckpointError, match="No space left on device; make room and continue with --resume"):
        state.write(tmp_path, Saved(2, {"model": {"w": torch.ones(2)}}, {}), keep=2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_the_log_drops_later_and_torn_lines(tmp_path, monkeypatch):
    notes = []
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    log = Log(tmp_path, 0, notes.append)
    for step in (1, 2, 3):
        log.write(step, step / 10, {"loss": math.inf if step == 2 else 0.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "epo')
    log = Log(tmp_path, 2, notes.append)
    log.write(3, 0.3, {"evaluation": {"top1": 50.0}})
    log.sync(), log.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 1, "epoch": 0.1, "loss": 0.5}',
        '{"step": 2, "epoch": 0.2, "loss": null}',
        '{"step": 3, "epoch": 0.3, "evaluation": {"top1": 50.0}}',
    ]
    assert "TensorBoard" in notes[0]
