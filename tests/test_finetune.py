"""Fine-tuning: what a step does, what is left untouched, and what is refused."""

import copy
import gc
import json
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import comcat
from comcat import DataError, FinetuneConfig, ModelError, TrainingError
from comcat.training import state
from conftest import images, make, vit

PLAIN = {"distillation": "none", "label_smoothing": 0.0, "warmup_epochs": 0, "eval_every": None, "log_every": 1}


def loader(model, count=12, batch_size=4, **args) -> DataLoader:
    x = images(model, count)
    return DataLoader(TensorDataset(x, torch.arange(count) % 11), batch_size=batch_size, **args)


def run(student, teacher=None, data=None, tmp_path=None, **changes):
    config = FinetuneConfig(**{**PLAIN, "max_steps": 3, **changes})
    return comcat.finetune(student, teacher, loader(student) if data is None else data, None, config, out=tmp_path)


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_steps_are_those_of_adamw_written_out():
    """Three steps by hand: gradients, clipping, decay groups, schedule."""
    student = vit()
    ours = copy.deepcopy(student).train()
    run(student, lr=1e-2, min_lr=1e-3, clip_grad=0.5, weight_decay=0.1, epochs=1)
    groups: dict[bool, list] = {True: [], False: []}
    for name, p in ours.named_parameters():
        groups[p.ndim > 1 and name not in ("pos_embed", "cls_token")].append(p)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": 0.1}, {"params": groups[False], "weight_decay": 0.0}], lr=1e-2
    )
    for rate, (x, y) in zip((1e-2, 5.5e-3, 1e-3), loader(ours), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        F.cross_entropy(ours(x), y).backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 0.5)
        optimizer.step(), optimizer.zero_grad()
    for (name, a), b in zip(student.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


def test_a_full_rank_student_starts_at_its_teacher(tmp_path):
    dense = vit()
    student = comcat.compress(dense, comcat.full_rank_plan(dense))
    kind = {"distillation": "soft", "distillation_weight": 0.4, "feature_blocks": (0, 1), "distillation_temperature": 2}
    run(student, dense, tmp_path=tmp_path, **kind)
    first = lines(tmp_path)[0]
    assert first["distillation"] == pytest.approx(0, abs=1e-9)
    assert first["features"] == pytest.approx(0, abs=1e-9)
    assert first["loss"] == pytest.approx(0.6 * first["labels"], rel=1e-6)
    x, y = next(iter(loader(dense)))
    assert first["labels"] == pytest.approx(F.cross_entropy(dense(x), y).item(), rel=1e-5)


def test_accumulation_is_a_larger_batch():
    one, two = vit(), vit()
    run(one, data=loader(one, batch_size=6), lr=1e-2)
    run(two, data=loader(two, batch_size=2), lr=1e-2, accumulate=3)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("option", ["grad_checkpointing", "compile"])
def test_other_ways_to_the_same_gradients(option, monkeypatch):
    if option == "compile":  # the real compiler takes a minute; that the call goes through it is what matters here
        compiled = []
        monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    one, two, dense = vit(), vit(), vit(seed=5)
    kind = {"distillation": "soft", "feature_blocks": (0, -1), "lr": 1e-2}
    run(one, dense, **kind)
    run(two, dense, **kind, **{option: True})
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert not any(getattr(m, "grad_checkpointing", False) for m in two.modules())
    assert option != "compile" or len(compiled) == 2


def test_layer_decay_slows_the_first_layers(monkeypatch):
    from comcat.training import loop

    made = []
    original = loop.create_optimizer_v2
    monkeypatch.setattr(loop, "create_optimizer_v2", lambda *a, **k: made.append(original(*a, **k)) or made[-1])
    student = vit()
    run(student, layer_decay=0.5, lr=1e-2, min_lr=1e-2)
    scales: dict[tuple, set] = {}
    for group in made[0].param_groups:
        assert group["lr"] == pytest.approx(1e-2 * group["lr_scale"])
        for p in group["params"]:
            scales.setdefault(tuple(p.shape), set()).add(group["lr_scale"])
    # The stem, two blocks (the last with the final norm), the classifier.
    assert scales[tuple(student.pos_embed.shape)] == {0.125}
    assert scales[tuple(student.blocks[0].attn.qkv.weight.shape)] == {0.25, 0.5}
    assert scales[tuple(student.head.weight.shape)] == {1.0}


def test_the_average_is_what_results(tmp_path):
    student, data = vit(), loader(vit())
    config = FinetuneConfig(**{**PLAIN, "max_steps": 3, "lr": 1e-2, "ema": 0.9})
    result = comcat.finetune(student, None, data, data, config, out=tmp_path)
    saved = state.read(state.checkpoints(tmp_path)[0][1])
    for name, value in student.state_dict().items():
        assert torch.equal(value, saved.tensors["average"][name])
        assert not torch.equal(value, saved.tensors["model"][name])
    assert result.final.loss == comcat.evaluate(student, data).loss


def test_a_metric_of_ones_own(tmp_path):
    student, data = vit(), loader(vit())

    def norm(model, batches):
        return sum(float(model(x).norm()) for x, _ in batches)

    def other(model, batches):
        return 1.0

    config = FinetuneConfig(**{**PLAIN, "max_steps": 3})
    result = comcat.finetune(student, None, data, data, config, out=tmp_path, evaluate=norm)
    assert [list(entry.evaluation.metrics) for entry in result.history] == [["norm"]] * len(result.history)
    again = comcat.evaluate(student, data, evaluate=norm)
    assert result.final.metrics == pytest.approx(again.metrics, rel=1e-4)
    with pytest.raises(TrainingError, match="metric was 'norm' and is now 'other'"):
        comcat.finetune(student, None, data, data, config, out=tmp_path, resume=True, evaluate=other)
    with pytest.raises(TrainingError, match="a metric needs images to be computed on; give eval_loader"):
        comcat.finetune(student, None, data, None, config, evaluate=norm)


def test_distilled_students_learn_with_both_classifiers(tmp_path):
    args = {"img_size": 14, "patch_size": 7, "embed_dim": 15, "depth": 1, "num_heads": 3, "num_classes": 11}
    student, teacher = (make("deit_tiny_distilled_patch16_224", seed, **args) for seed in (1, 2))
    start = copy.deepcopy(student)
    run(student, teacher, data=loader(student), tmp_path=tmp_path, distillation="hard")
    x, y = next(iter(loader(student)))
    start.set_distilled_training(True)
    first, second = start.train()(x)
    line = lines(tmp_path)[0]
    assert line["labels"] == pytest.approx(F.cross_entropy(first, y).item(), rel=1e-5)
    assert line["distillation"] == pytest.approx(F.cross_entropy(second, teacher(x).argmax(-1)).item(), rel=1e-5)
    assert not student.distilled_training


def test_nothing_is_left_behind():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    student, teacher = vit(dtype=torch.float32), vit(dtype=torch.float32)
    student.train(), student.blocks[0].requires_grad_(False)
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    frozen = {name: p.clone() for name, p in student.blocks[0].state_dict().items()}
    for precision in ("bf16", "no"):  # Accelerate's own state would keep the first
        run(student, teacher, precision=precision, distillation="soft", feature_blocks=(0,))
    assert student.training
    assert all(torch.equal(frozen[name], p) for name, p in student.blocks[0].state_dict().items())
    assert all(torch.equal(before[name], p) for name, p in teacher.state_dict().items())
    assert not teacher.training
    assert all(p.requires_grad for p in teacher.parameters())
    for model in (student, teacher):
        assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())
    assert [dict(s._shared_state) for s in (AcceleratorState, GradientState, PartialState)] == [{}] * 3


