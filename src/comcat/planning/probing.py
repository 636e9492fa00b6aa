"""The method ``probe``: curves from what a few cuts of every part do to the model's outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..calibration.statistics import SAME
from ..layers.base import Layer
from ..models.modes import evaluating
from .curves import Curve, probed_curve
from .plan import Plan
from .probe import Prober, probe_key, probe_sample
from .uninformative import refuse_flat

if TYPE_CHECKING:
    from .planner import Planner

#: A layer, one of its parts, a width.
Cut = tuple[Layer, str, int]


def probed_plan(planner: Planner) -> Plan:
    """The plan of measured curves; its estimate names the divergence of the whole."""
    assert planner.calibration is not None
    images = probe_sample(planner.calibration, planner.dense["macs"])
    with evaluating(planner.model):
        prober = planner.prober(images)
        prober.record(planner.inventory)
        choices, loss = planner.solve(_curves(planner, prober, len(images)))
        divergence = prober.measure_all(planner.modules(choices))
    return planner.as_plan((choices, loss), divergence=divergence)


def probing_macs(planner: Planner) -> float:
    """About what probing costs that is yet to be measured; replayed blocks halve it."""
    assert planner.calibration is not None
    images = len(probe_sample(planner.calibration, planner.dense["macs"]))
    known = [found for key, found in planner.calibration.probes.items() if key.partition(",")[0] == f"n={images}"]
    new = [cut for cut in _cuts(planner) if not any(probe_key(*cut) in found for found in known)]
    return len(new) * images * planner.dense["macs"] / 2


def _cuts(planner: Planner) -> list[Cut]:
    """What is measured."""
    return [
        (layer, part, width)
        for layer in planner.inventory.layers
        for part in planner.full_widths(layer)
        for width in layer.widths(part, layer.levels[part])
    ]


def _curves(planner: Planner, prober: Prober, images: int) -> dict[str, dict[str, Curve]]:
    """One curve per part from a few measured levels; what the calibration already knows is not measured again."""
    assert planner.calibration is not None
    known: dict[str, float] = {}
    if planner.calibration.distance(planner.model, planner.inventory).relative <= SAME:  # they are probes of this model
        kind = "" if prober.outputs.per_class else f",{prober.outputs.kind}"
        known = planner.calibration.probes.setdefault(f"n={images}{kind}", {})
    cuts = _cuts(planner)
    measured: dict[tuple[str, str], dict[int, float]] = {}
    for done, (layer, part, width) in enumerate(cuts):
        key = probe_key(layer, part, width)
        if key not in known:
            known[key] = prober.measure(layer, planner.factors[layer.name], {part: width})
        measured.setdefault((layer.name, part), {})[width] = known[key]
        if planner.progress:
            planner.progress("probe", done + 1, len(cuts))
    inner = [cut for cut in cuts if cut[0].in_block] or cuts
    refuse_flat([known[probe_key(*cut)] for cut in inner], str(prober.outputs.kind))
    curves: dict[str, dict[str, Curve]] = {layer.name: {} for layer in planner.inventory.layers}
    for (name, part), points in measured.items():
        curves[name][part] = probed_curve(planner.factors[name], part, points)
    return curves
