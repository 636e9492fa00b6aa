"""Loss curves: what each width of a part is believed to cost. One array per part, (full + 1,), zero at full.

Only their sum over the model matters to the allocation, so they must share one unit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..layers.base import Layer
from ..layers.factors import Factors

Curve = np.ndarray


def uniform_curve(layer: Layer, part: str) -> Curve:
    """A curve under which equal kept fractions are optimal.

    The sum of ``size / fraction`` over the parts is least, at a given sum of ``size * fraction``, where all fractions
    are equal. The fraction of a low-rank matrix is relative to its break-even rank.
    """
    size, equal = layer.equal_share(part)
    fraction = np.maximum(np.arange(layer.full[part] + 1), 0.1) / equal
    return size * np.maximum(1 / fraction - 1, 0)


def spectrum_curve(factors: Factors[Any], part: str, in_loss_units: bool) -> Curve:
    """Dropped energy: half of it is the expected loss where output gradients were collected, else relative."""
    errors = factors.errors(part).cpu().numpy()
    return errors / 2 if in_loss_units else errors / max(errors[0], 1e-300)


def probed_curve(factors: Factors[Any], part: str, points: dict[int, float]) -> Curve:
    """A non-increasing curve through measured ``points`` (width: loss), log-linear in the part's dropped energy.

    Outside the measured widths the loss goes on in proportion to the energy.
    """
    energy = np.maximum(spectrum_curve(factors, part, in_loss_units=False), 1e-12)
    widths = np.array(sorted(points, reverse=True))
    losses = np.maximum.accumulate([points[w] for w in widths])  # rising as the width falls
    x, first = np.unique(np.log(energy[widths]), return_index=True)
    y = np.log(np.maximum(losses, 1e-9))[first]
    at = np.log(energy)
    curve = np.exp(np.interp(at, x, y) + np.minimum(at - x[0], 0) + np.maximum(at - x[-1], 0))
    curve[-1] = 0.0
    return np.maximum.accumulate(curve[::-1])[::-1]
