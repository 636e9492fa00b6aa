"""Features: any tensors, which have no labels of their own; a reference model's are the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..neighbours import Neighbours, class_numbers
from .evaluation_task import EvaluationTask


class FeatureVectors(EvaluationTask):
    """The error relative to the reference's own variance, the ``cosine``, and for (B, D) features the neighbours."""

    kind: ClassVar = "features"
    shown: ClassVar = (
        ("loss", "rel. error", ""),
        ("cosine", "cosine", ""),
        ("neighbours", "same neighbour", "%"),
        ("knn_top1", "k-NN top-1", "%"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.neighbours = Neighbours()

    def add(self, output: Tensor, labels: Tensor) -> None:
        """Never: :meth:`check` refuses every label."""

    def result(self) -> dict[str, float]:
        return self.neighbours.result()

    def _compare(self, ours: Sequence[Tensor], theirs: Sequence[Tensor], batch: Any) -> None:
        rows = zip(ours, theirs, strict=True)
        cosines = [torch.cosine_similarity(o.flatten(1), t.flatten(1)).mean() for o, t in rows]
        self._sum("cosine", len(theirs[0]) * torch.stack(cosines).mean())
        if len(ours) == 1 and ours[0].ndim == 2:
            self.neighbours.add(ours[0], theirs[0], class_numbers(batch))

    def agreed(self) -> dict[str, Any]:
        return {**super().agreed(), "cosine": self._mean("cosine"), "scores": self.result()}
