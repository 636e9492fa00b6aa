"""The picture of a bench: accuracy against latency with its Pareto front, or speed-up against MACs without data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .bench_table import batches as batches_of
from .style import INK, MUTED, heading, new_figure, save, tidy

if TYPE_CHECKING:
    from ..runtimes.bench import Bench, BenchRow

#: By runtime; precisions of one runtime differ in their markers.
_COLORS = {"torch": "#c1666b", "torch-compile": "#8d6a9f", "onnxruntime": "#3a6ea5", "openvino": "#2a9d8f"}
_MARKERS = {"fp32": "o", "bf16": "s", "fp16": "^", "int8": "D"}


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points (time, score) that no other one beats in both, by time."""
    best, found = float("-inf"), []
    for place in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[place][1] > best:
            best = points[place][1]
            found.append(place)
    return found


def draw_bench(found: Bench, path: str | Path | IO[bytes]) -> None:
    """Write a PNG, one panel per batch size.

    Raises:
        ComcatError: matplotlib is not installed.
    """
    batches = sorted({row.batch_size for row in found.rows})
    scored = any(row.accuracy is not None for row in found.rows)
    figure = new_figure(1.2 + 5.2 * len(batches), 5.2)
    metric = next((row.metric for row in found.rows if row.metric), "")
    unit = next((row.unit for row in found.rows if row.unit), "")
    title = f"{metric} against latency" if scored else "Speed-up against MACs"
    title += f", {found.images:,} images" if scored and found.images else ""
    runtimes = ", ".join(f"{name} {version.partition('+')[0]}" for name, version in found.machine["runtimes"].items())
    heading(figure, title, f"{found.place} · {runtimes}")
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=True):
        rows = [row for row in found.rows if row.batch_size == batch]
        (_scores if scored else _speedups)(axes, rows)
        axes.set_title(batches_of(batch), fontsize=9, loc="left", color=INK)
        tidy(axes, grid="both")
    score = f"{metric}, {unit}" if unit else metric
    panels[0].set_ylabel(score if scored else "times as fast as the first model", fontsize=8, color=INK)
    _legend(figure, [row for row in found.rows if row.accuracy is not None or (row.mac_ratio and not scored)])
    save(figure, path)


def _look(row: BenchRow) -> dict[str, Any]:
    return {"color": _COLORS.get(row.runtime, INK), "marker": _MARKERS.get(row.precision, "o")}


def _scores(axes: Any, rows: Sequence[BenchRow]) -> None:
    points = [(row.median_ms, row.accuracy) for row in rows if row.accuracy is not None]
    rows = [row for row in rows if row.accuracy is not None]
    front = pareto(points)
    axes.step(
        [points[i][0] for i in front], [points[i][1] for i in front], where="post", color=MUTED, linewidth=1, zorder=1
    )
    for place, row in enumerate(rows):
        axes.plot([row.low_ms, row.high_ms], [row.accuracy] * 2, color=_look(row)["color"], linewidth=1, alpha=0.5)
        axes.scatter([row.median_ms], [row.accuracy], s=34 if place in front else 18, zorder=3, **_look(row))
    fastest: dict[str, int] = {}
    for place, row in enumerate(rows):
        best = fastest.setdefault(row.model, place)
        fastest[row.model] = place if row.median_ms < rows[best].median_ms else best
    axes.set_xscale("log")
    _plain_numbers(axes)
    axes.margins(x=0.14, y=0.12)
    scores = [score for _, score in points]
    room = 0.005 * max((abs(score) for score in scores), default=0.0)
    if scores and max(scores) - min(scores) < room:  # equal ones would be in the middle of nowhere, far above 100 %
        axes.set_ylim(min(scores) - room, max(scores) + room)
    _names(axes, [(*points[i], name) for name, i in fastest.items()])
    axes.set_xlabel("milliseconds for a batch, and quartiles; large: nothing else beats it in both", fontsize=8,
                    color=INK)  # fmt: skip


def _speedups(axes: Any, all_rows: Sequence[BenchRow]) -> None:
    rows = [row for row in all_rows if row.speedup is not None and row.mac_ratio is not None]
    most = max([1.0, *(row.mac_ratio or 1 for row in rows)])
    axes.plot([1, most], [1, most], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    middle = (1 + most) / 2
    axes.annotate("every MAC saved is time saved", (middle, middle), xytext=(6, -8), textcoords="offset points",
                  fontsize=7, color=MUTED)  # fmt: skip
    axes.margins(x=0.12)
    for row in rows:
        axes.scatter([row.mac_ratio], [row.speedup], s=30, zorder=3, **_look(row))
    tops = {row.model: (row.mac_ratio, max(r.speedup or 0 for r in rows if r.model == row.model)) for row in rows}
    _names(axes, [(x, y, name) for name, (x, y) in tops.items()])
    text = "MACs of the first model over those of this one"
    if len(rows) < len(all_rows):
        text += "; files, whose MACs are not known, are not drawn"
    axes.set_xlabel(text, fontsize=8, color=INK)


def _names(axes: Any, points: Sequence[tuple[Any, Any, str]]) -> None:
    """Names beside their points, on the side where the panel goes on, one above the other where they would meet."""
    axes.figure.canvas.draw()  # the limits and the scale as they come out
    left, right = (axes.transAxes.transform((x, 0))[0] for x in (0, 1))
    taken: list[tuple[float, float, float]] = []
    for x, y, name in sorted(points, key=lambda point: point[1]):
        short = name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}"
        at = axes.transData.transform((x, y))
        turned = at[0] > (left + right) / 2
        width = 6.5 * len(short)
        begin, up = at[0] - width if turned else at[0], 5.0
        while any(begin < b + w and b < begin + width and abs(at[1] + up - h) < 13 for b, w, h in taken):
            up += 13
        taken.append((begin, width, at[1] + up))
        axes.annotate(
            short, (x, y), xytext=(-4 if turned else 4, up * 72 / axes.figure.dpi), textcoords="offset points",
            fontsize=7, color=INK, parse_math=False, ha="right" if turned else "left",
        )  # fmt: skip


def _plain_numbers(axes: Any) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = axes.get_xlim()
    round_ones = [digit * 10.0**power for power in range(-4, 7) for digit in (1, 1.5, 2, 3, 5, 7)]
    ticks = [tick for tick in round_ones if low <= tick <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: 1 + len(ticks) // 8]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _legend(figure: Any, rows: Sequence[BenchRow]) -> None:
    from matplotlib.lines import Line2D

    kinds = dict.fromkeys((row.runtime, row.precision) for row in rows)
    handles = [
        Line2D([], [], linestyle="", markersize=5, label=f"{runtime}, {precision}",
               color=_COLORS.get(runtime, INK), marker=_MARKERS.get(precision, "o"))
        for runtime, precision in kinds
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower left", ncols=4, fontsize=7.5, frameon=False)
