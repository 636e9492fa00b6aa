"""Evaluating a model with the work shared between the processes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..data.loading import ImageData, ImageLoader
from ..evaluation.measure import NoImagesError, Tally, evaluate, tally
from ..evaluation.results import Evaluation
from ..progress import Progress
from .process import collect

if TYPE_CHECKING:
    from accelerate import Accelerator


def share(loader: Iterable[Any], index: int, count: int) -> Iterable[Any]:
    """The part of ``loader`` that process ``index`` of ``count`` evaluates; all parts together are the whole."""
    if count == 1:
        return loader
    if isinstance(loader, ImageLoader) and isinstance(loader.data, ImageData):
        indices = list(range(loader.num_images)) if loader._indices is None else loader._indices
        part = ImageLoader(
            loader.data, batch_size=loader.batch_size, workers=loader.workers, indices=indices[index::count]
        )
        part.skipped = loader.skipped
        return part
    return islice(iter(loader), index, None, count)


def evaluate_together(
    model: nn.Module,
    loader: Iterable[Any],
    accelerator: Accelerator,
    progress: Progress | None = None,
    kind: str | None = None,
    teacher: nn.Module | None = None,
) -> Evaluation:
    """:func:`comcat.evaluate` on this process's share, put together over all processes.

    Args:
        model: on the device of this process, the same everywhere.
        kind: of its outputs; features are compared with those of ``teacher``.
    """
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    mine = loader
    if accelerator.num_processes > 1:
        rest = iter(share(loader, accelerator.process_index, accelerator.num_processes))
        first = next(rest, None)
        mine = [] if first is None else chain([first], rest)
    if kind == "features":
        assert teacher is not None
        return _compare(model, teacher, mine, accelerator, progress)
    parts = [part for part in collect(accelerator, tally(model, mine, None, amp, progress, kind)) if part is not None]
    if not parts:
        raise NoImagesError("there are no images to evaluate on. Check the loader")
    return Tally.joined(parts).result()


def _compare(
    model: nn.Module, teacher: nn.Module, loader: Iterable[Any], accelerator: Accelerator, progress: Progress | None
) -> Evaluation:
    own: Evaluation | None
    try:
        own = evaluate(model, loader, progress=progress, outputs="features", reference=teacher)
    except NoImagesError:
        own = None
    parts: list[Evaluation] = [part for part in collect(accelerator, own) if part is not None]
    images = sum(part.images for part in parts)
    if not images:
        raise NoImagesError("there are no images to evaluate on. Check the loader")

    def mean(values: list[float]) -> float:
        return sum(value * part.images for value, part in zip(values, parts, strict=True)) / images

    cosine = mean([part.metrics["cosine"] for part in parts])
    speed = sum(part.images_per_second for part in parts)
    nan = float("nan")
    return Evaluation(nan, nan, mean([part.loss for part in parts]), images, speed, "features", {"cosine": cosine})
