"""A resumed run is the run that was never interrupted: the same file, bit by bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from comcat import TrainingError
from comcat.customize import CustomizeConfig, save_adapter, train
from comcat.customize.teaching.teach import finish
from comcat.training import state
from comcat_demos import digits
from test_customize_train import StopError, stop_at, write_photos

PROMPT = "a photo of V*"
SIZES = ((16, 16), (16, 33), (40, 17), (20, 20))  # of three buckets
EVERYTHING: dict[str, Any] = {
    "rank": 1,
    "steps": 7,
    "batch_size": 2,
    "accumulate": 2,
    "text_encoder_rank": 1,
    "token_vectors": 2,
    "caption_dropout": 0.3,
    "flip": 0.5,
    "snr_gamma": 5.0,
    "lr": 1e-2,
    "warmup_steps": 2,
    "num_class_images": 5,
    "validation_steps": 1,
    "validation_images": 1,
    "validate_every": 3,
    "checkpoint_every": 2,
    "keep_checkpoints": 9,
    "log_every": 2,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Bit by bit is what one thread promises: two may add up gradients in another order, in every run anew."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(**changes: Any) -> CustomizeConfig:
    return CustomizeConfig(**{**EVERYTHING, **changes})


def learn(place: Path, stop: int | None = None, file: str = "dog.safetensors", **options: Any) -> bytes | None:
    """The adapter file of a run in ``place/run``; or None, and the run stops where ``stop`` steps are done."""
    pipe = digits.build()
    torch.manual_seed(random.randrange(1000))  # must not matter
    changes = {k: v for k, v in options.items() if k in CustomizeConfig.__dataclass_fields__}
    more = {k: v for k, v in options.items() if k not in changes}
    more = {"class_prompt": "a photo of a digit", "out": place / "run", "cpu": True, **more}
    photos = more.pop("photos", place / "photos")
    if stop is not None:
        with pytest.raises(StopError):
            train(pipe, photos, PROMPT, settings(**changes), progress=stop_at(stop), **more)
        return None
    train(pipe, photos, PROMPT, settings(**changes), **more)
    return save_adapter(pipe, place / file).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run from beginning to end, its file and its log."""
    place = tmp_path_factory.mktemp("undisturbed")
    write_photos(place / "photos", *SIZES)
    return place, learn(place), (place / "run" / "metrics.jsonl").read_text()


@pytest.fixture
def place(tmp_path):
    write_photos(tmp_path / "photos", *SIZES)
    return tmp_path


@pytest.mark.parametrize("stop", [2, 3, 6])
def test_resume_is_exact(undisturbed, place, stop):
    _, wanted, log = undisturbed
    learn(place, stop)
    assert learn(place, resume=True) == wanted
    assert (place / "run" / "metrics.jsonl").read_text() == log
    assert [step for step, _ in state.checkpoints(place / "run")] == [7, 6, 4, 2]


def test_resume_twice_and_after_the_end(undisturbed, place):
    _, wanted, _ = undisturbed
    learn(place, 3)
    learn(place, 5, resume=True)
    assert learn(place, resume=True) == wanted
    assert learn(place, resume=True) == wanted
    finish(place / "run")
    assert not (place / "run" / "checkpoints").exists()
    with pytest.raises(TrainingError, match="there is no checkpoint in"):
        learn(place, resume=True)


def test_without_cached_latents(undisturbed, place):
    options = {"cache_latents": False, "random_crop": True, "buckets": 1.0}
    wanted = learn(place, **options)
    (place / "run").rename(place / "before")
    learn(place, 5, **options)
    assert learn(place, resume=True, **options) == wanted != undisturbed[1]


