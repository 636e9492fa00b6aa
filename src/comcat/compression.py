"""Applying a plan: every planned layer is replaced by its small stand-in, or none is; and taking it back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .calibration.statistics import Calibration
from .errors import ModelError
from .hosts.changed import hooked
from .layers.base import Choice, Inventory, Layer, LeftDense
from .layers.cost import Shape
from .layers.factors import Factors
from .models.modes import copied, exclusive
from .models.profile import Profile, profile
from .models.running import still
from .models.source import Source, describe
from .nn.swap import Place, swap, undo
from .planning.plan import Plan, check_plan
from .prepared import Prepared, prepared
from .progress import Progress
from .wording import some


@dataclass(frozen=True)
class LayerReport:
    """One replaced layer: kept and full widths, what it costs before and after, the estimated relative error.

    ``error`` is dropped over total energy, summed over the parts; compare it within one kind of part only. ``ridge`` is
    the largest that a second moment of the layer needed, relative to its mean eigenvalue: more than 1e-4 means that the
    statistics are not those of any data. None without a calibration, or in older files.
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
    ridge: float | None = None


@dataclass(frozen=True)
class Report:
    """What :func:`compress_` did: the layers, what stayed dense and why, and the cost of the whole model.

    ``notes`` holds what deserves a word, such as a plan whose estimate is not what was built.
    """

    layers: list[LayerReport]
    dense: list[LeftDense]
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    input_size: tuple[int, ...]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"dense": [entry._asdict() for entry in self.dense]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The inverse of :meth:`to_dict`."""
        layers = [LayerReport(**layer) for layer in data["layers"]]
        dense = [LeftDense(**entry) for entry in data["dense"]]
        return cls(**{**data, "layers": layers, "dense": dense, "input_size": tuple(data["input_size"])})


class Undo:
    """The layers that :func:`compress_` replaced and what the model carried before; copies of a model have none."""

    def __init__(self, places: list[Place], earlier: Compression | None) -> None:
        self.places, self.earlier = places, earlier

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


@dataclass(frozen=True)
class Compression:
    """Carried by a compressed model as ``model.comcat``: how it came about, so that it can be saved.

    ``undo`` holds the replaced layers where :func:`compress_` kept them; see :func:`restore_`. ``example`` is the call
    that the model was looked at with, where it was given one.
    """

    plan: Plan
    report: Report | None = None
    source: Source | None = None
    undo: Undo | None = field(default=None, repr=False, compare=False)
    example: Any = field(default=None, repr=False, compare=False)


def compress_(
    model: nn.Module | Prepared,
    plan: Plan,
    calibration: Calibration | None = None,
    *,
    input_size: Sequence[int] | None = None,
    keep_original: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Replace the planned layers in place: all of them, or after any error or interruption none.

    Dtype, device, mode and ``requires_grad`` of the replaced weights carry over. A layer that the model has under
    several names is replaced under all of them. Attention keeps its dropouts and norms with their hooks, and
    ``fused_attn``.

    Memory: until the call ends, the model and its small layers exist side by side. With ``keep_original`` they do so
    until :func:`restore_` or the end of the model; without it the replaced layers are freed.

    Args:
        model: the dense model, or what :func:`comcat.prepare` made of it.
        plan: what to replace, from :func:`comcat.plan` or written by hand.
        calibration: statistics of this model; without them the factors come from the weights alone.
        input_size: (C, H, W) at which MACs are counted; default that of the calibration, of the plan or of the model.
        keep_original: keep the replaced layers, so that :func:`restore_` can put them back.
        progress: called as ``progress("compress", layers done, layers in all)``.

    Raises:
        PlanError: the plan does not fit this model (the module is named).
        CalibrationError: the calibration belongs to another model.
        ModelError: non-finite weights; a wrapped or quantized model; hooks on a layer that would be replaced; or the
            parameters of the result are not what the layers add up to. Whatever is raised, nothing has been changed.
    """
    check_plan(plan)
    ready = prepared(model, calibration)
    with exclusive(ready.model), still(ready.model), torch.inference_mode(False):
        try:
            return _compress(ready, plan, calibration, input_size, keep_original, progress)
        finally:
            ready.forget()


def _compress(
    ready: Prepared,
    plan: Plan,
    calibration: Calibration | None,
    input_size: Sequence[int] | None,
    keep_original: bool,
    progress: Progress | None,
) -> Report:
    model, inventory = ready.model, ready.inventory
    plan.check(inventory)
    ready.check(calibration)
    _refuse_hooks(inventory, plan)
    earlier: Compression | None = getattr(model, "comcat", None)
    whole = _merged(earlier, plan, inventory)
    size = ready.size(input_size, calibration.input_size if calibration else None, plan.input_size)
    source = earlier.source if earlier else describe(model)
    before, shapes, factors = ready.profile(size), ready.shapes(size, calibration), ready.factors(calibration)
    layers: list[LayerReport] = []
    places: list[Place] = []
    try:
        for done, (name, choice) in enumerate(plan.layers.items()):
            if not choice:
                continue
            layers.append(_replace(model, inventory[name], choice, shapes[name], factors[name], places))
            if progress:
                progress("compress", done + 1, len(plan.layers))
        after = profile(model, size, ready.example)
        notes = _compared(layers, before, after, plan, size)
        report = Report(layers, inventory.dense, before.params, after.params, before.macs, after.macs, size, notes)
        kept = Undo(places, earlier) if keep_original else None
        model.comcat = Compression(whole, report, source, kept, ready.example)  # type: ignore[assignment]
    except BaseException:
        undo(places)
        raise
    if notes:
        warnings.warn("; ".join(notes), stacklevel=3)
    return report


