"""A resumed search is the search that was never interrupted, bit by bit; two processes are one with larger batches."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import comcat
from comcat import Plan, SearchConfig, TrainingError
from comcat.training import state
from conftest import calibrated, vit
from test_finetune_resume import Noisy
from test_search import HALF, HOST, records

pytestmark = pytest.mark.usefixtures("no_source")


def settings(**changes: Any) -> SearchConfig:
    # 26 images in batches of 4: 7 steps in an epoch, the last of 2 images; every second checkpoint is between
    # a step of the weights and one of the ranks.
    base = {"epochs": 2.5, "checkpoint_every": 3, "keep_checkpoints": 9, "log_every": 2, "candidates": 5, "lr": 0.05}
    return SearchConfig(**{**base, "weight_lr": 1e-2, **changes})


def search(
    out: Path | None, config: SearchConfig, stop: int | None = None, notes: list[str] | None = None, **args: Any
) -> Plan:
    """Run until the end, or until Ctrl-C after ``stop`` steps."""

    def interrupt(stage: str, done: int, total: int | None) -> None:
        if stage == "search" and done == stop:
            raise KeyboardInterrupt

    torch.manual_seed(17 * (stop or 0)), random.seed(stop)  # must not matter
    reading = {name: args.pop(name) for name in ("num_workers", "drop_last") if name in args}
    loader = DataLoader(Noisy(), batch_size=args.pop("batch_size", 4), shuffle=True, **reading)
    host, note = vit(dtype=torch.float32, **HOST), (notes if notes is not None else []).append
    return comcat.search(host, args.pop("budget", HALF), loader, config, out=out, progress=interrupt, note=note, **args)


def same_checkpoint(a: Path, b: Path) -> None:
    first, second = state.read(a), state.read(b)
    wanted = {"model", "optimizer", "random", "ranks-model", "ranks-optimizer"}
    assert first.tensors.keys() == second.tensors.keys() == wanted
    assert first.tensors["ranks-model"].keys() == {"logits"}
    for stem, tensors in first.tensors.items():
        assert tensors.keys() == second.tensors[stem].keys()
        assert all(torch.equal(tensors[name], second.tensors[stem][name]) for name in tensors), stem
    assert first.plain == second.plain


LAST = Path("checkpoints", "step-00000017")
#: What checkpoints of format 1 do not say, or say of themselves.
NEW = {"format", "step", "files", "scalars", "ranks-optimizer", "ranks-scalars"}


@pytest.fixture(scope="module", params=["two-sided", "exact"])
def undisturbed(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, SearchConfig]:
    """A search from beginning to end."""
    out = tmp_path_factory.mktemp("search") / "out"
    config = settings(objective=request.param)
    return out, search(out, config), config


def test_resume_is_exact(undisturbed: tuple[Path, Plan, SearchConfig], tmp_path: Path) -> None:
    """Stopped one step after a checkpoint, at one between weights and ranks, and in the last epoch."""
    out, plan, config = undisturbed
    assert [path.name for _, path in state.checkpoints(out)][::-1] == [f"step-{n:08d}" for n in (3, 6, 9, 12, 15, 17)]
    again = tmp_path / "out"
    for i, stop in enumerate((4, 9, 16)):
        with pytest.raises(KeyboardInterrupt, match=r"the checkpoint of step \d+ is in .*; continue with --resume"):
            search(again, config, stop=stop, resume=bool(i), num_workers=2 * (i % 2))
        assert state.checkpoints(again)[0][0] == 3 * (stop // 3)
    assert search(again, config, resume=True) == plan
    same_checkpoint(out / LAST, again / LAST)
    assert records(again) == records(out)
    assert [line["step"] for line in records(again)] == [0, 2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16, 17]
    # A search that has ended ends again.
    assert search(again, config, resume=True) == plan
    assert records(again) == records(out)


@pytest.mark.parametrize("step", [3, 12])
def test_a_checkpoint_of_format_1_is_resumed(
    undisturbed: tuple[Path, Plan, SearchConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    out, plan, config = undisturbed
    saved = state.read(out / "checkpoints" / f"step-{step:08d}")
    tensors, plain = dict(saved.tensors), {k: v for k, v in saved.plain.items() if k not in NEW}
    tensors["ranks"] = dict(tensors.pop("ranks-model"))
    tensors["ranks"] |= {key.removeprefix("logits."): t for key, t in tensors.pop("ranks-optimizer").items()}
    with monkeypatch.context() as patch:
        patch.setattr(state, "FORMAT", 1)
        state.write(tmp_path / "out", state.Saved(step, tensors, plain), 1)
    assert search(tmp_path / "out", config, resume=True) == plan
    same_checkpoint(out / LAST, tmp_path / "out" / LAST)


def test_seeds(undisturbed: tuple[Path, Plan, SearchConfig], tmp_path: Path) -> None:
    out, plan, config = undisturbed
    assert search(tmp_path / "same", config) == plan
    same_checkpoint(out / LAST, tmp_path / "same" / LAST)
    other = SearchConfig.from_dict({**config.to_dict(), "seed": 1})
    search(tmp_path / "other", other, start=Plan(plan.layers))
    first, second = (state.read(place / LAST).tensors["ranks-model"]["logits"] for place in (out, tmp_path / "other"))
    assert not torch.equal(first, second)


def test_a_damaged_checkpoint_is_passed_over(undisturbed: tuple[Path, Plan, SearchConfig], tmp_path: Path) -> None:
    out, plan, config = undisturbed
    again, notes = tmp_path / "out", list[str]()
    with pytest.raises(KeyboardInterrupt):
        search(again, config, stop=8)
    newest = again / "checkpoints" / "step-00000006" / "ranks-model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    assert search(again, config, resume=True, notes=notes) == plan
    assert any("step 6 is damaged" in note and "checksum" in note for note in notes)
    same_checkpoint(out / LAST, again / LAST)
    assert records(again) == records(out)


def test_other_settings_are_named(undisturbed: tuple[Path, Plan, SearchConfig], tmp_path: Path) -> None:
    out, plan, config = undisturbed

    def refused(message: str, **changes: Any) -> None:
        args = {
            name: changes.pop(name) for name in ("budget", "batch_size", "parts", "rank_multiple") if name in changes
        }
        with pytest.raises(TrainingError, match=message):
            search(out, SearchConfig.from_dict({**config.to_dict(), **changes}), resume=True, **args)

    refused("beta was 1.5 and is now 2.0", beta=2)
    refused(r"candidates was 5 and is now 6; lr was 0.05 and is now 0.1", candidates=6, lr=0.1)
    refused("batch_size was 4 and is now 5", batch_size=5)
    refused(r"limit was \d+ and is now \d+", budget=comcat.Budget(params=0.6))
    refused(r"parts was \['qk', 'vo', 'ffn', 'head'\] and is now \['qk', 'vo', 'ffn'\]", parts=("qk", "vo", "ffn"))
    refused("rank_multiple was 1 and is now 2", rank_multiple=2)
    with pytest.raises(TrainingError, match="already holds a run; continue it with --resume"):
        search(out, config)
    with pytest.raises(TrainingError, match="there is no checkpoint in"):
        search(tmp_path / "nowhere", config, resume=True)
    free = SearchConfig.from_dict({**config.to_dict(), "log_every": 5, "checkpoint_every": 50})
    assert search(out, free, resume=True) == plan


def shared() -> dict[str, Any]:
    """What must not depend on the size of a batch: whole batches, and statistics made in the same ones."""
    host = vit(dtype=torch.float32, **HOST)
    made = calibrated(host, fisher=True)
    return {"drop_last": True, "calibration": made, "start": comcat.plan(host, HALF, made)}


PROCESSES = """
import os, sys, warnings
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import comcat, accelerate, torch.utils.tensorboard, conftest, test_search_resume
rank = 1 if os.fork() == 0 else 0
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT={port!r}, OMP_NUM_THREADS="1")
out, config = Path({out!r}), comcat.SearchConfig.from_dict({config!r})
plan = test_search_resume.search(out, config, batch_size=2, cpu=True, **test_search_resume.shared())
(out / f"plan-{{rank}}.json").write_text(plan.to_json())
torch.distributed.destroy_process_group()
if rank:
    os._exit(0)
assert os.wait()[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_two_processes(tmp_path: Path) -> None:
    """They agree with each other exactly, and with one process of the doubled batch to rounding."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    config = settings(epochs=9, max_steps=6, log_every=1)
    one, two = tmp_path / "one", tmp_path / "two"
    values = {"tests": str(Path(__file__).parent), "port": port, "out": str(two), "config": config.to_dict()}
    code = PROCESSES.format(**values)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    plans = [(two / f"plan-{rank}.json").read_text() for rank in (0, 1)]
    assert plans[0] == plans[1]
    alone = search(one, config, **shared())
    assert Plan.from_json(plans[0]).layers == alone.layers
    for a, b in zip(records(one), records(two), strict=True):
        assert a["step"] == b["step"]
        assert (a["loss"] or 0) == pytest.approx(b["loss"] or 0, rel=1e-5)
        assert a["cost"] == pytest.approx(b["cost"], rel=1e-5)
    first, second = (state.read(place / "checkpoints" / "step-00000006").tensors["ranks-model"] for place in (one, two))
    torch.testing.assert_close(first["logits"], second["logits"], rtol=1e-4, atol=1e-5)
