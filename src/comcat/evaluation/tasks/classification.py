"""One answer in C for each image: (B, C) logits against (B,) class numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from .evaluation_task import EvaluationTask


class Classification(EvaluationTask):
    """``top1``, ``top5`` (of fewer classes all count) and the cross-entropy in nats."""

    kind: ClassVar = "classes"
    shown: ClassVar = (("top1", "top-1", "%"), ("top5", "top-5", "%"))

    def add(self, output: Tensor, labels: Tensor) -> None:
        self.hits(output, labels)

    def hits(self, output: Tensor, labels: Tensor) -> Tensor:
        """Count (n, C) logits; returns the best classes, (n, 5)."""
        self.count += len(labels)
        best = output.topk(min(5, output.shape[1]), dim=1).indices
        right = best == labels[:, None]
        self._sum("top1", right[:, 0].sum())
        self._sum("top5", right.sum())
        self._sum("loss", F.cross_entropy(output, labels, reduction="sum"))
        return best

    def result(self) -> dict[str, float]:
        n = max(self.count, 1)
        found = {name: float(self.sums[name]) / n for name in ("top1", "top5", "loss")}
        return {"top1": 100 * found["top1"], "top5": 100 * found["top5"], "loss": found["loss"]}

    def _compare(self, ours: Sequence[Tensor], theirs: Sequence[Tensor], batch: Any) -> None:
        self._same(ours[0].argmax(1) == theirs[0].argmax(1))

    def agreed(self) -> dict[str, Any]:
        return {**super().agreed(), "same": 100 * self._mean("same")}
