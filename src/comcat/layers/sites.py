"""What can be compressed in a model: sites, each a module with named widths.

A host (``hosts/``) finds the sites; everything after it works on sites alone. A *choice* says how wide a site
shall be, e.g. ``{"qk": 24, "vo": 20}``, ``{"neurons": 300}``, ``{"fc1": 40, "fc2": 50}`` or ``{"rank": 8}``; a part
that the choice does not name stays dense, and the empty choice is the dense layer. An FFN that was reduced twice has
both: ranks within its neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from ..errors import ModelError, PlanError

Choice = dict[str, int]

#: The parts a user can select, and the kind of site each belongs to.
PARTS = ("qk", "vo", "ffn", "head")


class LeftDense(NamedTuple):
    """A layer (or part of one) that stays as it is, and why."""

    name: str
    cls: str
    reason: str


@dataclass(frozen=True)
class AttentionSite:
    """Self-attention with H heads of width d: ``qk`` and ``vo`` ranks from 1 to d.

    ``build(qk_rank, vo_rank)`` returns an empty ``LowRankAttention`` with everything else of the original;
    a part with a reason in ``dense_parts`` must keep its width. ``fused`` says whether queries and values run at one
    width, that of the wider, as fused kernels want it.
    """

    name: str
    module: nn.Module
    qkv: nn.Linear
    proj: nn.Linear
    num_heads: int
    head_dim: int
    build: Callable[[int, int], nn.Module]
    dense_parts: dict[str, str] = field(default_factory=dict)
    fused: bool = True
    kind: ClassVar = "attention"

    @property
    def full(self) -> Choice:
        return {part: self.head_dim for part in ("qk", "vo") if part not in self.dense_parts}

    @property
    def linears(self) -> dict[str, nn.Linear]:
        return {"qkv": self.qkv, "proj": self.proj}


@dataclass(frozen=True)
class FFNSite:
    """Two linear layers ``fc1`` and ``fc2`` with a hidden activation: low-rank, or fewer ``neurons``.

    ``neurons_dense`` is why the neurons form is not exact here (a norm or gate over the hidden units), or None.
    """

    name: str
    module: nn.Module
    fc1: nn.Linear
    fc2: nn.Linear
    neurons_dense: str | None = None
    kind: ClassVar = "ffn"

    @property
    def full(self) -> Choice:
        full = {fc: min(getattr(self, fc).weight.shape) for fc in ("fc1", "fc2")}
        return full if self.neurons_dense else {"neurons": self.fc2.in_features, **full}

    @property
    def linears(self) -> dict[str, nn.Linear]:
        return {"fc1": self.fc1, "fc2": self.fc2}


@dataclass(frozen=True)
class HeadSite:
    """The classifier, one linear layer: ``rank``."""

    name: str
    module: nn.Linear
    kind: ClassVar = "head"

    @property
    def full(self) -> Choice:
        return {"rank": min(self.module.weight.shape)}

    @property
    def linears(self) -> dict[str, nn.Linear]:
        return {"linear": self.module}


Site = AttentionSite | FFNSite | HeadSite


def moment_shapes(site: Site) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the moments that a calibration holds for a site."""
    if isinstance(site, AttentionSite):
        H, d = site.num_heads, site.head_dim
        shapes: dict[str, tuple[int, ...]] = {"z": (H * d, H * d), "z_mean": (H * d,)}
        return shapes if "qk" in site.dense_parts else {"q": (H, d, d), "k": (H, d, d), **shapes}
    inputs = {"x": site.fc1, "h": site.fc2} if isinstance(site, FFNSite) else {"x": site.module}
    square = {name: (linear.in_features,) * 2 for name, linear in inputs.items()}
    return {**square, **{f"{name}_mean": (linear.in_features,) for name, linear in inputs.items()}}


def gradient_shapes(site: Site) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the moments that a calibration with output gradients holds besides."""
    if isinstance(site, AttentionSite):
        H, d, out = site.num_heads, site.head_dim, site.proj.out_features
        return {"qk_rows": (H, d, d), "qk_cols": (H, d, d), "out_grad": (out, out)}
    outputs = {"fc1_grad": site.fc1, "fc2_grad": site.fc2} if isinstance(site, FFNSite) else {"grad": site.module}
    return {name: (linear.out_features,) * 2 for name, linear in outputs.items()}


@dataclass(frozen=True)
class Inventory:
    """All sites of a model in forward order, and what stays dense."""

    sites: list[Site]
    dense: list[LeftDense]

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        for entry in self.dense:
            if entry.name == name or entry.name.startswith(f"{name}."):
                raise PlanError(f"layer '{name}' ({entry.cls}) cannot be reduced: {entry.reason}")
        raise PlanError(f"layer '{name}' is not in this model; its layers are {_some([s.name for s in self.sites])}")


def _some(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f", ... ({len(names)} in all)" if len(names) > count else "")


def select_parts(full: Choice, kind: str, parts: Iterable[str]) -> Choice:
    """The widths of ``full`` that belong to the selected ``parts``."""
    if kind == "attention":
        return {part: width for part, width in full.items() if part in parts}
    return full if kind in parts else {}


def check_parts(parts: Iterable[str]) -> tuple[str, ...]:
    """Validate a selection of :data:`PARTS`."""
    parts = (parts,) if isinstance(parts, str) else tuple(parts)
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise PlanError(f"unknown part {unknown}; choose from {', '.join(PARTS)}")
    return parts


def check_choice(site: Site, choice: Choice) -> None:
    """Raise PlanError, naming the module, unless ``choice`` can be built at ``site``."""
    for part, width in choice.items():
        if part not in site.full:
            reason = getattr(site, "dense_parts", {}).get(part)
            if part == "neurons":
                reason = getattr(site, "neurons_dense", None)
            why = f"'{part}' cannot be reduced ({reason})" if reason else f"unknown part '{part}'"
            raise PlanError(f"layer '{site.name}': {why}; possible are {', '.join(site.full)}")
        limit = site.full[part]
        if part in ("fc1", "fc2") and isinstance(choice.get("neurons"), int):
            limit = min(limit, choice["neurons"])
        if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= limit:
            raise PlanError(f"layer '{site.name}': {part} is {width!r}, but must be an integer from 1 to {limit}")


def check_finite(model: nn.Module) -> None:
    """Raise ModelError naming the first parameter that holds NaN or infinite values."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(f"parameter '{name}' holds NaN or infinite values; use an intact checkpoint")
