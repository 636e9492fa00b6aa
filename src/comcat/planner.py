"""From a model, a calibration and a budget to a plan: the methods that value the components.

* ``uniform``: every part keeps the same fraction. The classifier stays dense beside other parts: its rank is bounded by
  the number of classes, and an equal share of that costs far more than it saves.
* ``spectrum``: energies of the factors; in units of the loss where the calibration has output gradients, otherwise
  relative to each part's own energy (raw energies of different layers and parts do not compare).
* ``probe``: the measured divergence when one part of one layer is cut to a few levels, interpolated along the part's
  energy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from .allocate import Options, allocate, out_of_reach, site_options
from .calibration import Calibration
from .cost import Cost, Shape, attention_cost, break_even, site_cost
from .curves import Curve, linear_size, probed_curve, spectrum_curve, uniform_curve
from .errors import PlanError
from .factors import SiteFactors, site_factors
from .hosts import find_sites
from .modes import evaluating
from .plan import Budget, Plan
from .probe import Prober, levels, probe_images, probe_key
from .profile import default_input_size, profile, site_shapes
from .progress import Progress
from .sites import PARTS, AttentionSite, Choice, Inventory, Site, check_finite, check_parts, select_parts

METHODS = ("uniform", "spectrum", "probe")
#: Parts whose widths count up to their full width; the others only up to break-even.
WIDTHS = ("qk", "vo", "neurons")
Curves = dict[str, dict[str, Curve]]
Solution = tuple[dict[str, Choice], float]


def plan(
    model: nn.Module,
    budget: Budget,
    calibration: Calibration | None = None,
    method: str | None = None,
    parts: Sequence[str] = PARTS,
    rank_multiple: int = 1,
    input_size: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Choose the widths of every layer so that the model meets the budget from below.

    Args:
        model: the dense model; it is not changed.
        budget: fraction or number of parameters or MACs, met from below within 0.5 %.
        calibration: statistics of this model; without them only weights are looked at.
        method: one of :data:`METHODS`; default ``"probe"`` with a calibration, ``"uniform"`` without.
        parts: which of ``qk``, ``vo``, ``ffn``, ``head`` may be reduced.
        rank_multiple: every width is a multiple of this (8 suits tensor cores and SIMD).
        input_size: (C, H, W) at which MACs count, default that of the calibration or of the model.
        progress: called as ``progress(stage, done, total)``.

    Raises:
        BudgetError: out of reach (the smallest reachable figure is named), or already met by the dense model.
        PlanError: unknown method or part, or ``"probe"`` without calibration images.
        CalibrationError: the calibration belongs to another model.
    """
    method = method or ("probe" if calibration is not None and len(calibration.images) else "uniform")
    if method not in METHODS:
        raise PlanError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    if method == "probe" and (calibration is None or not len(calibration.images)):
        raise PlanError("method 'probe' measures on images: give a calibration made with probe_images > 0")
    planner = _Planner(model, budget, calibration, method, parts, rank_multiple, input_size, progress)
    return planner.plan()


def check_budget(
    model: nn.Module,
    budget: Budget,
    parts: Sequence[str] = PARTS,
    rank_multiple: int = 1,
    input_size: Sequence[int] | None = None,
    method: str | None = None,
) -> None:
    """Raise what :func:`plan` would raise of the budget and the parts, before any image is looked at."""
    if method == "uniform" and len(check_parts(parts)) > 1:
        parts = [part for part in parts if part != "head"]
    # Whether there will be images to refit neurons on is not known here, so both forms of the FFN count.
    _Planner(model, budget, None, "probe", parts, rank_multiple, input_size, None).refuse_unreachable()


