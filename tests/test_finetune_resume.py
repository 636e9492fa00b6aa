"""A resumed run is the run that was never interrupted, bit by bit."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import comcat
from comcat import FinetuneConfig, TrainingError
from comcat.training import checks, state
from conftest import images, vit

COUNT = 26
#: NumPy's global generator, from which augmentations draw.
GLOBAL = np.random.mtrand._rand


class Noisy(Dataset):
    """Random images under an augmentation that draws from all three global generators."""

    def __init__(self, count: int = COUNT) -> None:
        self.images = images(vit(), count).float()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = random.random() + GLOBAL.rand() + torch.rand(())
        return self.images[index] * noise, index % 11


def models(**args) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A student with dropout and stochastic depth, and its teacher."""
    student = vit(seed=3, dtype=torch.float32, drop_path_rate=0.3, proj_drop_rate=0.1, **args)
    return student, vit(dtype=torch.float32)


def settings(**changes) -> FinetuneConfig:
    # 26 images in batches of 4 and windows of 2: 4 steps in an epoch, the last of a single batch of 2.
    base = {
        "epochs": 2.5,
        "accumulate": 2,
        "checkpoint_every": 3,
        "keep_checkpoints": 9,
        "log_every": 2,
        "mixup": 0.5,
        "cutmix": 1.0,
        "ema": 0.9,
        "feature_blocks": (-1,),
        "lr": 1e-2,
        "eval_every": 0.5,
    }
    return FinetuneConfig(**{**base, **changes})


def loaders(workers: int = 0) -> tuple[DataLoader, DataLoader]:
    data = Noisy()
    evaluation = DataLoader([(data.images[i], i % 11) for i in range(7)], batch_size=5, shuffle=True)
    return DataLoader(data, batch_size=4, shuffle=True, num_workers=workers), evaluation


class StopError(Exception):
    """The interruption."""


def train(out: Path, config: FinetuneConfig, stop: int | None = None, resume: bool = False, workers: int = 0):
    """Run until the end, or until ``stop`` steps are done; returns the result and the student's weights."""
    student, teacher = models()

    def interrupt(stage: str, done: int, total: int | None) -> None:
        if stage == "train" and done == stop:
            raise StopError

    torch.manual_seed(int(resume) + 17 * (stop or 0))  # must not matter
    train_loader, eval_loader = loaders(workers)
    args = (student, teacher, train_loader, eval_loader, config)
    if stop is not None:
        with pytest.raises(StopError):
            comcat.finetune(*args, out=out, resume=resume, progress=interrupt)
        return None, None
    return comcat.finetune(*args, out=out, resume=resume), student.state_dict()


def metrics(out: Path) -> list[dict]:
    """The log without what depends on the machine."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_second", None)
        line.get("evaluation", {}).pop("images_per_second", None)
    return lines


def same_checkpoint(a: Path, b: Path) -> None:
    """Every tensor, and all plain data but the speed of evaluations."""
    first, second = state.read(a), state.read(b)
    assert first.tensors.keys() == second.tensors.keys() == {"model", "average", "optimizer", "random"}
    for stem, tensors in first.tensors.items():
        assert tensors.keys() == second.tensors[stem].keys()
        assert all(torch.equal(tensors[name], second.tensors[stem][name]) for name in tensors), stem
    for name in ("config", "run", "meter", "optimizer", "random"):
        assert first.plain[name] == second.plain[name]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run from beginning to end."""
    out = tmp_path_factory.mktemp("run") / "out"
    result, weights = train(out, settings())
    return out, result, weights


@pytest.mark.parametrize(
    ("stop", "workers"),
    [
        (3, 0),  # at a checkpoint in the middle of an epoch and of a line of the log
        (5, 2),  # two steps after a checkpoint, and workers where there were none
        (6, 0),
        (9, 2),  # in the last epoch
    ],
)
def test_resume_is_exact(undisturbed, tmp_path, stop, workers):
    out, result, weights = undisturbed
    again = tmp_path / "out"
    train(again, settings(), stop=stop, workers=workers)
    resumed, got = train(again, settings(), resume=True, workers=2 - workers)
    assert result.steps == resumed.steps == 10
    assert all(torch.equal(weights[name], got[name]) for name in weights)
    assert metrics(again) == metrics(out)
    same_checkpoint(again / "checkpoints" / "step-00000010", out / "checkpoints" / "step-00000010")
    assert [entry.step for entry in resumed.history] == [0, 2, 4, 6, 8, 10]