def test_what_cannot_matter_may_change(undisturbed, place):
    learn(place, 5)
    free = {"validate_every": 0, "validation_steps": 3, "log_every": 3, "keep_checkpoints": 1, "checkpoint_every": 3}
    assert learn(place, resume=True, **free) == undisturbed[1]
    assert [step for step, _ in state.checkpoints(place / "run")] == [7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5, "accumulate": 1}, "lr was 0.01 and is now 0.5; accumulate was 2 and is now 1|accumulate was.*lr"),
        ({"rank": 2, "steps": 9}, "rank was 1 and is now 2; steps was 7 and is now 9"),
        ({"token": "V*", "token_init": "digit"}, "token_init was None and is now 'digit'"),
        ({"class_prompt": None}, r"class_images.0000.png was 'a photo of a digit \(\w+\)' and is now None"),
        ({"num_class_images": 6}, r"num_class_images was 5 and is now 6"),
    ],
)
def test_other_settings_are_named(undisturbed, changes, message):
    place, _, _ = undisturbed
    with pytest.raises(TrainingError, match=f"started with other settings: .*({message})"):
        learn(place, resume=True, **changes)
    assert len(list((place / "run" / "class-images").glob("*.png"))) == 5


def test_other_photos_are_named(undisturbed, place):
    source = undisturbed[0]
    run = {"out": source / "run", "resume": True}
    write_photos(place / "other", *SIZES[::-1])
    with pytest.raises(TrainingError, match=r"photos.0.png was .*photos.3.png was \S+ .*and is now"):
        learn(place, photos=place / "other", **run)
    many = write_photos(place / "many", *SIZES, *SIZES, *SIZES)
    with pytest.raises(TrainingError, match=r"other settings: (photos[^;]+; ){4}photos[^;]+ and 7 more\. Use the old"):
        learn(place, photos=many, **run)
    (place / "photos" / "1.txt").write_text("another V*")
    with pytest.raises(TrainingError, match=r"other settings: photos.1.png was 'a photo of V\* .* now 'another V\* "):
        learn(place, photos=place / "photos", **run)


def test_another_base_is_noticed(undisturbed, monkeypatch):
    pipe = digits.build(1)
    monkeypatch.setattr(digits, "build", lambda: pipe)
    with pytest.raises(TrainingError, match=r"other settings: base was '\w{16}' and is now '\w{16}'\. Use"):
        learn(undisturbed[0], resume=True)


def test_a_damaged_checkpoint_is_passed_over(undisturbed, place):
    learn(place, 5)
    newest = place / "run" / "checkpoints" / "step-00000004" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    notes: list[str] = []
    assert learn(place, resume=True, note=notes.append) == undisturbed[1]
    assert len(notes) == 1
    assert "the checkpoint of step 4 is damaged and passed over" in notes[0]


def test_a_checkpoint_of_format_1_is_resumed(undisturbed, place, monkeypatch):
    done, wanted, log = undisturbed
    saved = state.read(done / "run" / "checkpoints" / "step-00000004")
    new = {"format", "step", "files", "random", "scalars"}
    plain = {**{key: value for key, value in saved.plain.items() if key not in new}, "optimizer": {}}
    moments = {"|".join(key.rsplit(".", 1)): t for key, t in saved.tensors["optimizer"].items()}
    shutil.copytree(done / "run" / "class-images", place / "run" / "class-images")
    shutil.copy(done / "run" / "metrics.jsonl", place / "run")
    with monkeypatch.context() as patch:
        patch.setattr(state, "FORMAT", 1)
        tensors = {"adapter": saved.tensors["model"], "optimizer": moments}
        state.write(place / "run", state.Saved(4, tensors, plain), 1)
    assert learn(place, resume=True) == wanted
    assert (place / "run" / "metrics.jsonl").read_text() == log


