"""What an evaluation found, and how close a model is to its reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .scores import Figure
from .tasks import TASKS


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
        outputs: the kind of the outputs, one of :data:`comcat.evaluation.outputs.KINDS`, or "detections".
        metrics: what else belongs to the kind (see :mod:`comcat.evaluation.tasks`); empty for classes.
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
        found = _measured(found)  # no loss, or no speed
        if self.outputs == "classes":
            return found
        return {**found, "outputs": self.outputs, "metrics": _measured(self.metrics)}

    def figures(self) -> list[Figure]:
        """The scores of this kind by name, the one that counts most first; accuracies in percent."""
        if self.outputs == "metric":
            return [Figure(name, value, "") for name, value in self.metrics.items()]
        values = {"top1": self.top1, "top5": self.top5, "loss": self.loss, **self.metrics}
        kind = "values" if "r2" in self.metrics else self.outputs
        return [Figure(label, values[name], unit) for name, label, unit in TASKS[kind].shown if name in values]

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
        scores: of (B, D) features those of :class:`comcat.evaluation.neighbours.Neighbours`; of maps, values and
            detections those of :mod:`comcat.evaluation.tasks` with the reference's answers for the truth.
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
        scores = _measured(self.scores)
        if self.outputs in ("labels", "maps") and not math.isnan(self.same):
            return {"same": self.same, "kl": self.kl, **scores, "images": self.images, "outputs": self.outputs}
        if self.outputs == "detections":
            return {**scores, "images": self.images, "outputs": self.outputs}
        cosine = {"cosine": self.cosine} if self.outputs == "features" else {}
        return {"relative_error": self.kl, **cosine, **scores, "images": self.images, "outputs": self.outputs}


def _measured(values: dict[str, Any]) -> dict[str, Any]:
    """Without what images could not tell, such as the precision of labels that none of them has: JSON has no NaN."""
    return {name: value for name, value in values.items() if not math.isnan(value)}
