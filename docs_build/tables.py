"""Tables in Markdown from the figures of benchmarks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Numbers are flush right: every column but the first."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and sample standard deviation; nothing where there is no value."""
    if not values:
        return ""
    shown = f"{statistics.fmean(values):.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ±{statistics.stdev(values):.{digits}f}"


def pivot(cells: Mapping[str, Any], first: str, percent: str, value: Callable[[Any], str] | None = None) -> str:
    """Cells whose keys are ``ROW/SHARE/SEED`` or ``ROW | SHARE | SEED``: one column for every share, seeds together.

    Args:
        first: head of the rows; percent: what the share is, ``kept`` or ``cut``.
        value: of one cell in words, where it is no number; of several the first is shown.
    """
    grouped: dict[str, dict[float, list[Any]]] = {}
    for key, cell in cells.items():
        row, share = split_key(key)
        if share is not None:
            grouped.setdefault(row, {}).setdefault(share, []).append(cell)
    shares = sorted({share for row in grouped.values() for share in row}, reverse=True)
    head = [first, *(f"{100 * (share if percent == 'kept' else 1 - share):.0f} %" for share in shares)]
    rows = []
    for row, found in grouped.items():
        cells_of_row = [found.get(share, []) for share in shares]
        rows.append([row, *(_cell(group, value) for group in cells_of_row)])
    return table(head, rows)


def split_key(key: str) -> tuple[str, float | None]:
    """``a/b/0.5/0`` -> ``a, b`` and 0.5; None where there is no share."""
    parts = [part.strip() for part in key.replace(" | ", "/").split("/")]
    numbers = [i for i, part in enumerate(parts) if _is_share(part)]
    if not numbers:
        return ", ".join(parts), None
    place = numbers[-1]
    return ", ".join(parts[:place]), float(parts[place])


def _is_share(text: str) -> bool:
    try:
        return "." in text and 0 < float(text) < 1
    except ValueError:
        return False


def _cell(group: Sequence[Any], value: Callable[[Any], str] | None) -> str:
    if not group:
        return ""
    if value is not None:
        return value(group[0])
    flat = [float(v) for cell in group for v in (cell if isinstance(cell, list) else [cell])]
    return spread(flat)


def records(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of plain figures, as they are."""
    head = list(dict.fromkeys(key for row in rows for key, cell in row.items() if not isinstance(cell, (list, dict))))
    return table(head, [[number(row.get(key)) for key in head] for row in rows])


def number(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if math.isfinite(value) else str(value)
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")