class _Planner:
    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        calibration: Calibration | None,
        method: str,
        parts: Sequence[str],
        multiple: int,
        input_size: Sequence[int] | None,
        progress: Progress | None,
    ) -> None:
        if not isinstance(multiple, int) or multiple < 1:
            raise PlanError(f"rank_multiple must be a positive integer, not {multiple!r}")
        self.model, self.budget, self.calibration = model, budget, calibration
        self.method, self.multiple, self.progress = method, multiple, progress
        parts = check_parts(parts)
        if method == "uniform" and len(parts) > 1:
            parts = tuple(part for part in parts if part != "head")
        self.parts = parts
        inventory = find_sites(model)
        check_finite(model)
        if calibration is not None:
            calibration.check(inventory)
        size = tuple(input_size or (calibration.input_size if calibration else default_input_size(model)))
        self.shapes = (
            calibration.shapes
            if calibration is not None and size == tuple(calibration.input_size)
            else site_shapes(model, inventory, size)
        )
        dense = profile(model, size)
        self.dense = Cost(dense.params, dense.macs)
        sites = [s for s in inventory.sites if select_parts(s.full, s.kind, parts)]
        if not sites:
            raise PlanError(f"no layer of this model has a part among {', '.join(parts)}")
        self.inventory = Inventory(sites, inventory.dense)
        self.classifier = any(s.kind == "head" for s in inventory.sites)
        moments = calibration.to(next(model.parameters()).device).moments if calibration else {}
        self.factors: dict[str, SiteFactors[Any]] = {s.name: site_factors(s, moments.get(s.name)) for s in sites}
        parts_cost = sum((_parts_cost(s, parts, self.shapes[s.name]) for s in sites), Cost(0, 0))
        self.limit = budget.absolute(getattr(self.dense, budget.unit), getattr(parts_cost, budget.unit))

    def refuse_unreachable(self) -> None:
        """Before anything is measured: whether the smallest widths of all parts meet the budget."""
        flat = {
            s.name: {part: np.zeros(full + 1) for part, full in self._parts(s).items()} for s in self.inventory.sites
        }
        options = self._options(flat)
        smallest = self._fixed(options) + sum(int(o.cost(self.budget.unit).min()) for o in options)
        if smallest > self.limit:
            raise out_of_reach(self._shown(self.limit), self._shown(smallest))

    def plan(self) -> Plan:
        self.refuse_unreachable()
        if self.method == "probe":
            return self._probed()
        curves = {s.name: self._unmeasured(s) for s in self.inventory.sites}
        return self._plan(self._solve(curves))

    def _solve(self, curves: Curves) -> Solution:
        """Choices by site, and their estimated loss."""
        options = self._options(curves)
        chosen = allocate(options, self.budget.unit, self.limit, self._fixed(options), self._shown)
        choices = {o.site.name: o.choice(i) for o, i in zip(options, chosen, strict=True)}
        return choices, float(sum(o.loss[i] for o, i in zip(options, chosen, strict=True)))

    def _options(self, curves: Curves) -> list[Options]:
        return [
            site_options(s, curves[s.name], self.parts, self.shapes[s.name], self.multiple)
            for s in self.inventory.sites
        ]

    def _fixed(self, options: list[Options]) -> int:
        """What of the model's cost no option changes."""
        unit = self.budget.unit
        sites = (site_cost(o.site, {}, self.shapes[o.site.name]) for o in options)
        return getattr(self.dense, unit) - sum(getattr(cost, unit) for cost in sites)

    def _shown(self, cost: int) -> str:
        unit = self.budget.unit
        return f"{cost:,} {unit} ({100 * cost / getattr(self.dense, unit):.1f} % of the model)"

    def _plan(self, solved: Solution, **measured: float) -> Plan:
        choices, loss = solved
        saved = Cost(0, 0)
        for site in self.inventory.sites:
            shape = self.shapes[site.name]
            saved += site_cost(site, {}, shape) - site_cost(site, choices[site.name], shape)
        kept = self.dense - saved
        estimate = {"params": kept.params, "macs": kept.macs}
        if self.method != "uniform":
            estimate["loss"] = loss
        estimate |= measured
        budget = {self.budget.unit: self.budget.value, "of": self.budget.of}
        layers = {name: choice for name, choice in choices.items() if choice}
        return Plan(layers, method=self.method, budget=budget, estimate=estimate)

    def _unmeasured(self, site: Site) -> dict[str, Curve]:
        """Curves that need no images."""
        parts = self._parts(site)
        if self.method == "uniform":
            return {part: uniform_curve(site, part) for part in parts}
        fisher = self.calibration is not None and self.calibration.fisher
        return {part: spectrum_curve(self.factors[site.name], part, fisher) for part in parts}

    def _parts(self, site: Site) -> Choice:
        """Full widths of the site's parts that may be reduced."""
        parts = select_parts(site.full, site.kind, self.parts)
        if self.method == "uniform" and "neurons" in parts:
            # One form for all FFNs: neurons where there are activations to refit on, else low rank.
            parts = {p: w for p, w in parts.items() if (p == "neurons") == (self.calibration is not None)}
        return parts

    # -- probing --------------------------------------------------------------------------------------------------

    def _probed(self) -> Plan:
        assert self.calibration is not None
        images = probe_images(self.calibration, self.dense.macs)
        with evaluating(self.model):
            prober = Prober(self.model, images, self.classifier)
            prober.record(self.inventory)
            curves = self._measure(prober, len(images))
            choices, loss = self._solve(curves)
            swaps = [self.factors[s.name].build(choices[s.name]) for s in self.inventory.sites]
            divergence = prober.measure_all({name: module for new in swaps for name, module in new.items()})
        return self._plan((choices, loss), divergence=divergence)

    def _measure(self, prober: Prober, images: int) -> Curves:
        """One curve per part from a few measured levels; what the calibration already knows is not measured again."""
        assert self.calibration is not None
        known = self.calibration.probes.setdefault(f"n={images}", {})
        work = [
            (site, part, width)
            for site in self.inventory.sites
            for part, full in self._parts(site).items()
            for width in levels(part, full if part in WIDTHS else break_even(*linear_size(site, part)))
            if width < full
        ]
        measured: dict[tuple[str, str], dict[int, float]] = {}
        for done, (site, part, width) in enumerate(work):
            key = probe_key(site, part, width)
            if key not in known:
                known[key] = prober.measure(site, self.factors[site.name], {part: width})
            measured.setdefault((site.name, part), {})[width] = known[key]
            if self.progress:
                self.progress("probe", done + 1, len(work))
        curves: Curves = {site.name: {} for site in self.inventory.sites}
        for (name, part), points in measured.items():
            curves[name][part] = probed_curve(self.factors[name], part, points)
        return curves


def _parts_cost(site: Site, parts: tuple[str, ...], shape: Shape) -> Cost:
    """What the selected parts of a dense site cost."""
    if not isinstance(site, AttentionSite):
        return site_cost(site, {}, shape)
    d = site.head_dim
    whole = attention_cost(site, d, d, shape)
    rest = attention_cost(site, 0 if "qk" in parts else d, 0 if "vo" in parts else d, shape)
    # A reduced output has a bias even where the dense one has none; that one is no part of the dense cost.
    added = site.proj.out_features if site.proj.bias is None and "vo" in parts else 0
    return Cost(int(whole.params - rest.params) + added, int(whole.macs - rest.macs))
