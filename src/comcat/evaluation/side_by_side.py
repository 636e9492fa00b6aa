"""The dense model and the compressed one on the same images: what each scores, and the images on which they differ."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..models.modes import exclusive
from ..models.running import images_of, labels_of
from ..progress import Progress
from .inference import comparable, forward_checked, inference, length
from .measure import NoImagesError, Tally
from .outputs import Outputs, divergence
from .results import Evaluation
from .tasks import task_for


@dataclass(frozen=True)
class Sample:
    """An image on which both models differ.

    Attributes:
        image: (C, H, W), as the models saw it, on the CPU.
        divergence: of the compressed model's outputs from the dense model's on this image, in the unit of the kind
            (:func:`comcat.evaluation.outputs.divergence`).
        dense, small: class and probability of both answers, of outputs that are classes.
        label: the true class, where it is known.
    """

    image: Tensor
    divergence: float
    dense: tuple[int, float] | None = None
    small: tuple[int, float] | None = None
    label: int | None = None

    @property
    def verdict(self) -> str:
        """``lost``: only the dense model is right; ``won``: only the compressed one; else ``changed``."""
        if self.label is not None and self.dense and self.small:
            if self.label == self.dense[0]:
                return "lost"
            if self.label == self.small[0]:
                return "won"
        return "changed"


@dataclass
class Comparison:
    """What :func:`compare` found.

    Attributes:
        kind: of the outputs, one of :data:`comcat.evaluation.outputs.KINDS`.
        images: number of images.
        divergence: of the compressed model from the dense one, mean over the images.
        dense, small: scores against the labels; None where there are none.
        differing: images with another answer, by verdict (see :class:`Sample`), of outputs that are classes.
        samples: those of them on which the models differ most, by verdict, the largest difference first; of other
            outputs the images on which they differ most, as "changed".
    """

    kind: str
    images: int = 0
    divergence: float = 0.0
    dense: Evaluation | None = None
    small: Evaluation | None = None
    differing: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)


def compare(
    small: nn.Module,
    dense: nn.Module,
    loader: Iterable[Any],
    *,
    labelled: bool = True,
    keep: int = 12,
    outputs: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run both models on every image of ``loader``, once.

    Args:
        small, dense: on one device; their modes are restored afterwards.
        loader: batches of (images, labels), or dictionaries with ``pixel_values`` and ``labels``; images alone do where
            nothing is ``labelled``.
        labelled: whether the labels are to be compared with; those of features never are.
        keep: samples of every verdict.
        outputs: the kind of both models' outputs; by default that of the dense model.
        progress: called as ``progress("compare", batches done, batches in all)``.

    Raises:
        ModelError: the outputs of a model are not finite, or the models have different outputs.
        DataError: there are no images, or a label that the models have no output for.
    """
    found: Comparison | None = None
    total, kept = length(loader), _Kept(keep)
    tallies: tuple[Tally, Tally] | None = None
    with exclusive(small, dense), inference(dense, None) as (device, dtype), inference(small, None) as (_, small_dtype):
        read = Outputs(dense, outputs, "classes")
        for done, batch in enumerate(loader, start=1):
            images = images_of(batch, f"batch {done - 1}")
            theirs = forward_checked(images.to(device, dtype), None, read)
            kind = str(read.kind)
            ours = forward_checked(images.to(device, small_dtype), None, Outputs(small, kind))
            ours = comparable(ours, theirs)
            found = found or Comparison(kind)
            labels = None
            if labelled and kind != "features":
                tallies = tallies or (_tally(kind, theirs[0]), _tally(kind, theirs[0]))
                labels = tallies[0].score.check(theirs[0], labels_of(batch).to(device))
                for tally, tensors in zip(tallies, (theirs, ours), strict=True):
                    tally.score.add(tensors[0], labels)
                    tally.images += len(images)
            found.divergence += len(images) * divergence(kind, theirs, ours)
            found.images += len(images)
            kept.add(kind, images, theirs, ours, labels)
            if progress:
                progress("compare", done, total)
    if found is None:
        raise NoImagesError("there are no images to compare on. Check the loader")
    found.divergence /= found.images
    found.differing, found.samples = kept.counts, kept.samples()
    if tallies is not None:
        found.dense, found.small = (tally.result() for tally in tallies)
    return found


def _tally(kind: str, output: Tensor) -> Tally:
    return Tally(task_for(kind, output), 0, float("nan"))


class _Kept:
    """The images with the largest differences, of every verdict."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.counts: dict[str, int] = {}
        self._heaps: dict[str, list[tuple[float, int, Sample]]] = {}
        self._seen = 0

    def add(
        self, kind: str, images: Tensor, theirs: Sequence[Tensor], ours: Sequence[Tensor], labels: Tensor | None
    ) -> None:
        """One batch."""
        classes = kind == "classes"
        rows: Iterable[int] = range(len(images))
        if classes:
            probabilities = [tensors[0].softmax(1).max(1) for tensors in (theirs, ours)]
            rows = torch.nonzero(probabilities[0].indices != probabilities[1].indices)[:, 0].tolist()
        for i in rows:
            here = slice(i, i + 1)
            distance = divergence(kind, [t[here] for t in theirs], [t[here] for t in ours])
            if classes:
                before, after = ((int(p.indices[i]), float(p.values[i])) for p in probabilities)
                label = None if labels is None else int(labels[i])
                self._keep(Sample(images[i], distance, before, after, label))
            else:
                self._keep(Sample(images[i], distance))
            self._seen += 1

    def _keep(self, sample: Sample) -> None:
        verdict = sample.verdict
        self.counts[verdict] = self.counts.get(verdict, 0) + 1
        heap = self._heaps.setdefault(verdict, [])
        entry = (sample.divergence, -self._seen, sample)  # of equals the first
        if len(heap) < self.most:
            heapq.heappush(heap, _owned(entry))
        elif heap and entry[:2] > heap[0][:2]:
            heapq.heapreplace(heap, _owned(entry))

    def samples(self) -> dict[str, list[Sample]]:
        return {
            verdict: [sample for _, _, sample in sorted(heap, key=lambda entry: entry[:2], reverse=True)]
            for verdict, heap in self._heaps.items()
        }


def _owned(entry: tuple[float, int, Sample]) -> tuple[float, int, Sample]:
    """With a copy of the image: a row would keep its whole batch."""
    sample = entry[2]
    image = sample.image.detach().cpu().clone()
    return *entry[:2], Sample(image, sample.divergence, sample.dense, sample.small, sample.label)
