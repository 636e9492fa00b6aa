"""What a run leaves to look at: ``metrics.jsonl``, one JSON object per line, and TensorBoard where it is installed."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..storage.atomic import atomic_file
from ..storage.manifest import Manifest
from ..storage.owned import EVENTS, strangers

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
SAMPLES = "samples"  # pictures that are drawn on the way


class Log:
    """The log of a run; without a directory, or on a process that does not write, it does nothing.

    Args:
        out: directory of the run, or None.
        step: finished steps so far; lines of later ones, from before an interruption, are dropped.
        note: told once if TensorBoard is not installed.
    """

    def __init__(self, out: Path | None, step: int, note: Callable[[str], None], name: str = METRICS) -> None:
        self._path = out / name if out is not None else None
        self._board: Any = None
        if out is None or self._path is None:
            return
        manifest = Manifest(out)
        if name not in manifest.files and not step:
            manifest.refuse_others([name])
        _drop_after(self._path, step)
        if not (out / TENSORBOARD).exists():
            manifest.record(TENSORBOARD)
        manifest.record(name)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            note("no TensorBoard log: its package is not installed (pip install 'comcat[train]')")
        else:
            self._board = SummaryWriter(out / TENSORBOARD, purge_step=step + 1 if step else None)

    def write(self, step: int, epoch: float, values: dict[str, Any]) -> None:
        """One line: the step, the epochs so far, and ``values``, of which dictionaries become groups in TensorBoard."""
        if self._path is None:
            return
        line = json.dumps({"step": step, "epoch": round(epoch, 6), **_finite(values)})
        try:
            with open(self._path, "a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise CheckpointError(f"'{self._path}' cannot be written: {error.strerror or error}") from error
        if self._board is not None:
            for name, value in _flat(values):
                self._board.add_scalar(name, value, step)

    def image(self, name: str, image: Any, step: int) -> None:
        """A picture (PIL) for TensorBoard; elsewhere it is a file already."""
        if self._board is not None:
            self._board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def sync(self) -> None:
        """Everything so far reaches the disk: a checkpoint must not be ahead of the log."""
        if self._path is not None and self._path.exists():
            with open(self._path, "rb") as file:
                os.fsync(file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def remove_board(out: Path) -> None:
    """Remove the log for TensorBoard, if this run made all that is there."""
    board = out / TENSORBOARD
    if TENSORBOARD in Manifest(out).files and board.is_dir() and not strangers(board, EVENTS):
        shutil.rmtree(board, ignore_errors=True)


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines up to ``step``; the last one may be torn.

    Raises:
        CheckpointError: other lines are no lines of a log.
    """
    if not path.exists():
        return
    kept = []
    *lines, last = path.read_text(errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        at = _step(line)
        if at is None:
            raise CheckpointError(
                f"line {number} of '{path}' is not of a log of comcat; move the file away or choose another directory"
            )
        if at <= step:
            kept.append(line + "\n")
    at = _step(last)
    if at is not None and at <= step:
        kept.append(last + "\n")
    with atomic_file(path) as file:
        file.write("".join(kept).encode())


def _step(line: str) -> int | None:
    """The step of a line of a log; None for another line."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = isinstance(entry, dict) and isinstance(entry.get("step"), int) and "epoch" in entry
    return int(entry["step"]) if known else None


def _finite(value: Any) -> Any:
    """JSON has no infinity: such numbers become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(values: dict[str, Any], group: str = "train") -> list[tuple[str, float]]:
    """(group/name, number) of all numbers; lists are for the file alone."""
    pairs: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            pairs += _flat(value, name)
        elif isinstance(value, (int, float)):
            pairs.append((f"{group}/{name}", value))
    return pairs