def test_precision_and_layouts(tmp_path):
    student = vit(dtype=torch.float32)
    result = comcat.finetune(
        student, student, loader(student), loader(student), FinetuneConfig(max_steps=2, precision="bf16", mixup=0.8)
    )
    assert result.steps == 2
    assert [entry.step for entry in result.history] == [0, 2]
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert result.to_dict()["history"][1]["evaluation"]["images"] == 12


def test_a_loss_that_is_not_finite(tmp_path):
    student = vit(dtype=torch.float32)
    x = images(student, 12)
    x[9] = float("nan")
    data = DataLoader(TensorDataset(x, torch.arange(12) % 11), batch_size=2)
    config = FinetuneConfig(**{**PLAIN, "log_every": 50, "checkpoint_every": 3, "max_steps": 50, "epochs": 9})
    with pytest.raises(TrainingError, match=r"NaN or infinite since step 5; the checkpoint of step 3 in .* is good"):
        comcat.finetune(student, None, data, None, config, out=tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert all(p.isfinite().all() for p in student.parameters())


class Deadly(TensorDataset):
    def __getitem__(self, index):
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.skipif(os.name == "nt", reason="kills a process")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the socket that the worker was writing to
def test_a_killed_loader_worker(tmp_path):
    student = vit(dtype=torch.float32)
    data = DataLoader(Deadly(images(student, 12), torch.arange(12) % 11), batch_size=2, num_workers=1)
    with pytest.raises(TrainingError, match=r"reads images( \(pid \d+\))? was killed.*--resume"):
        run(student, data=data, tmp_path=tmp_path, max_steps=9)
    gc.collect()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_half_precision_needs_a_gpu():
    with pytest.raises(TrainingError, match="precision fp16"):
        run(vit(), precision="fp16")


class Endless(IterableDataset):
    def __iter__(self):
        yield from ()


def test_refusals():
    student = vit(dtype=torch.float32)
    x = images(student, 12)
    with pytest.raises(TrainingError, match="need a teacher"):
        run(student, None, distillation="soft")
    with pytest.raises(ModelError, match="teacher has 7 classes and the student 11"):
        run(student, vit(num_classes=7), distillation="soft")
    with pytest.raises(ModelError, match="teacher takes images of 3 x 21 x 21 and the student of 3 x 14 x 21"):
        run(student, vit(img_size=21), distillation="soft")
    with pytest.raises(TrainingError, match="features have no labels"):
        run(vit(num_classes=0))
    with pytest.raises(TrainingError, match=r"student's weights are torch.bfloat16"):
        run(vit().bfloat16())
    with pytest.raises(TrainingError, match="no parameter of the student requires a gradient"):
        run(vit().requires_grad_(False))
    with pytest.raises(TrainingError, match="needs a torch DataLoader"):
        run(student, data=[(x, torch.zeros(12))])
    with pytest.raises(TrainingError, match="random access"):
        run(student, data=DataLoader(Endless()))
    with pytest.raises(TrainingError, match="does not batch"):
        run(student, data=DataLoader(TensorDataset(x), batch_size=None))
    with pytest.raises(TrainingError, match="make no batch of 16"):
        run(student, data=loader(student, batch_size=16, drop_last=True))
    with pytest.raises(DataError, match="batches of \\(images, labels\\)"):
        run(student, data=DataLoader(TensorDataset(x), batch_size=4))
    with pytest.raises(DataError, match="no label"):
        run(student, data=DataLoader(TensorDataset(x, -torch.ones(12).long()), batch_size=4))
    with pytest.raises(DataError, match="label 11 is none of the model's"):
        run(student, data=DataLoader(TensorDataset(x, torch.full((12,), 11)), batch_size=4))
    with pytest.raises(DataError, match="labels must be whole numbers"):
        run(student, data=DataLoader(TensorDataset(x, torch.rand(12)), batch_size=4))
    with pytest.raises(DataError, match="look one-hot"):
        run(student, data=DataLoader(TensorDataset(x, torch.eye(12)[:, :11]), batch_size=4))
    with pytest.raises(DataError, match=r"images of torch.uint8"):
        run(student, data=DataLoader(TensorDataset(x.byte(), torch.zeros(12).long()), batch_size=4))
    with pytest.raises(ModelError, match=r"does not run on images of size \(3, 14, 20\)"):
        run(student, data=DataLoader(TensorDataset(x[..., :20], torch.zeros(12).long()), batch_size=4))
    with pytest.raises(DataError, match=r"outputs that are values need floating-point truths of shape \(4, 1\)"):
        run(vit(num_classes=1))
    with pytest.raises(TrainingError, match="even number of images, not 3"):
        run(student, data=loader(student, batch_size=3), mixup=0.8)
    with pytest.raises(TrainingError, match="nothing to resume without out"):
        comcat.finetune(student, None, loader(student), None, FinetuneConfig(**PLAIN), resume=True)
    relu = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 224 * 224, 11))
    with pytest.raises(TrainingError, match="Sequential has no gradient checkpointing"):
        run(relu, data=DataLoader(TensorDataset(x, torch.zeros(12).long()), batch_size=4), grad_checkpointing=True)


class Pictures(torch.utils.data.Dataset):
    """As data sets of Transformers have it."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        return {"pixel_values": self.images[index], "labels": index % 11}


class Named(torch.nn.Module):
    """Logits under their name."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.model(x)}


def test_dictionaries_in_and_out_train_alike():
    plain, named = vit(dtype=torch.float32), Named(vit(dtype=torch.float32))
    x = images(plain, 8)
    pairs = DataLoader(TensorDataset(x, torch.arange(8)), batch_size=4)
    run(plain, vit(seed=1, dtype=torch.float32), pairs, distillation="soft", max_steps=2)
    given = DataLoader(Pictures(x), batch_size=4)
    teacher = Named(vit(seed=1, dtype=torch.float32))
    # The size of a wrapped model is that of what it wraps.
    run(named, teacher, given, distillation="soft", max_steps=2)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(named.state_dict()[f"model.{name}"], tensor, rtol=1e-4, atol=1e-5)
