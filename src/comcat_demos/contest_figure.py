"""The picture of the customization demo: what every method draws, and how much it has to store for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comcat.report import format as fmt
from comcat.report.style import INK, MUTED, heading, new_figure, save, tidy

if TYPE_CHECKING:
    from .contest import MethodOutcome

COLORS = {"comcat": "#3a6ea5", "lora": "#e08e45", "full": "#8d6a9f", "base": MUTED}
LABELS = {"comcat": "comcat, rank 1, 2, 4", "lora": "LoRA, rank 2, 4, 8", "full": "full fine-tuning"}
CONCEPT, OTHERS = 10, 9  # images shown of V*, and of the other prompts, one each


def draw_contest(outcomes: Sequence[MethodOutcome], photos: Sequence[Any], path: str | Path, digit: int) -> None:
    """Write a PNG: a row of images per method, and scores over stored bytes.

    Raises:
        ComcatError: matplotlib is not installed.
    """
    rows = [o for o in outcomes if o.method.kind != "base"]
    figure = new_figure(12.5, 1.2 + 0.33 * (len(outcomes) + 1))
    heading(
        figure,
        f"A tiny Stable Diffusion that has never seen the digit {digit} learns it as V*, from five images",
        "left: what it draws for 'a photo of V*' and for the nine prompts that it knew; right: how often a digit "
        "classifier agrees, over what has to be stored",
    )
    left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
    _images(left, outcomes, photos)
    _scores(right, rows)
    save(figure, path)


def _images(axes: Any, outcomes: Sequence[MethodOutcome], photos: Sequence[Any]) -> None:
    import numpy as np

    axes.set_xlim(-5.2, CONCEPT + OTHERS + 0.7)
    axes.set_ylim(len(outcomes) + 1, -0.6)
    axes.axis("off")
    axes.set_aspect("equal")
    axes.text(-0.1, 0.5, "the five images", ha="right", va="center", fontsize=9, color=INK)
    for x, photo in enumerate(photos):
        _put(axes, np.asarray(photo.convert("L")) / 255, x, 0)
    for y, outcome in enumerate(outcomes, 1):
        axes.text(-0.1, y + 0.5, outcome.method.name, ha="right", va="center", fontsize=9, color=INK)
        shown = outcome.scores.images
        for x, image in enumerate(shown.get(None, [])[:CONCEPT]):
            _put(axes, image[0].numpy(), x, y)
        for x, images in enumerate([v for k, v in shown.items() if k is not None][:OTHERS]):
            _put(axes, images[0][0].numpy(), CONCEPT + 0.6 + x, y)


def _put(axes: Any, gray: Any, x: float, y: float) -> None:
    axes.imshow(
        gray, cmap="gray", vmin=0, vmax=1, extent=(x + 0.04, x + 0.96, y + 0.96, y + 0.04), interpolation="nearest"
    )


def _scores(axes: Any, outcomes: Sequence[MethodOutcome]) -> None:
    for kind, label in LABELS.items():
        points = [o for o in outcomes if o.method.kind == kind]
        sizes, style = [o.bytes for o in points], {"color": COLORS[kind], "markersize": 7, "linewidth": 1.2}
        axes.plot(sizes, [o.concept for o in points], "o-", label=label, **style)
        axes.plot(sizes, [o.retention for o in points], "o", markerfacecolor="white", **style)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.set_xscale("log")
    axes.set_xlim(min(o.bytes for o in outcomes) / 2, max(o.bytes for o in outcomes) * 2)
    lowest = min(min(o.concept, o.retention) for o in outcomes)
    axes.set_ylim(max(-4, lowest - 8), 103)
    axes.set_xticks([o.bytes for o in outcomes if o.method.kind in ("comcat", "full")])
    axes.set_xticklabels([fmt.size(o.bytes) for o in outcomes if o.method.kind in ("comcat", "full")], rotation=30)
    axes.minorticks_off()
    axes.set_ylabel("percent", fontsize=9, color=INK)
    axes.set_title("filled: V* is the digit;  open: the other prompts are theirs", fontsize=9, color=MUTED, loc="left")
    tidy(axes, grid="y")
