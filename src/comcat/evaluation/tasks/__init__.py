"""What there is to score, one class and one file for each kind of outputs."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..outputs import Forward, Outputs
from .classification import Classification
from .detection import Detection, DetectorOutputs, is_detector
from .evaluation_task import EvaluationTask
from .features import FeatureVectors
from .maps import DenseMaps
from .multi_label import MultiLabel
from .regression import Regression

TASKS: dict[str, type[EvaluationTask]] = {
    task.kind: task for task in (Classification, MultiLabel, Regression, FeatureVectors, DenseMaps, Detection)
}


def task_for(kind: str, output: Any) -> EvaluationTask:
    """An empty score sheet for outputs like this one; maps of one channel, such as depth, hold values."""
    return Regression("maps") if kind == "maps" and output.shape[1] == 1 else TASKS[kind]()


def reader(
    model: nn.Module, kind: str | None = None, unknown: str = "features", forward: Forward | None = None
) -> Outputs:
    """What calls the model and reads its outputs, see :class:`~comcat.evaluation.outputs.Outputs`.

    Raises:
        ModelError: there is no such kind, or the model does not have it.
    """
    if kind == Detection.kind or (kind is None and forward is None and is_detector(model)):
        return DetectorOutputs(model, forward)
    return Outputs(model, kind, unknown, forward)
