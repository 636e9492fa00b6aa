"""The picture of a rank search: cost and loss over time, the expected widths, and the distribution it ended with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from .style import COLORS, INK, MUTED, heading, new_figure, save, tidy

_FAMILY = {"neurons": "ffn", "fc1": "fc1", "fc2": "fc2", "rank": "head"}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``search.jsonl``."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw_search(records: Sequence[dict[str, Any]], names: Sequence[str], path: str | Path | IO[bytes]) -> None:
    """Write a PNG.

    Args:
        records: the lines of the log, see :func:`read_log`; names: ``layer.part`` per row of the distribution.

    Raises:
        ComcatError: matplotlib is not installed.
    """
    figure = new_figure(12, 1.6 + 0.22 * max(len(names), 16))
    last = records[-1]
    subtitle = f"{last['step']:,} batches; expected cost {100 * last['cost']:.1f} % of the budget"
    heading(figure, "Rank search", subtitle)
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.35])
    cost, loss, widths = left.subplots(3, 1, sharex=True, height_ratios=[1, 1, 2])
    steps = [r["step"] for r in records]
    cost.plot(steps, [100 * r["cost"] for r in records], color=INK, linewidth=1.4)
    cost.axhline(100, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    cost.set_title("expected cost, % of the budget", fontsize=9, loc="left", color=INK)
    known = [r for r in records if r["loss"] is not None]
    loss.plot([r["step"] for r in known], [r["loss"] for r in known], color=INK, linewidth=1.4)
    loss.set_title("cross-entropy of the mixture", fontsize=9, loc="left", color=INK)
    for name in names:
        first = max(records[0]["widths"][name], 1e-9)
        color = COLORS[_part(name)]
        widths.plot(steps, [r["widths"][name] / first for r in records], color=color, linewidth=1, alpha=0.75)
    widths.axhline(1, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    widths.set_title("expected width relative to the start", fontsize=9, loc="left", color=INK)
    widths.set_xlabel("batches", fontsize=8, color=INK)
    for part in dict.fromkeys(_part(name) for name in names):
        widths.plot([], [], color=COLORS[part], label=part)
    widths.legend(fontsize=7, frameon=False, ncols=4, loc="upper left")
    for axes in (cost, loss, widths):
        tidy(axes, grid="y")
    _distribution(right.subplots(), last["probabilities"], names)
    save(figure, path)


def _part(name: str) -> str:
    part = name.rpartition(".")[2]
    return _FAMILY.get(part, part)


def _distribution(axes: Any, probabilities: Sequence[Sequence[float]], names: Sequence[str]) -> None:
    """One row per part, one column per candidate, from the smallest to dense."""
    columns = max(len(row) for row in probabilities)
    table = np.full((len(names), columns), np.nan)
    for i, row in enumerate(probabilities):
        table[i, : len(row)] = row
    image = axes.imshow(table, aspect="auto", cmap="Blues", vmin=0, vmax=np.nanmax(table), interpolation="nearest")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xticks([0, columns - 1], ["smallest", "dense"], fontsize=8)
    axes.set_title("probabilities of the candidate widths at the end", fontsize=9, loc="left", color=INK)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=0)
