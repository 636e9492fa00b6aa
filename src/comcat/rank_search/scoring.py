"""What a search is worth by the user's own measure: the starting plan against the learned one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..calibration.statistics import Calibration
from ..evaluation.measure import evaluate
from ..evaluation.metric import Metric
from ..evaluation.outputs import Forward
from ..planning.plan import Plan
from ..prepared import Prepared
from ..progress import Progress


@dataclass(frozen=True)
class PlanScores:
    """Scores plans on images to evaluate on; no rank is chosen by them.

    Attributes:
        kind: of the outputs; metric: in place of the scores of this kind; forward: how models are called.
    """

    dense: Prepared
    calibration: Calibration
    images: Iterable[Any]
    kind: str
    metric: Metric | None
    forward: Forward | None
    progress: Progress | None

    def of(self, plan: Plan) -> dict[str, float]:
        """The scores of the model that a plan makes without training, by name."""
        from ..compression import compress

        small = compress(self.dense, plan, self.calibration)
        result = evaluate(
            small,
            self.images,
            outputs=self.kind,
            reference=self.dense.model,
            evaluate=self.metric,
            forward=self.forward,
            progress=self.progress,
        )
        return {figure.label: figure.value for figure in result.figures()}
