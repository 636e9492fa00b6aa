"""Evaluating a model with the work shared between the processes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..data.loading import ImageData, ImageLoader
from ..evaluate import Evaluation, evaluate
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
    model: nn.Module, loader: Iterable[Any], accelerator: Accelerator, progress: Progress | None = None
) -> Evaluation:
    """:func:`comcat.evaluate` on this process's share, and the sum over all processes.

    Args:
        model: on the device of this process, the same everywhere.
    """
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if accelerator.num_processes == 1:
        return evaluate(model, loader, amp_dtype=amp, progress=progress)
    mine = iter(share(loader, accelerator.process_index, accelerator.num_processes))
    first = next(mine, None)
    own = None if first is None else evaluate(model, chain([first], mine), amp_dtype=amp, progress=progress)
    parts: list[Evaluation] = [part for part in collect(accelerator, own) if part is not None]
    images = sum(part.images for part in parts)

    def mean(name: str) -> float:
        return sum(getattr(part, name) * part.images for part in parts) / max(images, 1)

    speed = sum(part.images_per_second for part in parts)
    return Evaluation(mean("top1"), mean("top5"), mean("loss"), images, speed)
