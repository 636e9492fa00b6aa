"""A spectrum in a few numbers: how many components hold most of the energy, and whether that is low rank."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..planning.spectra import Spectrum


@dataclass(frozen=True)
class SpectrumSummary:
    """One part of one layer.

    Attributes:
        rank90, rank99: least number of components that hold 90 and 99 % of the energy.
        break_even: number of components at which a smaller layer stops being smaller.
        full: number of components.
        tail: (full + 1,) share of the energy that is lost when the first n components are kept.
        decay: component energies on a logarithmic scale, 1 for the largest, 0 for a thousandth of it.
    """

    layer: str
    part: str
    rank90: int
    rank99: int
    break_even: int
    full: int
    tail: list[float]
    decay: list[float]

    @property
    def verdict(self) -> str:
        """``low-rank``: 99 % of the energy below half of break-even; ``compressible``: below break-even."""
        if 2 * self.rank99 <= self.break_even:
            return "low-rank"
        return "compressible" if self.rank99 < self.break_even else "full-rank"

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values.pop("decay")
        return {**values, "verdict": self.verdict}


def summarize(spectra: Iterable[Spectrum]) -> list[SpectrumSummary]:
    """Summaries in the order of the model's layers."""
    return [_summary(s) for s in spectra]


def _summary(spectrum: Spectrum) -> SpectrumSummary:
    energy = [max(0.0, float(e)) for e in spectrum.energy]
    # Summed from the small end, so that a tail of 1e-9 is not lost beside the head.
    tail = [0.0]
    for e in reversed(energy):
        tail.append(tail[-1] + e)
    tail.reverse()
    total = tail[0] or 1.0
    tail = [t / total for t in tail]
    largest = max(energy, default=0.0) or 1.0
    decay = [max(0.0, 1 + math.log10(max(e, 1e-30) / largest) / 3) for e in energy]
    rank90, rank99 = (next(n for n, t in enumerate(tail) if t <= lost) for lost in (0.1, 0.01))
    return SpectrumSummary(
        spectrum.layer, spectrum.part, rank90, rank99, spectrum.break_even, spectrum.full, tail, decay
    )
