"""One answer in C for each pixel: (B, C, H, W) logits against (B, H, W) class numbers, 255 counts for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...models.running import double
from ..scores import IGNORED
from .classification import Classification


class DenseMaps(Classification):
    """The scores of classes per pixel, and ``mean_iou`` over the classes that occur."""

    kind: ClassVar = "maps"
    shown: ClassVar = (("mean_iou", "mean IoU", "%"), ("top1", "pixels", "%"))

    def add(self, output: Tensor, labels: Tensor) -> None:
        valid, C = labels != IGNORED, output.shape[1]
        output, labels = output.movedim(1, -1)[valid], labels[valid]
        best = self.hits(output, labels)
        self._sum("confusion", double(torch.bincount(labels * C + best[:, 0], minlength=C * C).view(C, C)))

    def result(self) -> dict[str, float]:
        confusion = torch.as_tensor(self.sums["confusion"])
        union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        return {**super().result(), "mean_iou": 100 * float((confusion.diagonal() / union)[union > 0].mean())}

    def _compare(self, ours: Sequence[Tensor], theirs: Sequence[Tensor], batch: Any) -> None:
        """The reference's answers are the truth."""
        super()._compare(ours, theirs, batch)
        self.add(ours[0], theirs[0].argmax(1))

    def agreed(self) -> dict[str, Any]:
        return {**super().agreed(), "scores": self.result()}
