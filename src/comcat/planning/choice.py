"""Method ``auto``: every method makes its plan, and images that no statistics have seen say which one is taken.

Which method is best depends on the model: spectra are in units of the loss but to second order, probes are measured but
on few images, and an equal share of everything is hard to beat where all layers are alike. What each plan is for is to
stay close to the dense model, and that can be measured: the divergence of the whole compressed model, in the unit that
``probe`` uses, costs a pass over the held-out images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import BudgetError, PlanError
from ..models.batches import Batch
from ..models.modes import evaluating
from .plan import Plan
from .probing import probing_macs

if TYPE_CHECKING:
    from .planner import Planner

#: MACs of probing that are worth it, on a CPU (some ten minutes on two cores) and on an accelerator.
AFFORDABLE = {"cpu": 4e13, "other": 4e15}
#: MACs of measuring one plan; large models are measured on fewer of the images, on 32 at least.
_MEASURING = 4e12


def best_plan(planners: Sequence[Planner], images: Batch) -> Plan:
    """The plan whose model diverges least from the dense one on ``images``.

    Its estimate names the ``divergence``, and that of the plans which it was chosen from as ``divergence_METHOD``.

    Args:
        planners: of the same model and budget, one for each method. Probing is left out where it takes too long, and a
            method where its smallest widths do not meet the budget (``uniform`` leaves the classifier dense).
        images: or what else the model is called with, which the statistics have not seen.

    Raises:
        BudgetError: no method meets the budget. PlanError: as the methods, or no divergence is finite.
    """
    plans: list[Plan] = []
    refusal: BudgetError | None = None
    for planner in planners:
        try:
            if planner.method != "probe" or affordable(planner):
                plans.append(planner.plan())
        except BudgetError as error:
            refusal = error  # of the last: those before it have fewer parts to cut
    if not plans:
        raise refusal or PlanError("no method of planning is left to choose from; name one")
    found = {plan.method: value for plan, value in zip(plans, divergences(planners[0], plans, images), strict=True)}
    best = min(plans, key=lambda plan: found[plan.method] if math.isfinite(found[plan.method]) else math.inf)
    if not math.isfinite(found[best.method]):
        raise PlanError(
            "the models of all plans return NaN or infinite outputs on the held-out images; ask for a larger budget, "
            "or calibrate on more images"
        )
    best.estimate["divergence"] = found[best.method]
    best.estimate |= {f"divergence_{method}": value for method, value in found.items() if math.isfinite(value)}
    return best


def comparison(plan: Plan) -> str | None:
    """Which method of planning won and by how much, where several were compared."""
    compared = {
        name.removeprefix("divergence_"): value
        for name, value in plan.estimate.items()
        if name.startswith("divergence_") and name.removeprefix("divergence_") != plan.method
    }
    if not compared:
        return None
    others = ", ".join(f"{name} {value:.4g}" for name, value in sorted(compared.items(), key=lambda item: item[1]))
    return (
        f"widths by {plan.method}, which stays closest to the dense model on held-out images: divergence "
        f"{plan.estimate['divergence']:.4g}, against {others}"
    )


def divergences(planner: Planner, plans: Sequence[Plan], images: Batch | Tensor) -> list[float]:
    """How far the model of every plan is from the dense one, on these inputs or (n, C, H, W) images."""
    with evaluating(planner.model):
        count = max(32, int(_MEASURING / max(planner.dense["macs"], 1)))
        prober = planner.prober(images[:count])
        return [prober.measure_all(planner.modules(plan.layers)) for plan in plans]


def affordable(planner: Planner) -> bool:
    """Whether what a probing planner has yet to measure is worth the wait."""
    device = next(planner.model.parameters()).device.type
    return probing_macs(planner) <= AFFORDABLE["cpu" if device == "cpu" else "other"]