def compress(
    model: nn.Module | Prepared,
    plan: Plan,
    calibration: Calibration | None = None,
    *,
    input_size: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """A compressed copy; the report is at ``.comcat.report``. Arguments and errors as :func:`compress_`.

    ModelError also where the model cannot be copied.
    """
    check_plan(plan)
    ready = prepared(model, calibration)
    plan.check(ready.inventory)
    ready.check(calibration)
    ready.factors(calibration)
    small = copied(ready.model, instead="compress_ works on it in place")
    there = ready.of_copy(small)
    compress_(there, plan, calibration, input_size=input_size, keep_original=False, progress=progress)
    return small


def restore_(model: nn.Module) -> None:
    """Undo the last :func:`compress_` in place: the very layers that were replaced come back.

    They are moved to the device and dtype that the model has now. What was trained since in layers that were not
    replaced stays, and so does a module that somebody has put in the place of a small one.

    Raises:
        ModelError: nothing to undo: the model is dense, a copy, loaded, or was compressed without ``keep_original``.
    """
    made: Compression | None = getattr(model, "comcat", None)
    if made is None or made.undo is None:
        raise ModelError(
            "there is nothing to restore: compress_(..., keep_original=True) keeps the replaced layers, but copies of "
            "a model, compress(...) and load(...) do not; use the dense model itself"
        )
    places = [place for place in made.undo.places if place.holds_new()]
    for place in places:
        like = next(place.new.parameters())
        place.old.to(device=like.device, dtype=like.dtype)
        kept = {id(module) for module in place.new.modules()}
        for module in place.old.modules():
            if id(module) not in kept:
                module.training = place.new.training
    undo(places)
    if made.undo.earlier is not None:
        model.comcat = made.undo.earlier  # type: ignore[assignment]
    else:
        del model.comcat


def _replace(
    model: nn.Module, layer: Layer, choice: Choice, shape: Shape, factors: Factors[Any], places: list[Place]
) -> LayerReport:
    with torch.no_grad():
        new = factors.build(choice)
    swap(model, new, places)
    dense, small = layer.priced({}, shape), layer.priced(choice, shape)
    return LayerReport(
        name=layer.name,
        kind=layer.kind,
        ranks=dict(choice),
        full={part: layer.full[part] for part in choice},
        params_before=int(dense.params),
        params_after=int(small.params),
        macs_before=int(dense.macs),
        macs_after=int(small.macs),
        error=factors.relative_error(choice),
        ridge=factors.ridge(choice),
    )


def _refuse_hooks(inventory: Inventory, plan: Plan) -> None:
    """Hooks on a module that goes would be lost without a word; those on what a layer keeps stay."""
    for name, choice in plan.layers.items():
        for where, module in inventory[name].replaced(choice).items():
            kind = hooked(module)
            if kind:
                raise ModelError(
                    f"module '{where}' has a {kind}, which would be lost with the layer: remove it, and put it on the "
                    "compressed model"
                )


def _merged(earlier: Compression | None, plan: Plan, inventory: Inventory) -> Plan:
    """The plan that leads from the dense model to what will stand there."""
    if earlier is None:
        return plan
    layers = dict(earlier.plan.layers)
    for layer in inventory.layers:  # low-rank ones are not among them: these were put there anew, or have neurons
        if not layer.came_of(layers.get(layer.name, {})):
            layers.pop(layer.name, None)
    for name, choice in plan.layers.items():
        if choice:
            layers[name] = {**layers.get(name, {}), **choice}
    return replace(plan, layers=layers)


def _compared(
    layers: list[LayerReport], before: Profile, after: Profile, plan: Plan, size: tuple[int, ...]
) -> list[str]:
    """Whether what was built costs what was promised.

    Raises:
        ModelError: the parameters of the model have not fallen by what its layers add up to.
    """
    notes = []
    for unit in ("params", "macs"):
        saved = sum(getattr(layer, f"{unit}_before") - getattr(layer, f"{unit}_after") for layer in layers)
        built, expected = getattr(after, unit), getattr(before, unit) - saved
        if built != expected:
            text = (
                f"the compressed model has {built:,} {unit}, its layers add up to {expected:,}: some of "
                f"{_names(layers)} are used in a way that comcat does not see"
            )
            if unit == "params":
                raise ModelError(f"{text}; leave these layers out of the plan")
            notes.append(text)
            continue
        promised = plan.estimate.get(unit)
        same_size = unit == "params" or plan.input_size in (None, size)
        if promised is not None and same_size and round(promised) != built:
            notes.append(
                f"the plan expected {round(promised):,} {unit}, the compressed model has {built:,}: the plan was "
                "edited, or made for another model or input size"
            )
    return notes


def _names(layers: list[LayerReport]) -> str:
    return some(f"'{layer.name}'" for layer in layers)
