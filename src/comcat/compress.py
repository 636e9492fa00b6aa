"""Applying a plan: every planned layer is replaced by its small stand-in."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from .calibration import Calibration
from .cost import site_cost
from .factors import site_factors
from .hosts import find_sites
from .plan import Plan
from .profile import default_input_size, profile, site_shapes
from .progress import Progress
from .sites import Choice, LeftDense, check_finite
from .source import Source, describe


@dataclass(frozen=True)
class LayerReport:
    """One replaced layer: kept and full widths, what it costs before and after, the estimated relative error.

    ``error`` is dropped over total energy, summed over the parts; compare it within one kind of part only.
    """

    name: str
    kind: str
    ranks: Choice
    full: Choice
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    error: float


@dataclass(frozen=True)
class Report:
    """What :func:`compress_` did: the layers, what stayed dense and why, and the cost of the whole model."""

    layers: list[LayerReport]
    dense: list[LeftDense]
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    input_size: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"dense": [entry._asdict() for entry in self.dense]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The inverse of :meth:`to_dict`."""
        layers = [LayerReport(**layer) for layer in data["layers"]]
        dense = [LeftDense(**entry) for entry in data["dense"]]
        return cls(**{**data, "layers": layers, "dense": dense, "input_size": tuple(data["input_size"])})


@dataclass(frozen=True)
class Compression:
    """Carried by a compressed model as ``model.comcat``: how it came about, so that it can be saved."""

    plan: Plan
    report: Report | None = None
    source: Source | None = None


def compress_(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration | None = None,
    *,
    progress: Progress | None = None,
) -> Report:
    """Replace the planned layers in place.

    Layer by layer, so that the peak memory stays near that of the model. Dtype, device, mode and
    ``requires_grad`` of the replaced weights carry over.

    Args:
        model: the dense model.
        plan: what to replace, from :func:`comcat.plan` or written by hand.
        calibration: statistics of this model; without them the factors come from the weights alone.
        progress: called as ``progress("compress", layers done, layers in all)``.

    Raises:
        PlanError: the plan does not fit this model (the module is named); nothing has been changed.
        CalibrationError: the calibration belongs to another model.
        ModelError: non-finite weights.
    """
    inventory = find_sites(model)
    plan.check(inventory)
    check_finite(model)
    if calibration is not None:
        calibration.check(inventory, model)
    size = tuple(calibration.input_size if calibration is not None else default_input_size(model))
    earlier: Compression | None = getattr(model, "comcat", None)
    source = earlier.source if earlier else describe(model)
    before = profile(model, size)
    shapes = calibration.shapes if calibration is not None else site_shapes(model, inventory, size)
    moments = calibration.to(next(model.parameters()).device).moments if calibration is not None else {}
    layers = []
    for done, (name, choice) in enumerate(plan.layers.items()):
        site = inventory[name]
        made = site_factors(site, moments.get(name))
        if not choice:
            continue
        with torch.no_grad():
            for module_name, module in made.build(choice).items():
                model.set_submodule(module_name, module.train(site.module.training))
        dense, small = site_cost(site, {}, shapes[name]), site_cost(site, choice, shapes[name])
        layers.append(
            LayerReport(
                name=name,
                kind=site.kind,
                ranks=dict(choice),
                full={part: site.full[part] for part in choice},
                params_before=int(dense.params),
                params_after=int(small.params),
                macs_before=int(dense.macs),
                macs_after=int(small.macs),
                error=made.relative_error(choice),
            )
        )
        if progress:
            progress("compress", done + 1, len(plan.layers))
    after = profile(model, size)
    report = Report(layers, inventory.dense, before.params, after.params, before.macs, after.macs, size)
    whole = replace(plan, layers={**earlier.plan.layers, **plan.layers}) if earlier else plan
    model.comcat = Compression(whole, report, source)  # type: ignore[assignment]
    return report


def compress(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration | None = None,
    *,
    progress: Progress | None = None,
) -> nn.Module:
    """A compressed copy; the report is at ``.comcat.report``. Arguments and errors as :func:`compress_`."""
    small = copy.deepcopy(model)
    compress_(small, plan, calibration, progress=progress)
    return small
