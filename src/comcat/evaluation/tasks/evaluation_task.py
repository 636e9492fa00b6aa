"""One task of evaluation: sums over batches, against labels or against the answers of a reference model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...models.running import double
from ..inference import comparable
from ..outputs import divergence
from ..scores import check_labels


class EvaluationTask(ABC):
    """The scores of one kind of outputs.

    Attributes:
        kind: one of :data:`comcat.evaluation.outputs.KINDS`, or ``detections``.
        shown: name, label and unit of the scores, the most telling one first.
        sums: by name; of what :meth:`join` adds up.
    """

    kind: ClassVar[str]
    shown: ClassVar[tuple[tuple[str, str, str], ...]]

    def __init__(self) -> None:
        self.outputs = self.kind
        self.count = 0
        self.sums: dict[str, float | Tensor] = {}
        self.kept: list[Any] = []

    # -- against labels ------------------------------------------------------------------------------------------

    def check(self, output: Any, labels: Any) -> Any:
        """The labels of a batch as :meth:`add` takes them.

        Raises:
            DataError: they do not fit the output.
        """
        return check_labels(self.kind, output, labels)

    @abstractmethod
    def add(self, output: Any, labels: Any) -> None:
        """One batch."""

    @abstractmethod
    def result(self) -> dict[str, float]:
        """All scores by name, accuracies in percent."""

    # -- against a reference -------------------------------------------------------------------------------------

    def compare(self, ours: Any, theirs: Any, batch: Any) -> None:
        """The outputs of a model and of its reference for one batch.

        Raises:
            ModelError: they are of different shapes.
        """
        ours, count = comparable(ours, theirs), len(theirs[0])
        self._sum("compared", torch.tensor(float(count)))
        self._sum("divergence", torch.tensor(count * divergence(self.outputs, theirs, ours)))
        self._compare(ours, theirs, batch)

    @abstractmethod
    def _compare(self, ours: Sequence[Tensor], theirs: Sequence[Tensor], batch: Any) -> None:
        """What this kind looks at besides the divergence."""

    def agreed(self) -> dict[str, Any]:
        """What :class:`comcat.Agreement` says of this kind."""
        return {"same": float("nan"), "kl": self._mean("divergence")}

    # -- sums ----------------------------------------------------------------------------------------------------

    def join(self, other: EvaluationTask) -> None:
        """Add what ``other`` has gathered."""
        self.count += other.count
        self.kept += other.kept
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + (value.cpu() if value.ndim else float(value))

    def _same(self, same: Tensor) -> None:
        """Equal answers of a batch, as shares of each image."""
        self._sum("same", double(same).flatten(1).mean(1).sum() if same.ndim > 1 else same.sum())

    def _mean(self, name: str) -> float:
        return float(self.sums[name]) / float(self.sums["compared"])
