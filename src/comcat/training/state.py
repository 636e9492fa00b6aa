"""Checkpoints of a run on disk: safetensors and JSON, complete or not there, newest first.

out/checkpoints/step-00000123/
    model.safetensors  average.safetensors  optimizer.safetensors  random.safetensors
    state.json         everything else, and the size and SHA-256 of the tensor files and of itself
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from torch import Tensor

from ..errors import CheckpointError
from ..files import tensor_bytes

FORMAT = 1
FOLDER = "checkpoints"
_STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")


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
    """(step, directory) of the complete checkpoints in ``out``, newest first."""
    folder = out / FOLDER
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return sorted(((int(match[1]), path) for match, path in found), reverse=True)


def clean(out: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in (out / FOLDER).glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def write(out: Path, saved: Saved, keep: int) -> Path:
    """Write a checkpoint and drop all but the ``keep`` newest.

    The files are written aside and reach the disk before the directory gets its name: a kill at any moment leaves
    the older checkpoints, and at most a temporary directory that the next start removes.

    Raises:
        CheckpointError: it cannot be written; the older checkpoints are left.
    """
    path = out / FOLDER / f"step-{saved.step:08d}"
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files = {}
        for stem, tensors in saved.tensors.items():
            content = tensor_bytes(tensors)
            files[f"{stem}.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            _write(temporary / f"{stem}.safetensors", content)
        state = {"format": FORMAT, "step": saved.step, "files": files, **saved.plain}
        text = json.dumps(state, sort_keys=True)
        _write(temporary / _STATE, json.dumps({"sha256": _digest(text), "state": state}, sort_keys=True).encode())
        _sync(temporary)
        shutil.rmtree(path, ignore_errors=True)  # a damaged one of the same step
        os.replace(temporary, path)
        _sync(path.parent)
        for _, old in checkpoints(out)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint '{path}' cannot be written: {error.strerror or error}; make room and continue with "
            "--resume from the one before"
        ) from error
    return path


def read(path: Path) -> Saved:
    """Read a checkpoint and check every byte of it.

    Raises:
        CheckpointError: a file is missing, damaged or of a newer version.
    """
    try:
        document = json.loads((path / _STATE).read_text())
        state = document["state"]
        if _digest(json.dumps(state, sort_keys=True)) != document["sha256"]:
            raise CheckpointError(f"'{path / _STATE}' does not match its checksum")
        if state["format"] > FORMAT:
            raise CheckpointError(f"'{path}' was written by a newer comcat; upgrade comcat")
        tensors = {}
        for name, expected in state["files"].items():
            content = (path / name).read_bytes()
            if len(content) != expected["bytes"] or hashlib.sha256(content).hexdigest() != expected["sha256"]:
                raise CheckpointError(f"'{path / name}' does not match its checksum")
            tensors[name.removesuffix(".safetensors")] = tensors_from_bytes(content)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint '{path}' cannot be read: {error}") from error
    return Saved(state["step"], tensors, state)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
