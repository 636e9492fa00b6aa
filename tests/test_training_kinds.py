"""Training on outputs of every kind: what the loss is, that it falls, how it resumes, what is refused."""

import copy
import json
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import comcat
from comcat import Budget, DataError, FinetuneConfig, ModelError, SearchConfig, TrainingError
from comcat.evaluation.outputs import KINDS, Outputs, Spread, answers, divergence
from comcat.evaluation.tasks import TASKS
from comcat.report import tables
from comcat.training.answers import Answers, unit
from comcat.training.finetune_config import Kind
from comcat.training.losses import Loss
from conftest import calibrated, images, vit
from test_outputs import Wrapped

pytestmark = pytest.mark.usefixtures("no_source")

CONFIG = {
    "max_steps": 16,
    "epochs": 99,
    "lr": 1e-2,
    "warmup_epochs": 0,
    "eval_every": None,
    "log_every": 4,
    "distillation_weight": 0.95,
}


class Segmenter(nn.Module):
    """Per-pixel logits from the last feature map."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body, self.num_classes = vit(num_classes=0), num_classes
        torch.manual_seed(0)
        self.head = nn.Conv2d(15, num_classes, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        maps = self.body.forward_intermediates(x, indices=1, intermediates_only=True)[-1]
        return F.interpolate(self.head(maps), size=x.shape[-2:])


#: kind -> the model, what is said of its outputs, labels (n, ...) from the dense outputs.
HOSTS: dict[str, tuple[Any, str | None, Any]] = {
    "values": (lambda: vit(num_classes=1), None, lambda y: y[:, 0]),
    "labels": (vit, "labels", lambda y: (y > 0).long()),
    "features": (lambda: vit(num_classes=0), "features", None),
    "two features": (lambda: Wrapped(vit(), lambda y, _: (y[:, :3], y[:, 3:])), "features", None),
    "maps": (lambda: Segmenter(5), None, lambda y: y.argmax(1)),
    "depth": (lambda: Segmenter(1), "maps", lambda y: y[:, 0]),
}


def data(model: nn.Module, labels: Any, count: int = 12) -> DataLoader:
    x = images(model, count)
    if labels is None:
        return DataLoader(TensorDataset(x), batch_size=4)
    with torch.no_grad():
        return DataLoader(TensorDataset(x, labels(model(x))), batch_size=4)


def disturbed(model: nn.Module) -> nn.Module:
    """A student near its teacher."""
    student = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "mlp" in name:
                p.mul_(0.7)
    return student


def far(kind: str, dense: nn.Module, student: nn.Module) -> float:
    x = images(dense, 12)
    with torch.no_grad():
        return divergence(kind, *(Outputs(m.eval(), kind)(m(x), len(x)) for m in (dense, student)))


def test_kinds_have_one_list() -> None:
    assert get_args(Kind) == KINDS == tuple(sorted({*TASKS} - {"detections"}, key=KINDS.index))


@pytest.mark.parametrize("name", HOSTS)
def test_a_short_fine_tune_comes_nearer_to_the_teacher_and_resumes(name: str, tmp_path: Any) -> None:
    make, said, labels = HOSTS[name]
    dense = make()
    kind = {"two features": "features", "depth": "values"}.get(name, name)
    loader = data(dense, labels)
    whole, parts = disturbed(dense), disturbed(dense)
    before = far(kind, dense, whole)
    config = FinetuneConfig(**CONFIG, outputs=said, checkpoint_every=7)
    result = comcat.finetune(whole, dense, loader, loader, config, out=tmp_path / "whole", cpu=True)
    assert far(kind, dense, whole) < 0.7 * before
    assert result.final is not None
    assert result.final.outputs == kind
    if name != "labels":  # the teacher is not sure of its answers, which these labels are
        assert result.final.loss < result.history[0].evaluation.loss
    figure = result.final.figures()[0]
    assert figure.value == figure.value  # every kind has a score of its own
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["distillation"] > 0 for line in lines if "loss" in line] == [True] * 4

    def stop(stage: str, done: int, total: int | None) -> None:
        if stage == "train" and done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        comcat.finetune(parts, dense, loader, loader, config, out=tmp_path / "parts", cpu=True, progress=stop)
    comcat.finetune(parts, dense, loader, loader, config, out=tmp_path / "parts", cpu=True, resume=True)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    if name == "labels":
        other = FinetuneConfig(**CONFIG, outputs="classes")
        with pytest.raises(TrainingError, match="outputs was 'labels' and is now 'classes'"):
            comcat.finetune(
                parts, dense, data(dense, lambda y: y.argmax(1)), None, other, out=tmp_path / "parts", resume=True
            )


@pytest.mark.parametrize("name", ["values", "labels", "maps"])
def test_labels_alone_teach_too(name: str) -> None:
    make, said, labels = HOSTS[name]
    dense = make()
    student, loader = disturbed(dense), data(dense, labels)
    config = FinetuneConfig(**CONFIG, outputs=said, distillation="none")
    result = comcat.finetune(student, None, loader, loader, config, cpu=True)
    assert result.final is not None
    assert result.final.loss < result.history[0].evaluation.loss


def text(renderable: Any) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_soft_loss_is_the_divergence_of_the_kind(kind: str) -> None:
    shape = (7, 3, 2, 5) if kind == "maps" else (7, 3)
    teacher, student = drawn(*shape), drawn(*shape, seed=1)
    spread = Spread(kind)
    spread.add([teacher])
    loss = Loss(kind, spread.result() if kind in ("values", "features") else None)
    torch.testing.assert_close(
        loss.soft([student], [teacher]), torch.tensor(divergence(kind, [teacher], [student]), dtype=torch.float64)
    )
    if kind not in ("values", "features"):  # T² KL has the same small-difference limit at every temperature
        near = teacher + 1e-3 * student
        ratio = loss.soft([near], [teacher], 50.0) / loss.soft([near / 50], [teacher / 50])
        assert float(ratio) == pytest.approx(2500)


def test_label_terms_are_those_written_out() -> None:
    output, truth = drawn(7, 3), (drawn(7, 3, seed=2) > 0).double()
    p = output.sigmoid()
    expected = -(truth * p.log() + (1 - truth) * (1 - p).log()).sum(1).mean()
    torch.testing.assert_close(Loss("labels").labelled(output, truth), expected)
    torch.testing.assert_close(Loss("labels").hard(output, 2 * truth - 1), expected)
    maps, classes = drawn(2, 3, 4, 5), torch.arange(40).view(2, 4, 5) % 3
    classes[0, 0, :3] = 255  # pixels that count for nothing
    valid = classes != 255
    expected = F.cross_entropy(answers(maps)[valid.flatten()], classes[valid])
    torch.testing.assert_close(Loss("maps").labelled(maps, classes), expected)
    assert Loss("maps").labelled(maps, torch.full_like(classes, 255)) == 0
    spread = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    expected = ((output - truth).square().mean(0) / spread).mean()
    torch.testing.assert_close(Loss("values", [spread]).labelled(output, truth), expected)


def test_the_unit_is_the_teachers_spread_or_that_of_the_labels() -> None:
    model = vit(num_classes=3)
    x, truth = images(model, 12), 5 * drawn(12, 3)
    with torch.no_grad():
        out = model(x)
    batches = list(DataLoader(TensorDataset(x, truth), batch_size=5))
    said = Answers("values", ((3,),))
    for teacher, numbers in ((model, out), (None, truth)):
        (found,) = unit(said, teacher, batches) or ()
        torch.testing.assert_close(found, numbers.var(0, correction=0))
    assert unit(Answers("labels", ((3,),)), model, batches) is None


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("values", {"mixup": 0.8}, "the outputs are values, and mixup and cutmix mix class labels"),
        ("labels", {"cutmix": 1.0}, "the outputs are labels, and mixup and cutmix mix class labels"),
        ("values", {"label_smoothing": 0.1}, "label_smoothing is for logits"),
        ("values", {"distillation": "hard"}, "takes the answer of logits. Use 'soft'"),
        ("features", {"distillation": "hard"}, "takes the answer of logits. Use 'soft'"),
        ("values", {"distillation_temperature": 2.0}, "divides logits. Set it to 1"),
        ("features", {"distillation_weight": 0.0}, "features have no labels"),
    ],
)
def test_settings_without_a_meaning_are_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    make, said, labels = HOSTS[kind]
    model = make()
    config = FinetuneConfig(**{**CONFIG, "outputs": said, **changes})
    with pytest.raises(TrainingError, match=message):
        comcat.finetune(model, model, data(model, labels), None, config, cpu=True)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TrainingError, match="outputs is 'logits'; choose one of classes, labels"):
        FinetuneConfig(outputs="logits")  # type: ignore[arg-type]
    model, config = vit(), FinetuneConfig(**CONFIG, outputs="labels")
    with pytest.raises(DataError, match="need 0 or 1 of shape"):
        comcat.finetune(model, model, data(model, lambda y: y.argmax(1)), None, config, cpu=True)
    with pytest.raises(ModelError, match="the student does not answer as it should: outputs are said to be maps"):
        comcat.finetune(model, model, data(model, None), None, FinetuneConfig(outputs="maps"), cpu=True)
    one, many = vit(num_classes=3), vit(num_classes=5)
    with pytest.raises(ModelError, match=r"teacher has values of shape \(5,\) and the student values of shape \(3,\)"):
        comcat.finetune(one, many, data(one, lambda y: y), None, FinetuneConfig(outputs="values"), cpu=True)
    maps = Segmenter(5)
    small = data(maps, lambda y: y.argmax(1)[:, ::7, ::7])
    with pytest.raises(DataError, match="Give them at the resolution of the output"):
        comcat.finetune(maps, maps, small, None, FinetuneConfig(**CONFIG), cpu=True)


def test_features_that_nobody_named_are_mentioned() -> None:
    model, said = vit(num_classes=0), []
    config = FinetuneConfig(**{**CONFIG, "max_steps": 1})
    comcat.finetune(model, model, data(model, None), None, config, cpu=True, note=said.append)
    assert ["labels are not used" in text for text in said] == [True]


def test_smoothing_is_for_classes_unless_said() -> None:
    for kind in KINDS:
        assert FinetuneConfig().resolved(kind).label_smoothing == (0.1 if kind == "classes" else 0)
    assert FinetuneConfig(label_smoothing=0.3).resolved("labels").label_smoothing == 0.3


@pytest.mark.parametrize("name", ["values", "labels", "features", "maps"])
def test_ranks_are_learned_on_every_kind(name: str, tmp_path: Any) -> None:
    make, said, labels = HOSTS[name]
    model = make()
    config = SearchConfig(epochs=99, max_steps=4, candidates=3, log_every=2, outputs=said)
    plan = comcat.search(model, Budget(params=0.8), data(model, labels), config, out=tmp_path, cpu=True)
    assert plan.layers
    lines = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    assert all(line["loss"] > 0 for line in lines[1:])
    with pytest.raises(TrainingError, match="outputs was"):
        comcat.search(
            model, Budget(params=0.8), data(model, labels), SearchConfig(
                epochs=99, max_steps=4, candidates=3, log_every=2, outputs="features" if said is None else None
            ), out=tmp_path, resume=True, cpu=True, calibration=calibrated(model, 24, fisher=True, outputs="features"),
        )  # fmt: skip


@pytest.mark.parametrize("name", HOSTS)
def test_tables_show_the_scores_of_the_kind(name: str) -> None:
    make, said, labels = HOSTS[name]
    model = make()
    reference = model if labels is None else None
    result = comcat.evaluate(model, data(model, labels), outputs=said, reference=reference)
    dense = tables.Measured("dense", 7, 7, 7, result)
    shown = "".join(
        text(one) for one in (
            tables.evaluation("a model", result, 7, 7), tables.comparison([dense, dense], "two"),
            tables.budgets([dense, dense], "two"),
        )
    )  # fmt: skip
    assert "nan" not in shown.lower()
    assert "top-" not in shown
    for figure in result.figures():
        assert figure.label in shown
    assert "NaN" not in json.dumps(result.to_dict())
