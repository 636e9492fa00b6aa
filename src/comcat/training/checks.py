"""What is wrong with a run before its first step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, ModelError, TrainingError
from ..models.profile import default_input_size
from ..storage.atomic import CONFIG_NAME
from ..storage.manifest import Manifest
from ..wording import by, some
from . import state
from .answers import Answers, answers_of
from .finetune_config import FinetuneConfig
from .settings import TrainingSettings
from .state import Saved

#: What runs write into their directory, next to checkpoints.
_WRITTEN = ("metrics.jsonl", "search.jsonl", "search.png", "samples/step-*.png")


def check_models(student: nn.Module, teacher: nn.Module | None, config: FinetuneConfig) -> Answers:
    """The answers of both.

    Raises:
        ModelError: they differ in their answers or input size, or do not answer in the kind that is said.
        TrainingError: a teacher is needed and there is none, or the student's weights are of half precision.
    """
    refuse_half(student, "student")
    if config.needs_teacher and teacher is None:
        raise TrainingError(
            "distillation and feature_blocks need a teacher; give the dense model, or set distillation none"
        )
    size, answers = default_input_size(student), answers_of(student, "student", config.outputs)
    if teacher is not None:
        if default_input_size(teacher) != size:
            raise ModelError(
                f"the teacher takes images of {by(default_input_size(teacher))} and the student of {by(size)}; "
                "use the dense model that the student was made from"
            )
        theirs = answers_of(teacher, "teacher", answers.kind)
        if theirs != answers:
            raise ModelError(
                f"the teacher has {theirs.described()} and the student {answers.described().removesuffix(' classes')}; "
                "use the dense model that the student was made from"
            )
    return answers


def check_batches(config: FinetuneConfig, batch_size: int, images: int, drop_last: bool) -> None:
    """Raise TrainingError if Mixup would meet an odd number of images: it mixes a batch with its reverse."""
    rest = 0 if drop_last else images % batch_size
    if config.mixes and (batch_size % 2 or rest % 2):
        raise TrainingError(
            f"mixup and cutmix need batches of an even number of images, not {rest if rest % 2 else batch_size}; use "
            "an even batch size and drop_last=True"
        )


def refuse_half(model: nn.Module, role: str) -> None:
    """Raise TrainingError if weights are too coarse to be trained."""
    dtypes = {p.dtype for p in model.parameters()} & {torch.float16, torch.bfloat16}
    if dtypes:
        raise TrainingError(
            f"the {role}'s weights are {dtypes.pop()}, too coarse for small updates; call {role}.float() and choose "
            "precision bf16 or fp16"
        )


def digest(model: nn.Module | None) -> str | None:
    """SHA-256 of a model's tensors."""
    if model is None:
        return None
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def check_new(out: Path) -> None:
    """Raise TrainingError if ``out`` already holds a run or a model; remains of one without checkpoints may stay."""
    if out.exists() and not out.is_dir():
        raise TrainingError(f"output '{out}' is a file; choose a directory")
    if state.checkpoints(out):
        raise TrainingError(f"'{out}' already holds a run; continue it with --resume or choose another --out")
    if (out / CONFIG_NAME).exists():
        raise TrainingError(f"'{out}' already holds a model; choose another --out")
    manifest = Manifest(out)
    foreign = state.others(out)
    foreign += [path for pattern in _WRITTEN for path in out.glob(pattern) if not _known(manifest, path)]
    if foreign:
        raise TrainingError(
            f"'{foreign[0]}' is there and was not written by comcat, or was changed since; a run would replace it. "
            "Move it away or choose another --out"
        )


def _known(manifest: Manifest, path: Path) -> bool:
    return manifest.knows(path.relative_to(manifest.folder).as_posix())


def newest(out: Path, note: Callable[[str], None]) -> Saved:
    """The newest intact checkpoint; ``note`` is told of damaged ones that are passed over.

    Raises:
        TrainingError: there is none.
    """
    found = state.checkpoints(out)
    if not found:
        finished = " (the run has finished: its model is there)" if (out / CONFIG_NAME).exists() else ""
        raise TrainingError(f"there is no checkpoint in '{out}' to resume from{finished}; start without --resume")
    for step, path in found:
        try:
            return state.read(path)
        except CheckpointError as error:
            note(f"the checkpoint of step {step} is damaged and passed over: {error}")
    raise TrainingError(f"none of the {len(found)} checkpoints in '{out}' is intact; start again with another --out")


def check_same(saved: Mapping[str, Any], config: TrainingSettings, run: Mapping[str, Any]) -> None:
    """Raise TrainingError naming what differs between a saved run and this one, unless it cannot matter."""
    if not isinstance(saved.get("config"), dict) or not isinstance(saved.get("run"), dict):
        raise TrainingError("the checkpoint does not say what run it is of; start anew with another --out")
    kept = {k: v for k, v in saved["config"].items() if k not in config.free}
    found = differences(kept, {k: v for k, v in config.to_dict().items() if k not in config.free})
    found += differences(saved["run"], json.loads(json.dumps(run)))  # as it was saved: JSON has no tuples
    if found:
        raise TrainingError(
            f"the run to resume was started with other settings: {some(found, '; ', 5)}. Use the old ones, or "
            "start anew with another --out"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``name: old, now new`` for every entry that differs."""
    found: list[str] = []
    for name in dict.fromkeys([*old, *new]):
        before, now = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += differences(before, now, f"{prefix}{name}.")
        elif before != now:
            found.append(f"{prefix}{name} was {before!r} and is now {now!r}")
    return found
