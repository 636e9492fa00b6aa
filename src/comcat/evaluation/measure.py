"""Accuracy, agreement and throughput of a model, whatever its outputs are."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import DataError, ModelError
from ..models.modes import evaluating, exclusive
from ..models.running import double, explained, images_of, labels_of
from ..progress import Progress
from .metric import CountedBatches, Metric, scores
from .neighbours import Neighbours, class_numbers
from .outputs import Forward, Outputs, divergence
from .scores import SHOWN, Figure, Score, check_labels


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured.

    With a metric of the caller's, ``metrics`` holds its scores, ``outputs`` is "metric", and all but ``images`` is NaN.

    Attributes:
        top1, top5: accuracy in percent, of images or, for maps, of pixels; ``top5`` counts the best five outputs, or
            all where there are fewer. NaN for outputs that are labels or values.
        loss: mean cross-entropy in nats; mean squared error for values.
        images: number of images.
        images_per_second: speed of the model alone, without reading images; the first batch warms up and is
            left out where there are several.
        outputs: the kind of the outputs, one of :data:`comcat.evaluation.outputs.KINDS`.
        metrics: what else belongs to the kind (see :class:`comcat.evaluation.scores.Score`); empty for classes.
    """

    top1: float
    top5: float
    loss: float
    images: int
    images_per_second: float
    outputs: str = "classes"
    metrics: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; of outputs that are no classes, their kind and their metrics instead of what they lack."""
        if self.outputs == "metric":
            return {"outputs": "metric", "metrics": self.metrics, "images": self.images}
        found: dict[str, Any] = {"loss": self.loss, "images": self.images, "images_per_second": self.images_per_second}
        if not math.isnan(self.top1):
            found = {"top1": self.top1, "top5": self.top5, **found}
        return found if self.outputs == "classes" else {**found, "outputs": self.outputs, "metrics": self.metrics}

    def figures(self) -> list[Figure]:
        """The scores of this kind by name, the one that counts most first; accuracies in percent."""
        if self.outputs == "metric":
            return [Figure(name, value, "") for name, value in self.metrics.items()]
        values = {"top1": self.top1, "top5": self.top5, "loss": self.loss, **self.metrics}
        kind = "values" if "r2" in self.metrics else self.outputs
        return [Figure(label, values[name], unit) for name, label, unit in SHOWN[kind] if name in values]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Evaluation:
        """The inverse of :meth:`to_dict`."""
        nan = float("nan")
        return cls(**{"top1": nan, "top5": nan, "loss": nan, "images_per_second": nan, **data})


@dataclass(frozen=True)
class Agreement:
    """How close a model stays to its reference.

    Attributes:
        same: images on which both answer the same class, in percent; pixels of maps, single labels of labels; NaN for
            values and features.
        kl: mean Kullback-Leibler divergence from the reference's prediction to the model's, in nats; for values and
            features the squared error over the reference's own variance.
        images: number of images.
        outputs: the kind of the outputs.
        cosine: mean cosine of both outputs, of features.
        scores: of (B, D) features those of :class:`comcat.evaluation.neighbours.Neighbours`; of maps and values those
            of :class:`comcat.evaluation.scores.Score` with the reference's answers for the truth.
    """

    same: float
    kl: float
    images: int
    outputs: str = "classes"
    cosine: float | None = None
    scores: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; of outputs that are no classes, their kind and the error instead of the divergence."""
        if self.outputs == "classes":
            return {"same": self.same, "kl": self.kl, "images": self.images}
        if self.outputs in ("labels", "maps") and not math.isnan(self.same):
            return {"same": self.same, "kl": self.kl, **self.scores, "images": self.images, "outputs": self.outputs}
        cosine = {"cosine": self.cosine} if self.outputs == "features" else {}
        return {"relative_error": self.kl, **cosine, **self.scores, "images": self.images, "outputs": self.outputs}


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
) -> Evaluation:
    """Run every image of ``loader`` and compare with its label.

    Args:
        model: maps (B, C, H, W) images to its outputs, e.g. (B, classes) logits. Its mode is restored afterwards.
        loader: batches of (images, labels), or dictionaries with ``pixel_values`` and ``labels``.
        device: where to compute; the device of the model by default. The model is moved there, and back.
        amp_dtype: run under autocast in this type, e.g. ``torch.bfloat16``.
        progress: called as ``progress("evaluate", batches done, batches in all)``.
        outputs: the kind of the outputs, one of :data:`comcat.evaluation.outputs.KINDS`; by default as the model and
            its labels have it: class numbers go with classes or maps, other labels with values.
        reference: for ``outputs="features"``, which have no labels: the model whose features are the truth. The loss is
            then the error relative to them, and the speed that of both models, images included.
        evaluate: a metric of your own for everything else, called as ``evaluate(model, loader)`` with the model in
            evaluation mode, on ``device`` and without gradients. It moves the batches itself and returns a number or a
            dictionary of numbers.
        forward: called as ``forward(model, images)`` where ``model(images)`` is not what is wanted.

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
    if outputs == "features" and reference is not None:
        return _against(reference, model, loader, device, progress, forward)
    found = tally(model, loader, device, amp_dtype, progress, outputs, forward)
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
    forward: Forward | None,
) -> Evaluation:
    begin = time.perf_counter()
    found = agreement(model, reference, loader, device=device, progress=progress, outputs="features", forward=forward)
    speed, nan = found.images / max(time.perf_counter() - begin, 1e-9), float("nan")
    return Evaluation(
        nan, nan, found.kl, found.images, speed, "features", {"cosine": found.cosine or 0.0, **found.scores}
    )


@dataclass
class Tally:
    """Sums over evaluated images, which add up over processes."""

    score: Score
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
            **shown, images=self.images, images_per_second=self.speed, outputs=self.score.kind, metrics=found
        )


def tally(
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device | str | None = None,
    amp_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    outputs: str | None = None,
    forward: Forward | None = None,
) -> Tally | None:
    """The work of :func:`evaluate`; None without images."""
    images = timed = 0
    seconds = 0.0
    total = length(loader)
    score: Score | None = None
    with inference(model, device) as (device, dtype):
        read = Outputs(model, outputs, forward=forward)
        for done, batch in enumerate(loader, start=1):
            inputs, labels = images_of(batch, f"batch {done - 1}"), labels_of(batch)
            inputs, labels = inputs.to(device, dtype), labels.to(device)
            if read.kind is None:
                read.kind = _kind_by(labels)
            start = _now(device)
            output = forward_checked(model, inputs, amp_dtype, read)[0]
            elapsed = _now(device) - start
            kind = str(read.kind)
            labels = check_labels(kind, output, labels)
            score = score or Score(kind)
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
) -> Agreement:
    """Compare the predictions of two models on the images of ``loader``.

    Labels are used for the neighbours of features only, where batches have class numbers.

    Args:
        outputs: the kind of both models' outputs; by default that of the reference.
        forward: called as ``forward(model, images)`` in place of both models.

    Raises:
        ModelError: the outputs of a model are not finite, or the models have different outputs.
        DataError: there are no images.
    """
    same = kl = cosine = 0.0
    images = 0
    total = length(loader)
    neighbours, score = Neighbours(), None
    with (
        exclusive(model, reference),
        inference(model, device) as (device, dtype),
        inference(reference, device) as (_, ref_dtype),
    ):
        read = Outputs(reference, outputs, "classes", forward)
        for done, batch in enumerate(loader, start=1):
            inputs = images_of(batch, f"batch {done - 1}").to(device)
            theirs = forward_checked(reference, inputs.to(ref_dtype), None, read)
            ours = forward_checked(model, inputs.to(dtype), None, Outputs(model, read.kind, forward=forward))
            kind, count = str(read.kind), len(inputs)
            ours = comparable(ours, theirs)
            kl += count * divergence(kind, theirs, ours)
            if read.per_class:
                same += count * float(double(ours[0].argmax(1) == theirs[0].argmax(1)).mean())
            elif kind == "labels":
                same += count * float(double((ours[0] > 0) == (theirs[0] > 0)).mean())
            elif kind == "features":
                rows = zip(ours, theirs, strict=True)
                cosines = [torch.cosine_similarity(o.flatten(1), t.flatten(1)).mean() for o, t in rows]
                cosine += count * float(torch.stack(cosines).mean())
                if len(ours) == 1 and ours[0].ndim == 2:
                    neighbours.add(ours[0], theirs[0], class_numbers(batch))
            if kind in ("maps", "values"):
                score = score or Score(kind)
                score.add(ours[0], theirs[0].argmax(1) if read.per_class and theirs[0].shape[1] > 1 else theirs[0])
            images += count
            if progress:
                progress("compare", done, total)
    if not images:
        raise NoImagesError("there are no images to compare on. Check the loader")
    return Agreement(
        same=100 * same / images if read.per_class or kind == "labels" else float("nan"),
        kl=kl / images,
        images=images,
        outputs=kind,
        cosine=cosine / images if kind == "features" else None,
        scores=(score.result() if score is not None else neighbours.result()),
    )


def comparable(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Our outputs in the dtype of theirs; ModelError where they are of another shape."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        raise ModelError(
            f"the models have {ours[0].shape[1:].numel()} and {theirs[0].shape[1:].numel()} outputs. Compare models of "
            "the same classes"
        )
    return tuple(t.to(r.dtype) for t, r in zip(ours, theirs, strict=True))


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
    with exclusive(*models), contextlib.ExitStack() as stack:
        places = [stack.enter_context(inference(model, None)) for model in models]
        begin = time.perf_counter()
        while len(times[0]) < 4 or time.perf_counter() - begin < seconds:
            for model, (device, dtype), spent in zip(models, places, times, strict=True):
                batch = images.to(device, dtype)
                start = _now(device)
                with explained(batch):
                    model(batch)
                spent.append(_now(device) - start)
    return [len(images) / max(statistics.median(spent[1:]), 1e-9) for spent in times]


@contextlib.contextmanager
def inference(model: nn.Module, device: torch.device | str | None) -> Iterator[tuple[torch.device, torch.dtype]]:
    """``model`` in evaluation mode on ``device``; every submodule's mode and the device are restored."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    home = first.device
    with evaluating(model):
        try:
            target = torch.device(device) if device is not None else home
            torch.empty(0, device=target)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"there is no device {str(device)!r} here: {error}. Choose another device") from error
        try:
            with explained(torch.empty(0, device=target)):
                model.to(target)
            # Not inference mode: what a model caches in it could never be trained with.
            with torch.no_grad():
                yield target, first.dtype
        finally:
            model.to(home)


def forward_checked(
    model: nn.Module, inputs: torch.Tensor, amp_dtype: torch.dtype | None, read: Outputs
) -> tuple[torch.Tensor, ...]:
    """Outputs in at least float32, checked for kind and NaN."""
    with explained(inputs), torch.autocast(inputs.device.type, amp_dtype, enabled=amp_dtype is not None):
        found = read.run(inputs)
    if not all(torch.isfinite(tensor).all() for tensor in found):
        raise ModelError(
            "the outputs hold NaN or infinite values. Check the weights and the normalization of the images"
            + (f", or compute in float32 instead of {amp_dtype}" if amp_dtype else "")
        )
    return found


def length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader) or None  # type: ignore[arg-type]
    except TypeError:
        return None


def _now(device: torch.device) -> float:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
    return time.perf_counter()
