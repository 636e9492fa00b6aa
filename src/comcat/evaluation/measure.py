"""Accuracy and agreement of a model, whatever its outputs are."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import DataError
from ..models.modes import exclusive
from ..progress import Progress
from .inference import forward_checked, inference, length, now
from .metric import CountedBatches, Metric, scores
from .outputs import Forward
from .results import Agreement, Evaluation
from .tasks import EvaluationTask, reader, task_for
from .zero_shot import ZeroShot


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    amp_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    outputs: str | None = None,
    reference: nn.Module | None = None,
    evaluate: Metric | None = None,
    forward: Forward | None = None,
    zero_shot: ZeroShot | None = None,
) -> Evaluation:
    """Run every image of ``loader`` and compare with its label.

    Args:
        model: maps (B, C, H, W) images to its outputs, e.g. (B, classes) logits. Its mode is restored afterwards.
        loader: batches of (images, labels), or dictionaries with ``pixel_values`` and ``labels``. The labels of a
            detector (``...ForObjectDetection`` of transformers) are as its image processor makes them: a list of
            ``{"class_labels": (n,), "boxes": (n, 4)}``, boxes as centre, width and height relative to the image.
        device: where to compute; the device of the model by default. The model is moved there, and back.
        amp_dtype: run under autocast in this type, e.g. ``torch.bfloat16``.
        progress: called as ``progress("evaluate", batches done, batches in all)``.
        outputs: the kind of the outputs, one of :data:`comcat.evaluation.outputs.KINDS`; by default as the model and
            its labels have it: class numbers go with classes or maps, other labels with values.
        reference: for ``outputs="features"``, which have no labels: the model whose features are the truth. The loss is
            then the error relative to them, and the speed that of both models, images included. Likewise for
            ``outputs="detections"``: what this model detects is the truth.
        evaluate: a metric of your own for everything else, called as ``evaluate(model, loader)`` with the model in
            evaluation mode, on ``device`` and without gradients. It moves the batches itself and returns a number or a
            dictionary of numbers.
        forward: called as ``forward(model, images)`` where ``model(images)`` is not what is wanted.
        zero_shot: the classes as text, for a model of images and text or the image tower of one; labels are numbers
            of these classes.

    Raises:
        MetricError: ``evaluate`` raises, or returns no finite number.
        ModelError: the outputs are not finite or of another kind, the model does not run on these images, or there is
            no such device.
        DataError: there are no images, an image has no label, or a label that the model has no output for.
    """
    if evaluate is not None:
        counted, nan = CountedBatches(loader), float("nan")
        with (
            inference(model, device) as (place, _),
            torch.autocast(place.type, amp_dtype, enabled=amp_dtype is not None),
        ):
            found_scores = scores(evaluate, model, counted)
        return Evaluation(nan, nan, nan, counted.images, nan, "metric", found_scores)
    if outputs in ("features", "detections") and reference is not None and zero_shot is None:
        return _against(reference, model, loader, device, progress, outputs, forward)
    if zero_shot is not None:
        outputs = "classes"
    found = tally(model, loader, device, amp_dtype, progress, outputs, forward, zero_shot)
    if found is None:
        raise NoImagesError("there are no images to evaluate on. Check the loader")
    return found.result()


class NoImagesError(DataError):
    """A loader without images."""


def _against(
    reference: nn.Module,
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device | str | None,
    progress: Progress | None,
    outputs: str,
    forward: Forward | None,
) -> Evaluation:
    begin = time.perf_counter()
    found = agreement(model, reference, loader, device=device, progress=progress, outputs=outputs, forward=forward)
    speed, nan = found.images / max(time.perf_counter() - begin, 1e-9), float("nan")
    metrics = {"cosine": found.cosine or 0.0, **found.scores} if outputs == "features" else found.scores
    return Evaluation(nan, nan, found.kl, found.images, speed, outputs, metrics)


@dataclass
class Tally:
    """Sums over evaluated images, which add up over processes."""

    score: EvaluationTask
    images: int
    speed: float  # images per second

    @classmethod
    def joined(cls, parts: Sequence[Tally]) -> Tally:
        """The sum of several processes' tallies; the first one is changed."""
        first, *others = parts
        for other in others:
            first.score.join(other.score)
        return cls(first.score, sum(part.images for part in parts), sum(part.speed for part in parts))

    def result(self) -> Evaluation:
        found = self.score.result()
        shown = {name: found.pop(name, float("nan")) for name in ("top1", "top5", "loss")}
        return Evaluation(
            **shown, images=self.images, images_per_second=self.speed, outputs=self.score.outputs, metrics=found
        )


