"""From a model, a calibration and a budget to a plan: the methods that value the components.

* ``uniform``: every part keeps the same fraction. The classifier stays dense beside other parts: its rank is bounded by
  the number of classes, and an equal share of that costs far more than it saves.
* ``spectrum``: energies of the factors; in units of the loss where the calibration has output gradients, otherwise
  relative to each part's own energy (raw energies of different layers and parts do not compare).
* ``probe``: the measured divergence when one part of one layer is cut to a few levels, interpolated along the part's
  energy; then measured again at the chosen point, where effects no longer add, and allocated once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from .allocate import Options, allocate, site_options
from .calibration import Calibration
from .cost import Cost, Shape, attention_cost, break_even, site_cost
from .curves import Curve, linear_size, probed_curve, spectrum_curve, uniform_curve
from .errors import PlanError
from .factors import SiteFactors, site_factors
from .hosts import find_sites
from .modes import evaluating
from .plan import Budget, Plan
from .probe import Prober, classifier_of, levels, probe_images, probe_key, swapped
from .profile import default_input_size, profile, site_shapes
from .progress import Progress
from .sites import PARTS, AttentionSite, Choice, Inventory, Site, check_finite, check_parts, select_parts

METHODS = ("uniform", "spectrum", "probe")
#: How often ``probe`` measures again around the point that it chose.
ROUNDS = 1
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
    parts = check_parts(parts)
    method = method or ("probe" if calibration is not None and len(calibration.images) else "uniform")
    if method not in METHODS:
        raise PlanError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    if method == "probe" and (calibration is None or not len(calibration.images)):
        raise PlanError("method 'probe' measures on images: give a calibration made with probe_images > 0")
    if method == "uniform" and len(parts) > 1:
        parts = tuple(part for part in parts if part != "head")
    if not isinstance(rank_multiple, int) or rank_multiple < 1:
        raise PlanError(f"rank_multiple must be a positive integer, not {rank_multiple!r}")
    return _Planner(model, budget, calibration, parts, rank_multiple, input_size, progress).plan(method)


class _Planner:
    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        calibration: Calibration | None,
        parts: tuple[str, ...],
        multiple: int,
        input_size: Sequence[int] | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.budget, self.calibration = model, budget, calibration
        self.parts, self.multiple, self.progress = parts, multiple, progress
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
        moments = calibration.moments if calibration else {}
        device = next(model.parameters()).device
        self.factors: dict[str, SiteFactors[Any]] = {
            s.name: site_factors(s, {n: t.to(device) for n, t in moments.get(s.name, {}).items()}) for s in sites
        }
        parts_cost = sum((_parts_cost(s, parts, self.shapes[s.name]) for s in sites), Cost(0, 0))
        self.limit = budget.absolute(getattr(self.dense, budget.unit), getattr(parts_cost, budget.unit))

    def plan(self, method: str) -> Plan:
        if method == "probe":
            return self._probed()
        curves = {s.name: self._unmeasured(s, method) for s in self.inventory.sites}
        return self._plan(self._solve(curves), method)

    def _solve(self, curves: Curves) -> Solution:
        """Choices by site, and their estimated loss."""
        options: list[Options] = [
            site_options(s, curves[s.name], self.parts, self.shapes[s.name], self.multiple)
            for s in self.inventory.sites
        ]
        unit = self.budget.unit
        dense = getattr(self.dense, unit)
        compressible = sum(getattr(site_cost(o.site, {}, self.shapes[o.site.name]), unit) for o in options)

        def shown(cost: int) -> str:
            return f"{cost:,} {unit} ({100 * cost / dense:.1f} % of the model)"

        chosen = allocate(options, unit, self.limit, dense - compressible, shown)
        choices = {o.site.name: o.choice(i) for o, i in zip(options, chosen, strict=True)}
        return choices, float(sum(o.loss[i] for o, i in zip(options, chosen, strict=True)))

    def _plan(self, solved: Solution, method: str) -> Plan:
        choices, loss = solved
        saved = Cost(0, 0)
        for site in self.inventory.sites:
            shape = self.shapes[site.name]
            saved += site_cost(site, {}, shape) - site_cost(site, choices[site.name], shape)
        kept = self.dense - saved
        estimate = {"params": kept.params, "macs": kept.macs}
        if method != "uniform":
            estimate["loss"] = loss
        budget = {self.budget.unit: self.budget.value, "of": self.budget.of}
        layers = {name: choice for name, choice in choices.items() if choice}
        return Plan(layers, method=method, budget=budget, estimate=estimate)

    def _unmeasured(self, site: Site, method: str) -> dict[str, Curve]:
        """Curves that need no images."""
        calibration = self.calibration
        parts = self._parts(site)
        if method == "spectrum":
            fisher = calibration is not None and calibration.fisher
            return {part: spectrum_curve(self.factors[site.name], part, fisher) for part in parts}
        if "neurons" in parts:  # one form for all: neurons where there are activations to refit on, else low rank
            parts = {p: w for p, w in parts.items() if (p == "neurons") == (calibration is not None)}
        return {part: uniform_curve(site, part) for part in parts}

    def _parts(self, site: Site) -> Choice:
        """Full widths of the site's parts that may be reduced."""
        return select_parts(site.full, site.kind, self.parts)

    # -- probing --------------------------------------------------------------------------------------------------

    def _probed(self) -> Plan:
        assert self.calibration is not None
        images = probe_images(self.calibration, self.dense.macs)
        with evaluating(self.model):
            prober = Prober(self.model, images, classifier_of(find_sites(self.model)))
            prober.record(self.inventory)
            curves = self._measure(prober, len(images))
            first = self._solve(curves)
            refined = self._refine(curves, first, prober)
        return self._plan(refined, "probe")

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

    def _refine(self, curves: Curves, first: Solution, prober: Prober) -> Solution:
        """Measure again around the chosen point, rescale the curves to what is found there, and allocate once more.

        Far from the dense model the effects of cuts no longer add. The new choice is taken if the divergence that
        it causes as a whole is measured to be lower.
        """
        best, best_loss = first, np.inf
        for round_ in range(ROUNDS + 1):
            choices = first[0]
            modules = {
                n: m for s in self.inventory.sites for n, m in self.factors[s.name].modules(choices[s.name]).items()
            }
            with swapped(self.model, modules):
                loss = prober.record(self.inventory)
                if loss < best_loss:
                    best, best_loss = (choices, loss), loss
                if round_ < ROUNDS:
                    curves = self._rescaled(curves, choices, prober, loss, round_)
            if round_ < ROUNDS:
                first = self._solve(curves)
        return best

    def _rescaled(self, curves: Curves, choices: dict[str, Choice], prober: Prober, loss: float, round_: int) -> Curves:
        new: Curves = {}
        for done, site in enumerate(self.inventory.sites):
            choice, known = choices[site.name], curves[site.name]
            used = {p: w for p, w in choice.items() if p in known}
            if "neurons" not in used:  # dense parts of the form in use are candidates as well
                used |= {p: site.full[p] for p in known if p not in used and p != "neurons"}
            scales = {}
            for part, width in used.items():
                low, high = max(1, round(width * 0.75)), min(site.full[part], max(width + 1, round(width * 1.3)))
                measured = []
                for w in (low, high):
                    changed = {p: v for p, v in {**choice, part: w}.items() if v < site.full[p]}
                    same = changed == choice
                    measured.append(loss if same else prober.measure(site, self.factors[site.name], changed))
                expected = known[part][low] - known[part][high]
                ratio = (measured[0] - measured[1]) / max(expected, 1e-12)
                scales[part] = float(np.clip(ratio, 0.1, 10.0))
            other = float(np.exp(np.mean(np.log(list(scales.values()))))) if scales else 1.0
            new[site.name] = {part: curve * scales.get(part, other) for part, curve in known.items()}
            if self.progress:
                self.progress(f"refine {round_ + 1}/{ROUNDS}", done + 1, len(self.inventory.sites))
        return new


def _parts_cost(site: Site, parts: tuple[str, ...], shape: Shape) -> Cost:
    """What the selected parts of a dense site cost."""
    if not isinstance(site, AttentionSite):
        return site_cost(site, {}, shape)
    d = site.head_dim
    whole = attention_cost(site, d, d, shape)
    rest = attention_cost(site, 0 if "qk" in parts else d, 0 if "vo" in parts else d, shape)
    cost = whole - rest
    return Cost(int(cost.params), int(cost.macs))
