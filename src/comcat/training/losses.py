"""The terms of the loss, for one batch; all are means over the images.

    (1 - w) labelled(student, labels) + w distillation(student, teacher) + f MSE(features)

By the kind of outputs (see :mod:`comcat.evaluation.outputs`):

    classes   cross-entropy                     T² KL at temperature T, or cross-entropy with the teacher's answer
    labels    sum of binary cross-entropies     T² sum of Bernoulli KLs, or the same with the teacher's answers
    maps      cross-entropy per pixel           as classes, per pixel
    values    squared error over the spread     the same
    features  none: they have no labels         the same, and w counts as 1

Sources: Hinton et al., arXiv 1503.02531 (soft); Touvron et al., arXiv 2012.12877, Eq. 2 and 3 (soft, hard, and the
second classifier of distilled models).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError
from ..evaluation.outputs import answers, bernoulli_kl, squared_error
from ..evaluation.scores import IGNORED
from .finetune_config import FinetuneConfig


class Terms(NamedTuple):
    """The loss and what it is made of; scalars."""

    loss: Tensor
    labels: Tensor
    distillation: Tensor
    features: Tensor


class Loss:
    """The losses of one kind of outputs.

    Args:
        kind: one of :data:`comcat.evaluation.outputs.KINDS`.
        spreads: the unit of the squared error of values and features, for every tensor of the outputs.
    """

    def __init__(self, kind: str = "classes", spreads: Sequence[Tensor] | None = None) -> None:
        self.kind, self.spreads = kind, spreads

    def labelled(self, output: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """The distance from the truth; ``labels`` from :meth:`comcat.training.answers.Answers.check`, or probabilities.

        Raises:
            DataError: labels at another resolution than the outputs.
        """
        if self.kind == "classes":
            smoothing = smoothing if labels.ndim == 1 else 0.0
            return F.cross_entropy(output, labels, label_smoothing=smoothing)
        plane = output.ndim - 2
        if plane > 0 and labels.shape[-plane:] != output.shape[-plane:]:
            raise DataError(
                f"the labels have shape {tuple(labels.shape)} and the outputs {tuple(output.shape)}. Give them at the "
                "resolution of the output"
            )
        if self.kind == "labels":
            target = labels.to(output.dtype) * (1 - smoothing) + smoothing / 2
            return F.binary_cross_entropy_with_logits(output, target, reduction="sum") / len(output)
        if self.kind == "maps":
            count = (labels != IGNORED).sum().clamp_min(1)
            total = F.cross_entropy(
                answers(output), labels.flatten(), label_smoothing=smoothing, ignore_index=IGNORED, reduction="sum"
            )
            return total / count
        return self._squared([labels.to(output.dtype)], [output])

    def soft(self, student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """The divergence from the teacher; at ``T² KL(teacher / T, student / T)`` for logits."""
        ours, theirs = student[0] / temperature, teacher[0] / temperature
        if self.kind == "labels":
            return temperature**2 * bernoulli_kl(ours, theirs).sum() / len(ours)
        if self.kind in ("classes", "maps"):
            return soft_distillation(answers(student[0]), answers(teacher[0]), temperature)
        return self._squared(teacher, student)

    def hard(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The cross-entropy with the teacher's answers."""
        if self.kind == "labels":
            return self.labelled(student, teacher > 0)
        return hard_distillation(answers(student), answers(teacher))

    def _squared(self, dense: Sequence[Tensor], changed: Sequence[Tensor]) -> Tensor:
        assert self.spreads is not None
        spreads = [spread.to(out.device, out.dtype) for spread, out in zip(self.spreads, changed, strict=True)]
        return squared_error(self.kind, dense, changed, spreads)


def soft_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T² KL(softmax(teacher / T) || softmax(student / T))`` in nats; logits are (batch, classes)."""
    ours, theirs = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def hard_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the teacher's answer; logits are (batch, classes)."""
    return F.cross_entropy(student, teacher.argmax(-1))


def feature_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """Mean squared error of block outputs, (batch, tokens, D) each, averaged over the blocks."""
    return torch.stack([F.mse_loss(_full(out), _full(teacher[name])) for name, out in student.items()]).mean()


def terms(
    config: FinetuneConfig,
    outputs: Any,
    labels: Tensor | None,
    teacher: Any = None,
    features: Tensor | None = None,
    feature_factor: float = 1.0,
    kind: Loss | None = None,
) -> Terms:
    """All terms of the loss.

    Args:
        outputs: a tensor, e.g. logits (batch, classes), or a list of features; of a distilled model, the pair of both
            classifiers' logits, of which the first learns from the labels and the second from the teacher.
        labels: e.g. class indices (batch,), or probabilities (batch, classes) in which Mixup has smoothed already;
            None for features.
        teacher: its outputs.
        features: from :func:`feature_loss`.
        feature_factor: what the decay has left of ``feature_weight``, 1 to 0.
        kind: of the outputs; classes by default.
    """
    kind = kind or Loss()
    several = kind.kind == "features" and isinstance(outputs, (tuple, list))
    first, second = outputs if isinstance(outputs, (tuple, list)) and not several else (outputs, outputs)
    ours = [_full(tensor) for tensor in (second if several else [second])]
    zero = ours[0].new_zeros(())
    labelled = zero
    if labels is not None:
        labelled = kind.labelled(_full(first), labels, config.label_smoothing or 0.0)
    loss, distilled = labelled, zero
    if teacher is not None and config.distillation != "none":
        theirs = [_full(tensor) for tensor in (teacher if isinstance(teacher, (tuple, list)) else [teacher])]
        if config.distillation == "hard":
            distilled = kind.hard(ours[0], theirs[0])
        else:
            distilled = kind.soft(ours, theirs, config.distillation_temperature)
        weight = config.distillation_weight if labels is not None else 1.0
        loss = (1 - weight) * labelled + weight * distilled
    if features is not None:
        loss = loss + config.feature_weight * feature_factor * features
    return Terms(loss, labelled, distilled, zero if features is None else features)


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