def tally(
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device | str | None = None,
    amp_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    outputs: str | None = None,
    forward: Forward | None = None,
    zero_shot: ZeroShot | None = None,
) -> Tally | None:
    """The work of :func:`evaluate`; None without images."""
    images = timed = 0
    seconds = 0.0
    total = length(loader)
    score: EvaluationTask | None = None
    with inference(model, device) as (device, dtype):
        if zero_shot is not None:
            forward = zero_shot.classifier(model)
        read = reader(model, outputs, forward=forward)
        for done, batch in enumerate(loader, start=1):
            inputs, labels = read.inputs(batch, f"batch {done - 1}").to(device, dtype), read.labels(batch, device)
            if read.kind is None:
                read.kind = _kind_by(labels)
            start = now(device)
            output = forward_checked(inputs, amp_dtype, read)[0]
            elapsed = now(device) - start
            kind = str(read.kind)
            score = score or task_for(kind, output)
            labels = score.check(output, labels)
            if done == 1 and total != 1:
                warm_up = (elapsed, len(labels))
            else:
                seconds, timed = seconds + elapsed, timed + len(labels)
            score.add(output, labels)
            images += len(labels)
            if progress:
                progress("evaluate", done, total)
    if score is None:
        return None
    if not timed:  # a loader of unknown length that held a single batch
        seconds, timed = warm_up
    return Tally(score, images, timed / max(seconds, 1e-9))


def _kind_by(labels: torch.Tensor) -> str | None:
    """Class numbers, one an image or a pixel, say what the outputs are; other labels leave it to the model."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return None
    return {1: "classes", 3: "maps"}.get(labels.ndim)


def agreement(
    model: nn.Module,
    reference: nn.Module,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    outputs: str | None = None,
    forward: Forward | None = None,
    zero_shot: ZeroShot | None = None,
) -> Agreement:
    """Compare the predictions of two models on the images of ``loader``.

    Labels are used for the neighbours of features only, where batches have class numbers.

    Args:
        outputs: the kind of both models' outputs; by default that of the reference.
        forward: called as ``forward(model, images)`` in place of both models.
        zero_shot: the classes as text, for models of images and text.

    Raises:
        ModelError: the outputs of a model are not finite, or the models have different outputs.
        DataError: there are no images.
    """
    images = 0
    total = length(loader)
    task: EvaluationTask | None = None
    with (
        exclusive(model, reference),
        inference(model, device) as (device, dtype),
        inference(reference, device) as (_, ref_dtype),
    ):
        how = [forward, forward]
        if zero_shot is not None:
            outputs, how = "classes", [zero_shot.classifier(model), zero_shot.classifier(reference)]
        read = reader(reference, outputs, "classes", how[1])
        for done, batch in enumerate(loader, start=1):
            inputs = read.inputs(batch, f"batch {done - 1}")
            theirs = forward_checked(inputs.to(device, ref_dtype), None, read)
            ours = forward_checked(inputs.to(device, dtype), None, reader(model, read.kind, forward=how[0]))
            task = task or task_for(str(read.kind), theirs[0])
            task.compare(ours, theirs, batch)
            images += len(inputs)
            if progress:
                progress("compare", done, total)
    if task is None:
        raise NoImagesError("there are no images to compare on. Check the loader")
    return Agreement(**task.agreed(), images=images, outputs=task.outputs)