def test_resume_at_the_end_of_an_epoch(tmp_path):
    config = settings(checkpoint_every=4)
    result, weights = train(tmp_path / "a", config)
    train(tmp_path / "b", config, stop=4)
    again, got = train(tmp_path / "b", config, resume=True)
    assert all(torch.equal(weights[name], got[name]) for name in weights)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert again.final is not None
    assert result.final is not None
    assert again.final.loss == result.final.loss


def test_resume_twice_and_after_the_end(undisturbed, tmp_path):
    out, _, weights = undisturbed
    again = tmp_path / "out"
    train(again, settings(), stop=4)
    train(again, settings(), stop=8, resume=True)
    _, got = train(again, settings(), resume=True)
    assert all(torch.equal(weights[name], got[name]) for name in weights)
    finished, got = train(again, settings(), resume=True)
    assert all(torch.equal(weights[name], got[name]) for name in weights)
    assert finished.final == finished.history[-1].evaluation
    assert metrics(again) == metrics(out)


def test_what_cannot_matter_may_change(undisturbed, tmp_path):
    _, _, weights = undisturbed
    again = tmp_path / "out"
    train(again, settings(), stop=4)
    other = settings(log_every=3, keep_checkpoints=1, checkpoint_every=5, eval_every=None)
    result, got = train(again, other, resume=True)
    assert all(torch.equal(weights[name], got[name]) for name in weights)
    assert [path.name for path in (again / "checkpoints").iterdir()] == ["step-00000010"]
    assert [entry.step for entry in result.history] == [0, 2, 10]


