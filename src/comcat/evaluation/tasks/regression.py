"""Numbers: (B, C, ...) outputs against truths of their shape; maps of one channel, such as depth, are numbers too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...models.running import double
from ..scores import check_labels
from .evaluation_task import EvaluationTask


class Regression(EvaluationTask):
    """``r2`` over all outputs, ``mae``, and the mean squared error as the loss.

    Of maps of one positive value (depth; zeros are unknown) also ``rmse``, ``abs_rel`` = mean |error| / truth and
    ``delta1``, the share of pixels where the larger of both is below 1.25 times the smaller, as is usual for depth
    (Eigen, Puhrsch and Fergus, 2014).
    """

    kind: ClassVar = "values"
    shown: ClassVar = (
        ("r2", "R²", ""),
        ("mae", "mean error", ""),
        ("rmse", "RMSE", ""),
        ("abs_rel", "AbsRel", ""),
        ("delta1", "delta < 1.25", "%"),
    )

    def __init__(self, outputs: str = "values") -> None:
        super().__init__()
        self.outputs = outputs

    def check(self, output: Tensor, labels: Tensor) -> Tensor:
        return check_labels(self.outputs, output, labels)

    def add(self, output: Tensor, labels: Tensor) -> None:
        self.count += len(labels)
        output, labels = double(output), double(labels)
        axes = [0, *range(2, labels.ndim)]
        self._sum("square", (output - labels).square().sum(axes))
        self._sum("absolute", (output - labels).abs().sum(axes))
        self._sum("first", labels.sum(axes))
        self._sum("second", labels.square().sum(axes))
        if output.ndim == 4 and output.shape[1] == 1:
            self._depth(output, labels)
        self._sum("numbers", torch.tensor(float(labels.numel() // labels.shape[1])))

    def _depth(self, output: Tensor, truth: Tensor) -> None:
        self._sum("negative", (truth < 0).sum())
        output, truth = output[truth > 0], truth[truth > 0]
        self._sum("known", double(torch.tensor(truth.numel())))
        self._sum("known_square", (output - truth).square().sum())
        self._sum("relative", ((output - truth).abs() / truth).sum())
        self._sum("near", ((output < 1.25 * truth) & (truth < 1.25 * output)).sum())

    def result(self) -> dict[str, float]:
        sums = self.sums
        numbers, square = float(sums["numbers"]), torch.as_tensor(sums["square"])
        first, second = torch.as_tensor(sums["first"]), torch.as_tensor(sums["second"])
        total = (second - first.square() / numbers).sum()
        known = 0.0 if float(sums.get("negative", 1)) else float(sums["known"])
        depth = (
            {
                "rmse": (float(sums["known_square"]) / known) ** 0.5,
                "abs_rel": float(sums["relative"]) / known,
                "delta1": 100 * float(sums["near"]) / known,
            }
            if known
            else {}
        )
        return {
            **depth,
            "loss": float(square.mean()) / numbers,
            "r2": 1 - float(square.sum() / total.clamp_min(1e-300)),
            "mae": float(torch.as_tensor(sums["absolute"]).mean()) / numbers,
        }

    def _compare(self, ours: Sequence[Tensor], theirs: Sequence[Tensor], batch: Any) -> None:
        """The reference's answers are the truth."""
        self.add(ours[0], theirs[0])

    def agreed(self) -> dict[str, Any]:
        return {**super().agreed(), "scores": self.result()}
