"""Recorded calls of a denoiser, one safetensors file each: what statistics, plans and distillation are made from.

DIR/recording.json         what was recorded, and how
DIR/call-00000.safetensors the inputs of one call
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, PositiveInt

from ..errors import CalibrationError
from ..models.batches import Batch, comparable
from ..models.call_files import packed, unpacked
from ..storage.atomic import atomic_file, tensor_bytes
from ..storage.reader import parse_json, read_json, read_tensors, validated

RECORDING_NAME = "recording.json"
_FORMAT = 1
_FIXED = "fixed::"


class Settings(BaseModel):
    """How it was recorded.

    Attributes:
        component, model: which part of the pipeline, and its class.
        prompts: how many; seeds: of the pictures of each; steps, guidance_scale: as they were asked for, None where
            the pipeline chose; share: of the calls of every picture; calls: that were made in all.
    """

    component: str
    model: str
    prompts: PositiveInt
    seeds: list[int]
    steps: int | None
    guidance_scale: float | None
    share: float
    calls: PositiveInt


class _Index(BaseModel):
    comcat_recording: int
    settings: Settings
    rows: list[PositiveInt]  # of every file
    groups: list[int]  # files of one group hold rows that can be joined


class Recording:
    """Calls in a directory, read when they are asked for.

    Iterating gives one :class:`~comcat.models.batches.Batch` for each recorded call, which :func:`comcat.calibrate`
    takes; an example is a row of one.

    Args:
        folder: that :class:`Writer` has filled.

    Attributes:
        settings: how it was recorded; examples: how many there are in all.

    Raises:
        CalibrationError: there is none, of a newer version, or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        data = read_json(self.folder / RECORDING_NAME, what="recording", error=CalibrationError)
        where = f"the recording '{self.folder}'"
        if not isinstance(data, dict) or not isinstance(data.get("comcat_recording"), int):
            raise CalibrationError(f"{where} is none of comcat's")
        if data["comcat_recording"] > _FORMAT:
            raise CalibrationError(f"{where} has format {data['comcat_recording']}; upgrade comcat to read it")
        self._index: _Index = validated(_Index, data, where, CalibrationError)
        if not self._index.rows or len(self._index.rows) != len(self._index.groups):
            raise CalibrationError(f"{where} is damaged: it lists no calls; record again")
        self.settings = self._index.settings
        self.examples = sum(self._index.rows)
        self._places = [(file, row) for file, rows in enumerate(self._index.rows) for row in range(rows)]

    def __len__(self) -> int:
        return len(self._index.rows)

    def __iter__(self) -> Iterator[Batch]:
        return map(self._read, range(len(self)))

    def __repr__(self) -> str:
        s = self.settings
        return f"Recording({self.examples} examples of {s.model}, {s.prompts} prompts, {s.share:.0%} of the calls)"

    def batch(self, places: Sequence[int]) -> Batch:
        """These examples, by their numbers; they must be of one :meth:`groups`."""
        by_file: dict[int, list[int]] = {}
        for place in places:
            file, row = self._places[place]
            by_file.setdefault(file, []).append(row)
        return Batch.joined([self._read(file).kept(rows) for file, rows in by_file.items()])

    def groups(self) -> list[list[int]]:
        """Numbers of examples that can be joined; more than one list where their inputs differ in length."""
        found: dict[int, list[int]] = {}
        for place, (file, _) in enumerate(self._places):
            found.setdefault(self._index.groups[file], []).append(place)
        return list(found.values())

    def _read(self, number: int) -> Batch:
        path = self.folder / _file(number)
        metadata, tensors = read_tensors(path, what="recorded call", error=CalibrationError)
        name = f"'{path}'"
        data = parse_json(metadata.get("comcat_call", "null"), name, CalibrationError)
        shared = {key.removeprefix(_FIXED): t for key, t in tensors.items() if key.startswith(_FIXED)}
        own = {key: t for key, t in tensors.items() if not key.startswith(_FIXED)}
        if not isinstance(data, dict) or not own or len({len(t) for t in own.values()}) != 1:
            raise CalibrationError(f"{name} is damaged; record again")
        return Batch(own, unpacked(data, shared, name, CalibrationError))


class Writer:
    """Writes recorded calls one by one; nothing but the last is held in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[int] = []
        self.groups: list[int] = []
        self._signatures: list[Any] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, batch: Batch) -> None:
        """Raises CalibrationError where an input is NaN or infinite."""
        for name, tensor in batch.tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CalibrationError(
                    f"the pipeline hands its denoiser NaN or infinite values as {name!r}; check the checkpoint, or "
                    "record in a wider precision"
                )
        fixed, shared = packed(batch.fixed)
        tensors = {**batch.tensors, **{_FIXED + name: tensor for name, tensor in shared.items()}}
        with atomic_file(self.folder / _file(len(self.rows))) as file:
            file.write(tensor_bytes(tensors, {"comcat_call": json.dumps(fixed)}))
        signature = comparable(batch.signature)
        if signature not in self._signatures:
            self._signatures.append(signature)
        self.rows.append(len(batch))
        self.groups.append(self._signatures.index(signature))

    def close(self, settings: Settings) -> Recording:
        """The index, after which the recording is whole."""
        index = _Index(comcat_recording=_FORMAT, settings=settings, rows=self.rows, groups=self.groups)
        with atomic_file(self.folder / RECORDING_NAME) as file:
            file.write((index.model_dump_json(indent=1) + "\n").encode())
        return Recording(self.folder)


def _file(number: int) -> str:
    return f"call-{number:05d}.safetensors"
