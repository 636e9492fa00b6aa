"""Numbers and names as they appear in tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# A compressed layer is shown by what was kept of it, e.g. "qk 24/64  vo 20/64".
PART_NAMES = {"qk": "QK", "vo": "VO"}
_BLOCKS = "▁▂▃▄▅▆▇█"


def count(number: float) -> str:
    """``5717416`` -> ``5.72 M``."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * limit:
            value = number / limit
            return f"{value:.2f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes: ``22869664`` -> ``22.9 MB``."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= 0.9995 * limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number:.0f} B"


def milliseconds(number: float) -> str:
    """With three digits that count: ``1.234`` -> ``1.23``, ``156.5`` -> ``157``."""
    return f"{number:.2f}" if number < 9.995 else f"{number:.1f}" if number < 99.95 else f"{number:,.0f}"


def score(number: float, unit: str | None) -> str:
    """As :meth:`comcat.evaluation.scores.Figure.shown`."""
    return f"{number:.2f} %" if unit else f"{number:.4f}"


def duration(seconds: float) -> str:
    """``75`` -> ``1 min 15 s``."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def ranks(kept: Mapping[str, int], full: Mapping[str, int]) -> str:
    """``{"qk": 24}, {"qk": 64}`` -> ``QK 24/64``."""
    return "  ".join(f"{PART_NAMES.get(k, k)} {n}/{full.get(k, '?')}" for k, n in kept.items())


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """Values between 0 and 1 as a row of bars, resampled to at most ``width``."""
    step = max(1.0, len(values) / width)
    picked = [values[int(i * step)] for i in range(min(width, len(values)))]
    return "".join(_BLOCKS[min(7, max(0, round(7 * v)))] for v in picked)


def error(value: float) -> str:
    """A relative error, in percent with two digits that count."""
    return f"{100 * value:.2g} %" if value >= 1e-6 else "0 %"
