"""How low-rank each part of each layer is: the energies behind every decision on ranks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..calibration.statistics import Calibration
from ..hosts import find_sites
from ..layers.factors import site_factors
from ..layers.sites import AttentionSite, Site, check_finite
from .cost import break_even


@dataclass(frozen=True)
class Spectrum:
    """Energies of the components of one part, in the order in which they are kept.

    Attributes:
        layer: module name; part: ``qk``, ``vo``, ``neurons``, ``fc1``, ``fc2`` or ``head``.
        energy: (full,) expected squared error that each component saves.
        full: full width; break_even: smallest width at which the part is no smaller than dense.
    """

    layer: str
    part: str
    energy: Tensor
    full: int
    break_even: int

    def width_for(self, fraction: float) -> int:
        """Smallest width that keeps ``fraction`` of the energy."""
        kept = self.energy.cumsum(0)
        return min(int((kept < fraction * kept[-1]).sum()) + 1, self.full)


def spectra(model: nn.Module, calibration: Calibration | None = None) -> list[Spectrum]:
    """Spectra of all parts in forward order, calibrated where statistics are given.

    Raises:
        CalibrationError: the calibration belongs to another model. ModelError: nothing to compress.
    """
    inventory = find_sites(model)
    check_finite(model)
    if calibration is not None:
        calibration.check(inventory, model)
    found = []
    for site in inventory.sites:
        factors = site_factors(site, calibration.moments[site.name] if calibration else None)
        for part, full in site.full.items():
            name = "head" if part == "rank" else part
            found.append(Spectrum(site.name, name, factors.energy(part).cpu(), full, _limit(site, part, full)))
    return found


def _limit(site: Site, part: str, full: int) -> int:
    if isinstance(site, AttentionSite) or part == "neurons":
        return full
    linear = site.linears["linear" if part == "rank" else part]
    return break_even(linear.in_features, linear.out_features)