class Counting(torch.optim.Optimizer):
    """An optimizer as bitsandbytes has them: its entries are of its own names, and one of them is a Python number."""

    def __init__(self, groups: Any, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state.update(step=0, state1=torch.zeros_like(p))
                    state["step"] += 1
                    state["state1"].lerp_(p.grad, 0.1)
                    p.sub_(state["state1"], alpha=group["lr"] / state["step"])


def test_an_optimizer_of_another_package(place, monkeypatch):
    optim = types.ModuleType("bitsandbytes.optim")
    optim.AdamW8bit = Counting  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    wanted = learn(place, optimizer="adamw8bit", class_prompt=None)
    (place / "run").rename(place / "before")
    learn(place, 5, optimizer="adamw8bit", class_prompt=None)
    assert learn(place, resume=True, optimizer="adamw8bit", class_prompt=None) == wanted


def test_a_run_is_not_started_over_another(undisturbed):
    with pytest.raises(TrainingError, match="already holds a run; continue it with --resume"):
        learn(undisturbed[0])


CHILD = """
import json, os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from comcat.customize.teaching import material
from comcat.customize.teaching.trainer import AdapterTrainer
from comcat.training import state
from test_customize_resume import SIZES, learn, write_photos

def die_at(module, name, count, half=False):
    calls, original = [], getattr(module, name)
    def patched(*args, **kwargs):
        calls.append(args)
        if len(calls) == count:
            if half:
                original(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(module, name, patched)

def fork(place, prepare, after=None):
    begun = bool(state.checkpoints(place / "run"))
    pid = os.fork()
    if pid == 0:
        prepare()
        learn(place, resume=begun)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def scenario(where, prepare, delays=(None,)):
    place = Path({place!r}) / where
    write_photos(place / "photos", *SIZES)
    codes = [fork(place, prepare, delay) for delay in delays]
    steps = [step for step, _ in state.checkpoints(place / "run")]
    drawn = len(list((place / "run" / "class-images").glob("*.png")))
    learn(place, resume=bool(steps))
    left = [str(path) for path in place.rglob(".*tmp")]
    return dict(codes=codes, steps=steps, drawn=drawn, left=left)

chance = random.Random({seed})
print(json.dumps(dict(
    images=scenario("images", lambda: die_at(material, "as_png", 3)),
    step=scenario("step", lambda: die_at(AdapterTrainer, "step", 4)),
    checkpoint=scenario("checkpoint", lambda: die_at(state, "_write", 5, half=True)),
    # The first is too early for a run to be over, however fast the machine.
    moments=scenario("moments", lambda: None, [chance.uniform(0.02, top) for top in (0.1, 1.2, 1.2, 1.2)]),
)))
"""


@pytest.mark.skipif(os.name == "nt", reason="kills processes")
def test_killed(undisturbed, tmp_path):
    """SIGKILL while class images are drawn, in a step, while a checkpoint is written, and four times at any moment."""
    seed = random.randrange(10**6)
    code = CHILD.format(tests=str(Path(__file__).parent), place=str(tmp_path), seed=seed)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["images"] == {"codes": [-signal.SIGKILL], "steps": [], "drawn": 2, "left": []}
    assert found["step"] == {"codes": [-signal.SIGKILL], "steps": [2], "drawn": 5, "left": []}
    assert found["checkpoint"] == {"codes": [-signal.SIGKILL], "steps": [2], "drawn": 5, "left": []}
    assert found["moments"]["codes"].count(-signal.SIGKILL) >= 1, seed
    for where in found:
        place = tmp_path / where
        assert (place / "dog.safetensors").read_bytes() == undisturbed[1], (where, seed)
        assert (place / "run" / "metrics.jsonl").read_text() == undisturbed[2], (where, seed)


def test_checkpoints_hold_what_is_needed(undisturbed):
    """And no weights of the base."""
    place, _, log = undisturbed
    saved = state.read(place / "run" / "checkpoints" / "step-00000007")
    names = set(saved.tensors["model"])
    assert "token.text_encoder" in names
    assert {key.rpartition(".")[0] for key in saved.tensors["optimizer"]} == names
    tensors: dict[str, Tensor] = {key: t for part in saved.tensors.values() for key, t in part.items()}
    assert all(t.isfinite().all() for t in tensors.values())
    assert len(saved.plain["losses"]) == 7
    assert [json.loads(line)["step"] for line in log.splitlines()] == [2, 4, 6, 7]
