"""The picture of the demo: accuracy against size, what every layer kept, and what a small model answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comcat.report.figures import bars, kept_by_part, stayed_dense
from comcat.report.style import COLORS, INK, MUTED, heading, new_figure, save, tidy

if TYPE_CHECKING:
    from comcat import Report


def draw_demo(
    points: Sequence[tuple[str, int, float]],
    tuned: tuple[str, int, float],
    reports: Mapping[str, Report],
    digits: Sequence[tuple[Any, int, int]],
    path: str | Path,
    title: str,
    subtitle: str,
) -> None:
    """Write a PNG: accuracy against size, what every layer kept, and what a small model answers.

    Args:
        points: (name, parameters, top-1 in percent), the dense model first; tuned: the last one after fine-tuning.
        reports: name -> report of two budgets, the larger one first.
        digits: (image (H, W) in [0, 1], label, answer of the smallest model).

    Raises:
        ComcatError: matplotlib is not installed.
    """
    figure = new_figure(11, 5.6)
    heading(figure, title, subtitle)
    top, bottom = figure.subfigures(2, 1, height_ratios=[5, 1.25])
    left, right = top.subfigures(1, 2, width_ratios=[1, 1.9])
    _accuracy(left.subplots(), points, tuned)
    grids = [kept_by_part(report) for report in reports.values()]
    panels = [part for part in ("qk", "vo", "ffn") if any(part in parts for _, parts in grids)]
    rows = [row for row in grids[0][0] if any(row in parts.get(part, {}) for _, parts in grids for part in panels)]
    for axes, part in zip(right.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        series = [
            (
                parts.get(part, {}),
                _lighter(COLORS[part]) if i == 0 else COLORS[part],
                0.72 if i == 0 else 0.36,
            )
            for i, (_, parts) in enumerate(grids)
        ]
        bars(axes, rows, part, series, stayed_dense(rows, grids[0][1], part))
        axes.set_xlabel(
            " · ".join(f"{'pale' if i == 0 else 'dark'}: {n}" for i, n in enumerate(reports)),
            fontsize=7.5,
            color=MUTED,
        )
    for axes, (image, label, answer) in zip(bottom.subplots(1, len(digits)), digits, strict=True):
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_color("#dddddd")
        right_answer = answer == label
        axes.set_title(str(answer), fontsize=9, color=COLORS["vo"] if right_answer else "#c0392b", fontweight="bold")
    save(figure, path)


def _accuracy(axes: Any, points: Sequence[tuple[str, int, float]], tuned: tuple[str, int, float]) -> None:
    sizes = [params / 1e6 for _, params, _ in points]
    accuracy = [top1 for _, _, top1 in points]
    axes.axhline(accuracy[0], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.plot(sizes, accuracy, color=COLORS["qk"], linewidth=1.8, marker="o", markersize=6, markeredgecolor="white")
    axes.plot(sizes[:1], accuracy[:1], marker="o", markersize=7, color=INK, markeredgecolor="white")
    low = min(*accuracy, tuned[2])
    span = max(accuracy[0] - low, 1.5)
    labels = [(f"{name}\n{top1:.1f} %", x, top1, INK) for (name, _, top1), x in zip(points, sizes, strict=True)]
    beside_there: list[tuple[float, float]] = []
    for text, x, top1, color in [*labels, (f"fine-tuned\n{tuned[2]:.1f} %", sizes[-1], tuned[2], COLORS["vo"])]:
        # Beside the line where it falls towards smaller models, otherwise above it.
        beside = accuracy[0] - top1 > 0.1 * span and color is INK
        style = {"textcoords": "offset points", "fontsize": 8, "color": color}
        style |= {"ha": "left", "va": "top"} if beside else {"ha": "center", "va": "bottom"}
        # Points close to each other have their labels one below the other.
        near = sum(abs(x - a) < 0.15 * max(sizes) and abs(top1 - b) < 0.12 * span for a, b in beside_there)
        beside_there += [(x, top1)] if beside else []
        axes.annotate(text, (x, top1), (7, -2 - 24 * near) if beside else (0, 7), **style)
    x, before, after = sizes[-1], accuracy[-1], tuned[2]
    arrow = {"arrowstyle": "-|>", "color": COLORS["vo"], "linewidth": 1.4, "shrinkA": 5, "shrinkB": 4}
    axes.annotate("", (x, after), (x, before), arrowprops=arrow)
    axes.plot([x], [after], marker="o", markersize=6, color=COLORS["vo"], markeredgecolor="white")
    axes.set(xlim=(0, max(sizes) * 1.15), ylim=(low - 0.35 * span, accuracy[0] + 0.45 * span))
    axes.set_xlabel("parameters, millions", fontsize=8, color=INK)
    axes.set_title("test accuracy against size", fontsize=9, loc="left", color=INK)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    tidy(axes, grid="y")


def _lighter(color: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    r, g, b = to_rgb(color)
    return 1 - 0.45 * (1 - r), 1 - 0.45 * (1 - g), 1 - 0.45 * (1 - b)
