"""How low-rank each part of each layer is: the energies behind every decision on ranks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..calibration.statistics import Calibration
from ..prepared import Prepared, prepared


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


def spectra(model: nn.Module | Prepared, calibration: Calibration | None = None) -> list[Spectrum]:
    """Spectra of all parts in forward order, calibrated where statistics are given.

    Raises:
        CalibrationError: the calibration belongs to another model. ModelError: nothing to compress.
    """
    ready = prepared(model, calibration)
    ready.check(calibration)
    found = []
    for layer in ready.inventory.layers:
        factors = ready.factors(calibration)[layer.name]
        for part, full in layer.full.items():
            name = "head" if part == "rank" else part
            found.append(Spectrum(layer.name, name, factors.energy(part).cpu(), full, layer.reach(part)))
    return found
