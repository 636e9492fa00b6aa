"""A run removes and replaces what it wrote, and nothing else that lies in its directory."""

from pathlib import Path

import pytest
import torch

from comcat.errors import CheckpointError, TrainingError
from comcat.training import state
from comcat.training.checks import check_new
from comcat.training.log import Log
from comcat.training.state import Saved

ONE = {"model": {"w": torch.ones(2)}}


def test_only_own_checkpoints_go(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / "step-00000002").mkdir(parents=True)
    (folder / "step-00000002" / "optimizer.pt").write_text("mine")
    (folder / "sd15.safetensors").write_text("mine")
    with pytest.raises(TrainingError, match=r"step-00000002' is there and was not written by comcat"):
        check_new(tmp_path)
    state.write(tmp_path, Saved(1, ONE, {}), keep=1)
    with pytest.raises(CheckpointError, match="is no checkpoint of this run; move it away"):
        state.write(tmp_path, Saved(2, ONE, {}), keep=1)
    state.write(tmp_path, Saved(3, ONE, {}), keep=1)
    assert [step for step, _ in state.checkpoints(tmp_path)] == [3]
    state.remove(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["sd15.safetensors", "step-00000002"]


def test_a_log_of_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for text, step in (("my own log\n", 0), ('{"step": 1, "epoch": 0.1}\n', 0), ('{"step": 1}\n', 5)):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="move"):
            Log(tmp_path, step, print)
        with pytest.raises(TrainingError, match="a run would replace it"):
            check_new(tmp_path)
        assert path.read_text() == text
