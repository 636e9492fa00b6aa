"""Checkpoints of a run on disk: safetensors and JSON, complete or not there, newest first.

out/checkpoints/step-00000123/
    model.safetensors  average.safetensors  optimizer.safetensors  random.safetensors  (see comcat.training.snapshot)
    state.json         everything else, and the size and SHA-256 of the tensor files and of itself
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, TrainingError
from ..models.running import out_of_memory
from ..storage import temporary
from ..storage.atomic import sync_directory, tensor_bytes
from ..storage.manifest import Manifest, remove_emptied
from ..storage.owned import CHECKPOINT, strangers
from ..storage.reader import TENSOR_LIMIT, digest, parse_tensors, read_bytes, read_json

FORMAT = 2
FOLDER = "checkpoints"
_STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_OLD_NAME = re.compile(r"\.step-\d{8,}\.tmp")


@dataclass(frozen=True)
class Saved:
    """What one checkpoint holds.

    Attributes:
        step: finished steps.
        tensors: file stem -> name -> tensor, on the CPU.
        plain: what JSON can hold.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    plain: Mapping[str, Any]


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """(step, directory) of the complete checkpoints in ``out``, newest first; only what could be comcat's."""
    return [(step, path) for step, path in _named(out) if path.is_dir() and not strangers(path, CHECKPOINT)]


def others(out: Path) -> list[Path]:
    """Directories that are named like checkpoints and hold something else."""
    ours = {path for _, path in checkpoints(out)}
    return [path for _, path in _named(out) if path not in ours]


def _named(out: Path) -> list[tuple[int, Path]]:
    found = [(match, path) for path in (out / FOLDER).glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return sorted(((int(match[1]), path) for match, path in found), reverse=True)


def clean(out: Path) -> None:
    """Remove what a killed run left half-written."""
    temporary.sweep(out / FOLDER)
    for path in (out / FOLDER).glob(".step-*.tmp"):  # as versions before this one named them
        if _OLD_NAME.fullmatch(path.name) and path.is_dir() and not strangers(path, CHECKPOINT):
            temporary.remove(path)


def remove(out: Path, keep: int = 0) -> None:
    """Remove the checkpoints of the run in ``out`` but the ``keep`` newest; what else is there stays."""
    manifest = Manifest(out)
    for step, path in checkpoints(out)[keep:]:
        name = f"{FOLDER}/{path.name}"
        if _is_ours(path, step, name in manifest.files):
            temporary.remove(path)
            manifest.forget(name)
    remove_emptied(out, FOLDER)


def _is_ours(path: Path, step: int, recorded: bool) -> bool:
    """Whether a run of comcat wrote it, intact or not."""
    if strangers(path, CHECKPOINT):
        return False
    if recorded:
        return True
    try:  # written before there were records
        return bool(read_json(path / _STATE)["state"]["step"] == step)
    except (CheckpointError, KeyError, TypeError):
        return False


def write(out: Path, saved: Saved, keep: int) -> Path:
    """Write a checkpoint and drop all but the ``keep`` newest.

    The files are written aside and reach the disk before the directory gets its name: a kill at any moment leaves
    the older checkpoints, and at most a temporary directory that the next start removes.

    Raises:
        CheckpointError: it cannot be written; the older checkpoints are left.
    """
    path = out / FOLDER / f"step-{saved.step:08d}"
    name = f"{FOLDER}/{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest = Manifest(out)
        if path.exists() and not _is_ours(path, saved.step, name in manifest.files):
            raise CheckpointError(f"'{path}' is there and is no checkpoint of this run; move it away")
        manifest.record(name)
        temporary.sweep(path.parent)
        with temporary.new(path, directory=True) as new:
            _fill(new, saved)
            temporary.remove(path)  # a damaged one of the same step
            os.rename(new, path)
        sync_directory(path.parent)
        remove(out, keep)
    except OSError as error:
        before = checkpoints(out)
        goes_on = "continue with --resume from the one before" if before else "start again"
        fix = f"make room and {goes_on}" if error.errno in (errno.ENOSPC, errno.EDQUOT) else goes_on
        raise CheckpointError(f"the checkpoint '{path}' cannot be written: {error.strerror or error}; {fix}") from error
    return path


def _fill(directory: Path, saved: Saved) -> None:
    files = {}
    for stem, tensors in saved.tensors.items():
        content = tensor_bytes(tensors)
        files[f"{stem}.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        _write(directory / f"{stem}.safetensors", content)
    state = {"format": FORMAT, "step": saved.step, "files": files, **saved.plain}
    _write(directory / _STATE, json.dumps({"sha256": digest(state), "state": state}, sort_keys=True).encode())
    sync_directory(directory)


def read(path: Path) -> Saved:
    """Read a checkpoint and check every byte of it.

    Raises:
        CheckpointError: a file is missing, damaged or of a newer version.
    """
    try:
        document = read_json(path / _STATE)
        state = document["state"]
        if digest(state) != document["sha256"]:
            raise CheckpointError(f"'{path / _STATE}' does not match its checksum")
        if state["format"] > FORMAT:
            raise CheckpointError(f"'{path}' was written by a newer comcat; upgrade comcat")
        tensors = {}
        for name, expected in state["files"].items():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"'{path / _STATE}' names a file outside the checkpoint")
            content = read_bytes(path / name, limit=TENSOR_LIMIT)
            if len(content) != expected["bytes"] or hashlib.sha256(content).hexdigest() != expected["sha256"]:
                raise CheckpointError(f"'{path / name}' does not match its checksum")
            tensors[name.removesuffix(".safetensors")] = parse_tensors(content, f"'{path / name}'")[1]
        _check_state(state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint '{path}' cannot be read: {error}") from error
    return Saved(state["step"], tensors, state)


def _check_state(state: Any) -> None:
    """Raise ValueError unless the number of the step is one."""
    if type(state["step"]) is not int or state["step"] < 0:
        raise ValueError("its step is no number of steps")


@contextmanager
def restoring(saved: Saved) -> Iterator[None]:
    """Putting a checkpoint back: what does not fit ends in one error.

    Raises:
        TrainingError: an entry is missing, of another kind, or of another run.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, OverflowError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise TrainingError(
            f"the checkpoint of step {saved.step} does not fit this run: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}; start anew with another --out"
        ) from error


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
