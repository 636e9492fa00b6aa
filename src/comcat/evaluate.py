"""Accuracy, agreement and throughput of a classifier."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .errors import DataError, ModelError
from .progress import Progress


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured.

    Attributes:
        top1, top5: accuracy in percent; ``top5`` counts the best five outputs, or all where there are fewer.
        loss: mean cross-entropy in nats.
        images: number of images.
        images_per_second: speed of the model alone, without reading images; the first batch warms up and is
            left out where there are several.
    """

    top1: float
    top5: float
    loss: float
    images: int
    images_per_second: float

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


@dataclass(frozen=True)
class Agreement:
    """How close a model stays to its reference.

    Attributes:
        same: images on which both answer the same class, in percent.
        kl: mean Kullback-Leibler divergence from the reference's prediction to the model's, in nats.
        images: number of images.
    """

    same: float
    kl: float
    images: int

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    amp_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Classify every image of ``loader`` and compare with its label.

    Args:
        model: maps (B, C, H, W) images to (B, classes) logits. Its mode is restored afterwards.
        loader: batches of (images, labels).
        device: where to compute; the device of the model by default. The model is moved there, and back.
        amp_dtype: run under autocast in this type, e.g. ``torch.bfloat16``.
        progress: called as ``progress("evaluate", batches done, batches in all)``.

    Raises:
        ModelError: the logits are not finite, or not (B, classes).
        DataError: there are no images, an image has no label, or a label that the model has no output for.
    """
    correct1 = correct5 = images = timed = 0
    loss = seconds = 0.0
    total = _length(loader)
    with _inference(model, device) as (device, dtype):
        for done, batch in enumerate(loader, start=1):
            inputs, labels = _split(batch)
            inputs, labels = inputs.to(device, dtype), labels.to(device)
            start = _now(device)
            logits = _logits(model, inputs, amp_dtype)
            elapsed = _now(device) - start
            _check(logits, labels)
            if done == 1 and total != 1:
                warm_up = (elapsed, len(labels))
            else:
                seconds, timed = seconds + elapsed, timed + len(labels)
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (batch, 5)
            hits = best == labels[:, None]
            correct1 += int(hits[:, 0].sum())
            correct5 += int(hits.sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            images += len(labels)
            if progress:
                progress("evaluate", done, total)
    if not images:
        raise DataError("there are no images to evaluate on. Check the loader")
    if not timed:  # a loader of unknown length that held a single batch
        seconds, timed = warm_up
    return Evaluation(
        top1=100 * correct1 / images,
        top5=100 * correct5 / images,
        loss=loss / images,
        images=images,
        images_per_second=timed / max(seconds, 1e-9),
    )


def agreement(
    model: nn.Module,
    reference: nn.Module,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Agreement:
    """Compare the predictions of two models on the images of ``loader``; labels are not used.

    Raises:
        ModelError: the logits of a model are not finite, or the models have different outputs.
        DataError: there are no images.
    """
    same = images = 0
    kl = 0.0
    total = _length(loader)
    with _inference(model, device) as (device, dtype), _inference(reference, device) as (_, ref_dtype):
        for done, batch in enumerate(loader, start=1):
            inputs = (batch if isinstance(batch, torch.Tensor) else batch[0]).to(device)
            ours = _logits(model, inputs.to(dtype), None)
            theirs = _logits(reference, inputs.to(ref_dtype), None)
            if ours.shape != theirs.shape:
                raise ModelError(
                    f"the models have {ours.shape[-1]} and {theirs.shape[-1]} outputs. Compare models of the "
                    "same classes"
                )
            same += int((ours.argmax(1) == theirs.argmax(1)).sum())
            p, q = theirs.log_softmax(1), ours.log_softmax(1)
            kl += float(F.kl_div(q, p, log_target=True, reduction="sum"))
            images += len(inputs)
            if progress:
                progress("compare", done, total)
    if not images:
        raise DataError("there are no images to compare on. Check the loader")
    return Agreement(same=100 * same / images, kl=kl / images, images=images)


def throughput(models: Sequence[nn.Module], images: torch.Tensor, seconds: float = 2.0) -> list[float]:
    """Images per second of each model, measured in turns, so that a busy machine slows all of them alike.

    Args:
        models: all on one device.
        images: one batch, (B, C, H, W).
        seconds: time to spend on all models together, after one pass each to warm up; at least three turns.

    Returns:
        The speed at the median time per batch, for each model.
    """
    times: list[list[float]] = [[] for _ in models]
    with contextlib.ExitStack() as stack:
        places = [stack.enter_context(_inference(model, None)) for model in models]
        begin = time.perf_counter()
        while len(times[0]) < 4 or time.perf_counter() - begin < seconds:
            for model, (device, dtype), spent in zip(models, places, times, strict=True):
                batch = images.to(device, dtype)
                start = _now(device)
                model(batch)
                spent.append(_now(device) - start)
    return [len(images) / max(statistics.median(spent[1:]), 1e-9) for spent in times]


@contextlib.contextmanager
def _inference(model: nn.Module, device: torch.device | str | None) -> Iterator[tuple[torch.device, torch.dtype]]:
    """``model`` in evaluation mode on ``device``; every submodule's mode and the device are restored."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    home = first.device
    device = torch.device(device) if device is not None else home
    training = [m for m in model.modules() if m.training]
    try:
        model.eval().to(device)
        # Not inference mode: what a model caches in it could never be trained with.
        with torch.no_grad():
            yield device, first.dtype
    finally:
        model.to(home)
        for module in training:
            module.training = True


def _logits(model: nn.Module, inputs: torch.Tensor, amp_dtype: torch.dtype | None) -> torch.Tensor:
    """Logits in at least float32, checked for shape and NaN."""
    with torch.autocast(inputs.device.type, amp_dtype, enabled=amp_dtype is not None):
        logits = model(inputs)
    if isinstance(logits, tuple):  # distilled models in training mode; here a host of its own
        logits = logits[0]
    if logits.ndim != 2 or not logits.shape[1]:
        raise ModelError(
            f"the model returns a tensor of shape {tuple(logits.shape)}, not (batch, classes). Give it a classifier"
        )
    if not torch.isfinite(logits).all():
        raise ModelError(
            "the logits hold NaN or infinite values. Check the weights and the normalization of the images"
            + (f", or compute in float32 instead of {amp_dtype}" if amp_dtype else "")
        )
    return logits if logits.dtype == torch.float64 else logits.float()


def _check(logits: torch.Tensor, labels: torch.Tensor) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise DataError("some images have no label (-1). Evaluate on a labelled split")
    if high >= logits.shape[1]:
        raise DataError(
            f"the label {high} is none of the model's, which has {logits.shape[1]} outputs "
            f"(0 to {logits.shape[1] - 1}). Use the data that the model was trained for"
        )


def _split(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], torch.Tensor):
        return batch[0], batch[1]
    raise DataError("evaluation needs batches of (images, labels). Give a loader that delivers both")


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader) or None  # type: ignore[arg-type]
    except TypeError:
        return None


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