def test_a_damaged_checkpoint_is_passed_over(undisturbed, tmp_path):
    out, _, weights = undisturbed
    again = tmp_path / "out"
    train(again, settings(), stop=8)
    newest = again / "checkpoints" / "step-00000006"
    content = bytearray((newest / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "optimizer.safetensors").write_bytes(content)
    result, got = train(again, settings(), resume=True)
    assert all(torch.equal(weights[name], got[name]) for name in weights)
    assert metrics(again) == metrics(out)
    assert any("step 6 is damaged" in note and "checksum" in note for note in result.notes)
    assert state.read(newest).step == 6


@pytest.mark.parametrize(
    ("stem", "entry", "damage"),
    [
        ("optimizer", "exp_avg", lambda t: t.flatten()[0]),
        ("optimizer", "exp_avg", lambda t: t.to(torch.int32)),
        ("optimizer", "exp_avg_sq", lambda t: t - 1),
        ("optimizer", "step", lambda t: t.expand(2).clone()),
        ("model", "weight", lambda t: t * torch.nan),
        ("average", "weight", lambda t: t * torch.inf),
    ],
)
def test_what_no_training_leaves_is_refused(undisturbed, tmp_path, stem, entry, damage):
    """Its checksums are right: PyTorch would take it, and fail or go on with NaN."""
    again = tmp_path / "out"
    train(again, settings(ema=0.9), stop=3)
    [(_, path)] = state.checkpoints(again)
    saved = state.read(path)
    name = next(
        name for name, t in saved.tensors[stem].items() if name.endswith(entry) and (t.dim() or entry == "step")
    )
    tensors = {**saved.tensors, stem: {**saved.tensors[stem], name: damage(saved.tensors[stem][name])}}
    plain = {key: value for key, value in saved.plain.items() if key not in ("format", "files", "step")}
    state.write(again, state.Saved(saved.step, tensors, plain), 1)
    with pytest.raises(
        TrainingError, match=r"the checkpoint of step 3 does not fit this run: ValueError: .*start anew"
    ):
        train(again, settings(ema=0.9), resume=True)


@pytest.mark.parametrize("meter", [[1, [True]], [1, [[[], 1.0, 0.0, 0.0, 1.0]]], ["1", [[0.0] * 5]], [-1, [[0.0] * 5]]])
def test_sums_of_another_kind_are_refused(undisturbed, tmp_path, meter):
    again = tmp_path / "out"
    train(again, settings(), stop=3)
    [(_, path)] = state.checkpoints(again)
    saved = state.read(path)
    plain = {key: value for key, value in saved.plain.items() if key not in ("format", "files", "step")}
    state.write(again, state.Saved(saved.step, saved.tensors, {**plain, "meter": meter}), 1)
    with pytest.raises(TrainingError, match=r"the checkpoint of step 3 does not fit this run: .*start anew"):
        train(again, settings(), resume=True)


@pytest.mark.parametrize("unreached", [False, True])
def test_a_checkpoint_of_format_1_is_resumed(undisturbed, tmp_path, monkeypatch, unreached):
    """It has no moments of what no gradient has reached."""
    out, _, weights = undisturbed
    saved = state.read(out / "checkpoints" / "step-00000006")
    plain = {key: value for key, value in saved.plain.items() if key not in ("format", "files", "step", "scalars")}
    moments = dict(saved.tensors["optimizer"])
    if unreached:
        moments = {key: t for key, t in moments.items() if not key.startswith("head.bias.")}
    with monkeypatch.context() as patch:
        patch.setattr(state, "FORMAT", 1)
        state.write(tmp_path / "out", state.Saved(6, {**saved.tensors, "optimizer": moments}, plain), 1)
    _, got = train(tmp_path / "out", settings(), resume=True)
    same = {name for name in weights if torch.equal(weights[name], got[name])}
    assert unreached == ("head.bias" not in same)
    assert unreached or same == set(weights)


@pytest.mark.parametrize("file", ["state.json", "model.safetensors", "random.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "torn"])
def test_every_file_is_checked(undisturbed, tmp_path, file, damage):
    source = undisturbed[0] / "checkpoints" / "step-00000003"
    copy = tmp_path / "checkpoints" / "step-00000003"
    copy.mkdir(parents=True)
    for path in source.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    content = (copy / file).read_bytes()
    (copy / file).write_bytes({"missing": b"", "empty": b"", "torn": content[:-3]}[damage])
    if damage == "missing":
        (copy / file).unlink()
    with pytest.raises(TrainingError, match=r"none of the 1 checkpoints .* is intact"):
        checks.newest(tmp_path, print)


def test_other_settings_are_named(undisturbed, tmp_path):
    with pytest.raises(TrainingError, match=r"ema was 0.9 and is now None; lr was 0.01 and is now 0.002"):
        train(undisturbed[0], settings(lr=2e-3, ema=None), resume=True)
    student, teacher = models()
    loader = DataLoader(Noisy(), batch_size=2, shuffle=True)
    with pytest.raises(TrainingError, match="batch_size was 4 and is now 2"):
        comcat.finetune(student, teacher, loader, config=settings(), out=undisturbed[0], resume=True)
    other = vit(seed=8, dtype=torch.float32)
    with pytest.raises(TrainingError, match=r"teacher was '[0-9a-f]+' and is now"):
        comcat.finetune(student, other, loaders()[0], config=settings(), out=undisturbed[0], resume=True)


def test_a_directory_in_use(undisturbed, tmp_path):
    with pytest.raises(TrainingError, match="already holds a run; continue it with --resume"):
        train(undisturbed[0], settings())
    with pytest.raises(TrainingError, match="there is no checkpoint in"):
        train(tmp_path / "nowhere", settings(), resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="is a file; choose a directory"):
        train(tmp_path / "file", settings())


def test_random_generators_of_the_caller_are_left_alone(tmp_path):
    random.seed(1), GLOBAL.seed(2), torch.manual_seed(3)
    wanted = random.random(), GLOBAL.rand(), torch.rand(())
    args = (*models(), *loaders(), settings(max_steps=2))
    random.seed(1), GLOBAL.seed(2), torch.manual_seed(3)
    comcat.finetune(*args)
    assert (random.random(), GLOBAL.rand(), torch.rand(())) == wanted


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from comcat.training import state
from test_finetune_resume import settings, train

# Die when the third file of the second checkpoint is half written.
written, original = [], state._write
def write(path, content):
    written.append(path)
    if len(written) == 8:
        original(path, content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    original(path, content)
state._write = write
train(Path({out!r}), settings())
"""


@pytest.mark.skipif(os.name == "nt", reason="kills a process")
def test_killed_while_writing(undisturbed, tmp_path):
    out, _, weights = undisturbed
    again = tmp_path / "out"
    code = KILLED.format(tests=str(Path(__file__).parent), out=str(again))
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert [path.name[:22] for path in (again / "checkpoints").glob(".step-*")] == [".step-00000006.comcat-"]
    _, got = train(again, settings(), resume=True)
    assert all(torch.equal(weights[name], got[name]) for name in weights)
    assert metrics(again) == metrics(out)
    assert not list((again / "checkpoints").glob(".*"))
