"""The terms of the loss, for one batch; all are means over the images.

    (1 - w) CE(student, labels) + w distillation(student, teacher) + f MSE(features)

Sources: Hinton et al., arXiv 1503.02531 (soft); Touvron et al., arXiv 2012.12877, Eq. 2 and 3 (soft, hard, and the
second classifier of distilled models).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import FinetuneConfig


class Terms(NamedTuple):
    """The loss and what it is made of; scalars."""

    loss: Tensor
    labels: Tensor
    distillation: Tensor
    features: Tensor


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
    outputs: Tensor | tuple[Tensor, Tensor],
    labels: Tensor,
    teacher: Tensor | None = None,
    features: Tensor | None = None,
    feature_factor: float = 1.0,
) -> Terms:
    """All terms of the loss.

    Args:
        outputs: logits (batch, classes); of a distilled model, the pair of both classifiers' logits, of which the first
            learns from the labels and the second from the teacher.
        labels: class indices (batch,), or probabilities (batch, classes) in which Mixup has smoothed already.
        teacher: its logits (batch, classes).
        features: from :func:`feature_loss`.
        feature_factor: what the decay has left of ``feature_weight``, 1 to 0.
    """
    first, second = outputs if isinstance(outputs, (tuple, list)) else (outputs, outputs)
    first, second = _full(first), _full(second)
    smoothing = config.label_smoothing if labels.ndim == 1 else 0.0
    labelled = F.cross_entropy(first, labels, label_smoothing=smoothing)
    zero = labelled.new_zeros(())
    loss, distilled = labelled, zero
    if teacher is not None and config.distillation != "none":
        teacher = _full(teacher)
        if config.distillation == "hard":
            distilled = hard_distillation(second, teacher)
        else:
            distilled = soft_distillation(second, teacher, config.distillation_temperature)
        weight = config.distillation_weight
        loss = (1 - weight) * labelled + weight * distilled
    if features is not None:
        loss = loss + config.feature_weight * feature_factor * features
    return Terms(loss, labelled, distilled, zero if features is None else features)


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
