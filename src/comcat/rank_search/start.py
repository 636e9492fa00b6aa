"""The best training-free plan, to start a search from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..calibration.statistics import Calibration
from ..evaluation.outputs import Forward
from ..layers.base import USUAL_PARTS
from ..planning.choice import divergences
from ..planning.latency import LatencyTable
from ..planning.plan import Budget, Plan
from ..planning.planner import Planner, default_method, default_multiple, plan
from ..planning.probe import probe_sample
from ..prepared import Prepared, prepared
from ..progress import Progress


def best_training_free(
    model: nn.Module | Prepared,
    budget: Budget,
    calibration: Calibration,
    *,
    parts: Sequence[str] = USUAL_PARTS,
    rank_multiple: int | None = None,
    input_size: Sequence[int] | None = None,
    latency: LatencyTable | None = None,
    ffn: str = "auto",
    progress: Progress | None = None,
    forward: Forward | None = None,
) -> Plan:
    """The plan of method ``auto``; without held-out images that of the default method or of ``probe``.

    Of these it is the one that diverges less from the dense model on the calibration's probe images; without any, the
    default method decides.
    """
    rest = (parts, rank_multiple, input_size, progress, latency, ffn, forward)
    default = default_method(calibration)
    ready = prepared(model, calibration)
    first = plan(ready, budget, calibration, default, *rest)
    if default in ("auto", "probe") or not len(calibration.sample):
        return first
    probed = plan(ready, budget, calibration, "probe", *rest)
    multiple = default_multiple(budget) if rank_multiple is None else rank_multiple
    planner = Planner(ready, budget, calibration, default, parts, multiple, input_size, None, latency, ffn, forward)
    [divergence] = divergences(planner, [first], probe_sample(calibration, planner.dense["macs"]))
    first.estimate["divergence"] = divergence
    return first if divergence <= probed.estimate["divergence"] else probed
