"""From a model, a calibration and a budget to a plan: the methods that value the components.

* ``uniform``: every part keeps the same fraction. The classifier stays dense beside other parts: its rank is bounded by
  the number of classes, and an equal share of that costs far more than it saves.
* ``spectrum``: energies of the factors; in units of the loss where the calibration has output gradients, otherwise
  relative to each part's own energy (raw energies of different layers and parts do not compare).
* ``probe``: the measured divergence when one part of one layer is cut to a few levels, interpolated along the part's
  energy.
* ``auto``: the plan of these three whose model stays closest to the dense one on held-out images
  (:mod:`comcat.planning.choice`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from ..calibration.statistics import Calibration
from ..errors import PlanError
from ..evaluation.outputs import Forward
from ..layers.base import PARTS, USUAL_PARTS, Choice, Inventory, Layer, check_parts
from ..models.batches import Batch
from ..models.modes import exclusive
from ..models.running import exact, still
from ..prepared import Prepared, prepared
from ..progress import Progress
from .allocate import Options, allocate, layer_options, out_of_reach
from .choice import best_plan
from .curves import Curve, spectrum_curve, uniform_curve
from .latency import LatencyTable
from .plan import Budget, Plan
from .probe import Prober
from .probing import probed_plan
from .uninformative import refuse_zero_gradients
from .units import UNITS, Unit, unit_of, units_with

METHODS = ("uniform", "spectrum", "probe", "auto")
#: Forms of the FFN: the better one for each layer, or one for all.
FFN_FORMS = ("auto", "low-rank", "neurons")
Curves = dict[str, dict[str, Curve]]
Solution = tuple[dict[str, Choice], float]


def plan(
    model: nn.Module | Prepared,
    budget: Budget,
    calibration: Calibration | None = None,
    method: str | None = None,
    parts: Sequence[str] | None = None,
    rank_multiple: int | None = None,
    input_size: Sequence[int] | None = None,
    progress: Progress | None = None,
    latency: LatencyTable | None = None,
    ffn: str = "auto",
    forward: Forward | None = None,
    stock: bool = False,
) -> Plan:
    """Choose the widths of every layer so that the model meets the budget from below.

    Args:
        model: the dense model, or what :func:`comcat.prepare` made of it; it is not changed.
        budget: fraction or number of parameters, MACs or nanoseconds, met from below within 0.5 %.
        calibration: statistics of this model; without them only weights are looked at.
        method: one of :data:`METHODS`; default ``"auto"`` with a calibration that has held-out images (calibrated on
            more than 256), else ``"spectrum"`` where it has output gradients, ``"probe"`` where it has images,
            ``"uniform"`` without a calibration.
        parts: which of :data:`comcat.layers.base.PARTS` may be reduced; default all, but for ``uniform`` no rotary
            ``pairs``.
        rank_multiple: every width is a multiple of this; default 8, which suits tensor cores and SIMD, for a latency
            budget, else 1. Times between the widths of the latency table are interpolated, and widths off a multiple of
            8 can take longer than that.
        input_size: (C, H, W) at which MACs count, default that of the calibration or of the model.
        progress: called as ``progress(stage, done, total)``.
        latency: timings from :func:`comcat.measure_latency`; a latency budget needs them, and the plan's estimate
            names the latency wherever they are given.
        ffn: ``low-rank`` or ``neurons`` for all FFNs that have this form; default the better one for each (for
            ``uniform``: neurons where there is a calibration to refit them on).
        forward: how the model is called where it is measured, as in :func:`comcat.calibrate`.
        stock: one width for all attention layers (``qk`` = ``vo``) and one for all FFNs (``neurons``), the classifier
            dense, as :func:`comcat.export_stock` needs them, and as near to the budget as that allows; what the model's
            constructor cannot narrow stays dense, and a warning says so.

    Raises:
        BudgetError: out of reach (the smallest reachable figure is named), already met by the dense model, or of
            latency without a table.
        PlanError: unknown method or part, ``"probe"`` or ``"auto"`` without calibration images, or nothing that a stock
            form could narrow.
        CalibrationError: the calibration or the latency table belongs to another model.
    """
    method = method or default_method(calibration)
    if method not in METHODS:
        raise PlanError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    if method == "probe" and (calibration is None or not len(calibration.sample)):
        raise PlanError("method 'probe' measures on images: give a calibration made with probe_images > 0")
    held_out = calibration.unseen if calibration is not None else None
    if method == "auto" and held_out is None:
        raise PlanError(
            "method 'auto' compares plans on images that the statistics have not seen, and the calibration has none: "
            "calibrate on more than 256 images with held_out > 0, or choose another method"
        )
    multiple = default_multiple(budget) if rank_multiple is None else rank_multiple
    ready = prepared(model, calibration)
    dense = ready.model

    def planner(method: str) -> Planner:
        made = planner_class(stock)
        chosen = usual_parts(method) if parts is None else parts
        return made(ready, budget, calibration, method, chosen, multiple, input_size, progress, latency, ffn, forward)

    with exclusive(dense), exact(next(dense.parameters()).device), still(dense):
        if method == "auto" and held_out is not None:
            probe = ("probe",) if calibration is not None and len(calibration.sample) else ()
            planners = [planner(name) for name in ("uniform", "spectrum", *probe)]
            planners[0].limit = planners[1].limit  # a budget of the parts is of all parts, though uniform cuts fewer
            return best_plan(planners, held_out)
        return planner(method).plan()


def planner_class(stock: bool) -> type[Planner]:
    """What plans freely, or with one width per kind."""
    if not stock:
        return Planner
    from .stock import StockPlanner

    return StockPlanner


def default_multiple(budget: Budget) -> int:
    """What widths are multiples of where nothing else is asked for."""
    return UNITS[budget.unit].multiple


def usual_parts(method: str | None) -> tuple[str, ...]:
    """Those of :data:`comcat.layers.base.PARTS` that a method reduces where none are named."""
    return USUAL_PARTS if method in ("uniform", "search") else PARTS


def default_method(calibration: Calibration | None) -> str:
    """A measured choice where there are images for it; else what has been best on the whole."""
    if calibration is None:
        return "uniform"
    if calibration.unseen is not None:
        return "auto"
    return "spectrum" if calibration.fisher else "probe" if len(calibration.sample) else "uniform"


def check_budget(
    model: nn.Module | Prepared,
    budget: Budget,
    parts: Sequence[str] | None = None,
    rank_multiple: int | None = None,
    input_size: Sequence[int] | None = None,
    method: str | None = None,
    latency: LatencyTable | None = None,
    stock: bool = False,
) -> None:
    """Raise what :func:`plan` would raise of the budget and the parts, before any image is looked at."""
    parts = usual_parts(method) if parts is None else parts
    if method == "uniform" and len(check_parts(parts)) > 1:
        parts = [part for part in parts if part != "head"]
    # Whether there will be images to refit neurons on is not known here, so both forms of the FFN count.
    multiple = default_multiple(budget) if rank_multiple is None else rank_multiple
    ready = prepared(model)
    with exclusive(ready.model):
        made = planner_class(stock)
        made(ready, budget, None, "probe", parts, multiple, input_size, None, latency).refuse_unreachable()


class Planner:
    """What :func:`plan` works with, for every method that arrives at curves; errors as there.

    Attributes:
        limit: largest admissible cost of the whole model, in the budget's unit.
        fixed: what of the model's cost no choice changes.
        inventory: the layers that have a part to reduce; ``factors`` and ``shapes`` by layer name.
        unit: of the budget; units: all that an estimate can name.
        parts: the selected parts; left_out: others that layers have; multiple: what every width is a multiple of.
        method: goes into the plan; any name will do here.
    """

    def __init__(
        self,
        ready: Prepared,
        budget: Budget,
        calibration: Calibration | None,
        method: str,
        parts: Sequence[str],
        multiple: int,
        input_size: Sequence[int] | None,
        progress: Progress | None,
        latency: LatencyTable | None = None,
        ffn: str = "auto",
        forward: Forward | None = None,
    ) -> None:
        if ffn not in FFN_FORMS:
            raise PlanError(f"ffn is {ffn!r}; choose one of {', '.join(FFN_FORMS)}")
        if not isinstance(multiple, int) or multiple < 1:
            raise PlanError(f"rank_multiple must be a positive integer, not {multiple!r}")
        self.units = units_with(latency)
        self.unit = unit_of(self.units, budget.unit)
        self.model, self.budget, self.calibration = ready.model, budget, calibration
        self.method, self.multiple, self.progress = method, multiple, progress
        self.ffn, self.forward = ffn, forward
        if method == "uniform" and ffn == "auto":
            self.ffn = "low-rank" if calibration is None else "neurons"
        parts = check_parts(parts)
        possible = {layer.part_of(part) for layer in ready.inventory.layers for part in layer.full}
        self.left_out = sorted(possible.difference(parts))
        if method == "uniform" and len(parts) > 1:
            parts = tuple(part for part in parts if part != "head")
        self.parts = parts
        everything = ready.inventory
        ready.check(calibration)
        self.size = ready.size(input_size, calibration.input_size if calibration else None)
        self.shapes = ready.shapes(self.size, calibration)
        dense = ready.profile(self.size)
        if latency is not None:
            latency.check(everything, self.shapes, dense)
        self.dense = {name: unit.model(dense) for name, unit in self.units.items()}
        layers = [layer for layer in everything.layers if layer.selected(parts)]
        if not layers:
            raise PlanError(f"no layer of this model has a part among {', '.join(parts)}")
        self.inventory = Inventory(layers, everything.dense)
        self.factors = ready.factors(calibration)
        whole = self.dense[budget.unit]
        of_parts = whole
        if self.unit.of_parts:
            of_parts = sum(self.unit.parts(layer, parts, self.shapes[layer.name]) for layer in layers)
        self.limit = budget.absolute(whole, of_parts)
        self.fixed = max(whole - sum(self.price(layer, {}) for layer in layers), 0)

    def refuse_unreachable(self) -> None:
        """Before anything is measured: whether the smallest widths of all parts meet the budget."""
        flat = {
            layer.name: {part: np.zeros(full + 1) for part, full in self.full_widths(layer).items()}
            for layer in self.inventory.layers
        }
        options = self._options(flat)
        smallest = self.fixed + sum(int(o.costs[self.budget.unit].min()) for o in options)
        if smallest > self.limit:
            raise out_of_reach(self._shown(self.limit), self._shown(smallest), self.left_out)

    def plan(self) -> Plan:
        self.refuse_unreachable()
        if self.method == "probe":
            return probed_plan(self)
        if self.method == "spectrum" and self.calibration is not None and self.calibration.fisher:
            refuse_zero_gradients(
                self.calibration, [layer for layer in self.inventory.layers if self.full_widths(layer)]
            )
        curves = {layer.name: self._unmeasured(layer) for layer in self.inventory.layers}
        return self.as_plan(self.solve(curves))

    def price(self, layer: Layer, choice: Choice) -> int:
        """What a layer costs at ``choice``, in the budget's unit."""
        return int(self.unit.layer(layer, choice, self.shapes[layer.name]))

    def solve(self, curves: Curves) -> Solution:
        """Choices by layer, and their estimated loss; the parts of a layer that have no curve stay dense."""
        options = self._options(curves)
        chosen = allocate(options, self.budget.unit, self.limit, self.fixed, self._shown)
        choices = {o.layer.name: o.choice(i) for o, i in zip(options, chosen, strict=True)}
        return choices, float(sum(o.loss[i] for o, i in zip(options, chosen, strict=True)))

    def _options(self, curves: Curves) -> list[Options]:
        found = []
        for layer in self.inventory.layers:
            selected = layer.selected(self.parts)
            own = {part: curve for part, curve in curves[layer.name].items() if part in selected}
            found.append(layer_options(layer, own, self.shapes[layer.name], self.multiple, self.units))
        return found

    def _shown(self, cost: int) -> str:
        unit = self.budget.unit
        return f"{Unit.shown(cost, unit)} ({100 * cost / self.dense[unit]:.1f} % of the model)"

    def as_plan(self, solution: Solution, **measured: float) -> Plan:
        """The plan of a solution; ``measured`` goes into its estimate."""
        choices, loss = solution
        estimate: dict[str, float] = dict(self.dense)
        for layer in self.inventory.layers:
            shape, choice = self.shapes[layer.name], choices[layer.name]
            for name, unit in self.units.items():
                estimate[name] += int(unit.layer(layer, choice, shape)) - int(unit.layer(layer, {}, shape))
        if self.method != "uniform":
            estimate["loss"] = loss
        estimate |= measured
        budget = {self.budget.unit: self.budget.value, "of": self.budget.of}
        layers = {name: choice for name, choice in choices.items() if choice}
        return Plan(layers, method=self.method, budget=budget, estimate=estimate, input_size=self.size)

    def _unmeasured(self, layer: Layer) -> dict[str, Curve]:
        """Curves that need no images."""
        parts = self.full_widths(layer)
        if self.method == "uniform":
            return {part: uniform_curve(layer, part) for part in parts}
        fisher = self.calibration is not None and self.calibration.fisher
        return {part: spectrum_curve(self.factors[layer.name], part, fisher) for part in parts}

    def full_widths(self, layer: Layer) -> Choice:
        """Full widths of the layer's parts that may be reduced."""
        parts = layer.selected(self.parts)
        if "neurons" in parts and self.ffn != "auto":
            parts = {part: width for part, width in parts.items() if (part == "neurons") == (self.ffn == "neurons")}
        return parts

    def modules(self, choices: Mapping[str, Choice]) -> dict[str, nn.Module]:
        """The small modules of these choices, by name."""
        return {
            name: module
            for layer, choice in choices.items()
            for name, module in self.factors[layer].build(choice).items()
        }

    def prober(self, images: Batch | Tensor) -> Prober:
        """Of the dense model; outputs as in the calibration."""
        kind = self.calibration.outputs if self.calibration is not None else None
        return Prober(self.model, images, kind, forward=self.forward)
