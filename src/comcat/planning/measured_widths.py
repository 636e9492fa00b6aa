"""At which widths a kind of layer is timed, and the grids that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from ..layers.base import Choice, Layer
from .allocate import spaced_widths
from .latency import Grid, LayerTimes, nested

#: Widths off this multiple fill vector units badly: on a CPU they take as long as the next multiple, or longer.
MULTIPLE = 8
#: Where a part is wide enough, the widths of matrix units.
_MATRIX_MULTIPLES = (32, 16, MULTIPLE)

Axes = tuple[tuple[int, ...], ...]


class MeasuredWidths:
    """The choices that one kind of layer is timed at.

    Args:
        count: widths of every part.
        coarse: multiples of 32 or 16 of parts wide enough, and fewer widths of parts that are timed together; for
            where every choice is a file of its own.

    Attributes:
        choices: the dense one first.
    """

    def __init__(self, layer: Layer, count: int, coarse: bool = False) -> None:
        self.layer, self.coarse = layer, coarse
        self.axes = self._axes(count)
        reduced = [choice for parts, axes in self.axes for choice in self._grid(parts, axes) if choice]
        self.choices: list[Choice] = [{}, *reduced]

    def _axes(self, count: int) -> list[tuple[tuple[str, ...], Axes]]:
        """Parts that are measured together, and at which widths."""
        layer = self.layer
        if layer.timed_together:
            few = max(1, count * 5 // 8 if self.coarse else count - 1)
            return [(tuple(layer.full), tuple((*self._axis(width, few), width) for width in layer.full.values()))]
        found: list[tuple[tuple[str, ...], Axes]] = []
        for part in layer.full:
            if widths := self._axis(layer.reach(part), count):
                found.append(((part,), (widths,)))
        return found

    def _axis(self, limit: int, count: int) -> tuple[int, ...]:
        multiple = MULTIPLE if limit >= 2 * MULTIPLE else 1
        if self.coarse:
            multiple = next((m for m in _MATRIX_MULTIPLES if limit >= m * count), multiple)
        return tuple(spaced_widths(limit, multiple, count).tolist())

    def _grid(self, parts: tuple[str, ...], axes: Axes) -> list[Choice]:
        """The choices behind a grid, the last axis fastest; full widths are left out, for they are dense."""
        full = self.layer.full
        return [
            {part: width for part, width in zip(parts, widths, strict=True) if width < full[part]}
            for widths in product(*axes)
        ]

    def times(self, seconds: Sequence[float], count: int) -> LayerTimes:
        """What was measured, as the times of ``count`` layers.

        Args:
            seconds: one layer's, by choice.
        """
        taken = [nanoseconds(value) for value in seconds]
        grids = []
        for parts, axes in self.axes:
            flat = [taken[self.choices.index(choice)] for choice in self._grid(parts, axes)]
            grids.append(Grid(parts, axes, nested(np.reshape(flat, [len(axis) for axis in axes]))))
        return LayerTimes(count, taken[0], tuple(grids))


def nanoseconds(seconds: float) -> int:
    """At least one."""
    return max(round(1e9 * seconds), 1)
