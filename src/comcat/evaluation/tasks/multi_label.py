"""Several answers yes or no for each image: (B, C) logits against (B, C) of 0 and 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.running import double
from .evaluation_task import EvaluationTask


class MultiLabel(EvaluationTask):
    """``accuracy`` of single labels, ``mean_average_precision``, and the binary cross-entropy in nats."""

    kind: ClassVar = "labels"
    shown: ClassVar = (("mean_average_precision", "mean AP", "%"), ("accuracy", "accuracy", "%"))

    def add(self, output: Tensor, labels: Tensor) -> None:
        self.count += labels.numel()
        self._sum("loss", F.binary_cross_entropy_with_logits(output, labels, reduction="sum"))
        self._sum("accuracy", ((output > 0) == (labels > 0)).sum())
        self.kept.append((output.cpu(), labels.cpu()))

    def result(self) -> dict[str, float]:
        n = max(self.count, 1)
        output, labels = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
        return {
            "loss": float(self.sums["loss"]) / n,
            "accuracy": 100 * float(self.sums["accuracy"]) / n,
            "mean_average_precision": 100 * average_precision(output, labels),
        }

    def _compare(self, ours: Sequence[Tensor], theirs: Sequence[Tensor], batch: Any) -> None:
        self._same((ours[0] > 0) == (theirs[0] > 0))

    def agreed(self) -> dict[str, Any]:
        return {**super().agreed(), "same": 100 * self._mean("same")}


def average_precision(scores: Tensor, labels: Tensor) -> float:
    """Mean over the labels that occur of the precision at each true image, best score first; both are (n, C)."""
    order = scores.argsort(dim=0, descending=True, stable=True)
    true = double(labels.gather(0, order))
    precision = true.cumsum(0) / torch.arange(1, len(true) + 1, dtype=torch.float64)[:, None]
    occurs = true.sum(0) > 0
    return float(((precision * true).sum(0)[occurs] / true.sum(0)[occurs]).mean()) if occurs.any() else float("nan")
