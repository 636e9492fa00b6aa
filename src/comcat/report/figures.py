"""Figures: what was kept of every layer, and the energy curves of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from .style import COLORS, INK, MUTED, TITLES, TRACK, heading, new_figure, save, tidy

if TYPE_CHECKING:
    from ..compression import LayerReport, Report
    from .spectra_figure import SpectrumSummary

__all__ = ["draw_kept", "draw_spectra"]


class Kept(NamedTuple):
    """What a layer kept of one part: the share of its parameters, and the widths in words."""

    share: float
    label: str


def kept_by_part(report: Report) -> tuple[list[str], dict[str, dict[str, Kept]]]:
    """Block names in order, and part -> block -> what was kept; ``blocks.0.attn`` is of ``blocks.0``."""
    rows: list[str] = []
    parts: dict[str, dict[str, Kept]] = {}
    for layer in report.layers:
        row = layer.name.rpartition(".")[0] or layer.name
        if row not in rows:
            rows.append(row)
        for part, kept in _parts(layer).items():
            parts.setdefault(part, {})[row] = kept
    return rows, {part: parts[part] for part in ("qk", "pairs", "vo", "channels", "ffn", "head") if part in parts}


def stayed_dense(rows: Sequence[str], parts: Mapping[str, Mapping[str, Kept]], part: str) -> list[str]:
    """The blocks that have this part, as far as the report tells, and kept all of it; a classifier is no block."""
    inside = {row for name, blocks in parts.items() if name != "head" for row in blocks}
    return [] if part == "head" else [row for row in rows if row in inside and row not in parts.get(part, {})]


def _parts(layer: LayerReport) -> dict[str, Kept]:
    if layer.kind == "attention":
        return {part: Kept(kept / layer.full[part], f"{kept}/{layer.full[part]}") for part, kept in layer.ranks.items()}
    share = layer.params_after / max(layer.params_before, 1)
    label = ", ".join(
        f"{n}/{layer.full[k]}" if k in ("neurons", "rank") else f"{k} {n}" for k, n in layer.ranks.items()
    )
    return {layer.kind: Kept(share, label)}


def draw_kept(report: Report, path: str | Path | IO[bytes], title: str, subtitle: str | None = None) -> None:
    """Write a PNG: one bar per block and part, the share that was kept.

    Raises:
        ComcatError: matplotlib is not installed.
    """
    rows, parts = kept_by_part(report)
    figure = new_figure(1.2 + 2.6 * max(len(parts), 2), 1.5 + 0.26 * max(len(rows), 4))
    heading(figure, title, subtitle)
    if parts:
        all_axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
        for axes, (part, blocks) in zip(all_axes, parts.items(), strict=True):
            bars(axes, rows, part, [(blocks, COLORS[part], 0.72)], stayed_dense(rows, parts, part))
            _labels(axes, rows, blocks)
    save(figure, path)


def bars(
    axes: Any,
    rows: Sequence[str],
    part: str,
    series: Sequence[tuple[Mapping[str, Kept], Any, float]],
    dense: Sequence[str] = (),
) -> None:
    """Horizontal bars, one per block, of each series on top of the one before; ``dense``: blocks that stayed so."""
    present = {row for blocks, _, _ in series for row in blocks}
    places = [i for i, row in enumerate(rows) if row in present]
    axes.barh(places, [1.0] * len(places), height=0.72, color=TRACK)
    for blocks, color, height in series:
        found = [i for i, row in enumerate(rows) if row in blocks]
        axes.barh(found, [blocks[rows[i]].share for i in found], height=height, color=color)
    for i, row in enumerate(rows):
        if row in dense and row not in present:
            axes.text(0.02, i, "dense", va="center", fontsize=7, color=MUTED)
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)), yticklabels=rows)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "50 %", "", "100 %"])
    axes.set_title(TITLES[part], fontsize=9, loc="left", color=INK)
    tidy(axes)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _labels(axes: Any, rows: Sequence[str], blocks: Mapping[str, Kept]) -> None:
    for i, row in enumerate(rows):
        if row in blocks:
            share, label = blocks[row]
            inside = share > 0.45
            x, align, color = (share - 0.015, "right", "white") if inside else (share + 0.015, "left", INK)
            axes.text(x, i, label, va="center", ha=align, fontsize=7, color=color)


def draw_spectra(summaries: Sequence[SpectrumSummary], path: str | Path | IO[bytes], title: str, subtitle: str) -> None:
    """Write a PNG: for every part, the energy lost against the components kept, one curve per layer.

    Raises:
        ComcatError: matplotlib is not installed.
    """
    there = {summary.part for summary in summaries}
    parts = [part for part in TITLES if part in there]
    columns = min(3, len(parts))
    lines = -(-len(parts) // columns)
    figure = new_figure(1 + 3.1 * columns, 1.3 + 2.6 * lines)
    heading(figure, title, f"{subtitle} · pale curves: first layers, dark: last layers")
    all_axes = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for axes, part in zip(all_axes, parts, strict=False):
        _energy_panel(axes, part, [s for s in summaries if s.part == part])
    for axes in all_axes[len(parts) :]:
        axes.set_visible(False)
    for axes in all_axes[::columns]:
        axes.set_ylabel("energy lost", fontsize=8, color=INK)
    save(figure, path)


def _energy_panel(axes: Any, part: str, summaries: Sequence[SpectrumSummary]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    # From pale (first layer) to full colour (last layer).
    shade = LinearSegmentedColormap.from_list(part, ["#d9dee3", COLORS[part], "#1f2a36"])
    for i, s in enumerate(summaries):
        place = (i + 1) / (len(summaries) + 1)
        x = [n / s.full for n in range(len(s.tail))]
        axes.plot(x, [max(t, 1e-9) for t in s.tail], color=shade(place), linewidth=1.3)
    even = summaries[0].break_even / summaries[0].full
    if even < 1:
        axes.axvline(even, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.text(even - 0.015, 1.3e-4, "break-even", fontsize=7, color=MUTED, ha="right")
    axes.axhline(0.01, color=MUTED, linewidth=0.7, linestyle=(0, (1, 2)))
    axes.set_yscale("log")
    axes.set(xlim=(0, 1), ylim=(1e-4, 1))
    axes.set_xticks([0, 0.5, 1], ["0", "half kept", f"all {summaries[0].full}"])
    axes.set_yticks([1, 0.1, 0.01, 0.001, 0.0001], ["100 %", "10 %", "1 %", "0.1 %", "0.01 %"])
    axes.minorticks_off()
    axes.set_title(TITLES[part], fontsize=9, loc="left", color=INK)
    tidy(axes, grid="y")
