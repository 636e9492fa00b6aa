"""Small vector pictures for a page: paths in a box of 100 x 100, whose colours and sizes the style sheet gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

#: Energy that is lost, as shares: the ends of the logarithmic axis.
MOST, LEAST = 1.0, 1e-4
#: Points of a curve; a spectrum of 3072 neurons looks no different with more.
_POINTS = 64


class Curve(NamedTuple):
    """One layer's spectrum.

    Attributes:
        path: of an SVG; x is the share of the width that is kept, y the energy that is lost, logarithmic.
        mark: where the layer was cut, (x, y); None where it was not.
        strength: opacity, so that later layers are darker.
    """

    name: str
    path: str
    mark: tuple[float, float] | None
    strength: float = 1.0


def spectrum_curve(name: str, tail: Sequence[float], kept: int | None, strength: float = 1.0) -> Curve:
    """The curve of ``tail`` (full + 1,), the energy lost with the first n components kept."""
    full = len(tail) - 1
    step = max(1, math.ceil(full / _POINTS))
    places = sorted({*range(0, full + 1, step), full})
    points = [(100 * n / full, lost_height(tail[n])) for n in places]
    mark = None if kept is None else (round(100 * kept / full, 1), lost_height(tail[min(kept, full)]))
    return Curve(name, line(points), mark, round(strength, 2))


def lost_height(share: float) -> float:
    """Where a share of the energy lies, from 0 (all lost) to 100 (nothing)."""
    span = math.log10(MOST / LEAST)
    return round(100 * min(1.0, math.log10(MOST / max(share, LEAST)) / span), 1)


def line(points: Sequence[tuple[float, float]]) -> str:
    """A path through points."""
    return "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)


class Chart(NamedTuple):
    """A line over training.

    Attributes:
        path: of an SVG; points: (x, y, words) of every value; low, high: ends of the vertical axis in words.
    """

    path: str
    points: list[tuple[float, float, str]]
    low: str
    high: str


def progress_chart(values: Sequence[tuple[float, float, str]], low: str, high: str) -> Chart:
    """The line through (x, y, words), scaled to its box; the lowest value is at the bottom."""
    left, right = min(x for x, _, _ in values), max(x for x, _, _ in values)
    bottom, top = min(y for _, y, _ in values), max(y for _, y, _ in values)
    points = [
        (round(100 * (x - left) / (right - left or 1), 1), round(100 * (top - y) / (top - bottom or 1), 1), words)
        for x, y, words in values
    ]
    return Chart(line([(x, y) for x, y, _ in points]), points, low, high)
