"""The picture of the customization demo: what every method draws, and how much it has to store for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from comcat.report import format as fmt
from comcat.report.style import INK, MUTED, heading, new_figure, save, tidy

from .digits import WORDS
from .scenes import Scene, all_scenes

if TYPE_CHECKING:
    from .contest import MethodOutcome

COLORS = {"comcat": "#3a6ea5", "lora": "#e08e45", "full": "#8d6a9f", "base": MUTED}
LABELS = {"comcat": "comcat, rank 1, 2, 4", "lora": "LoRA, rank 2, 4, 8", "full": "full fine-tuning"}
#: Shown of a concept.
SHOWN = (
    Scene(None, "white", "top", 1),
    Scene(None, "red", "left", 2),
    Scene(None, "green", "top", 2),
    Scene(None, "blue", "right", 1),
    Scene(None, "red", "bottom", 1),
)


def draw_contest(
    outcomes: Mapping[int, Sequence[MethodOutcome]], photos: Mapping[int, Sequence[Any]], path: str | Path
) -> None:
    """Write a PNG: a row of images per method, and scores over stored bytes.

    Args:
        outcomes, photos: of every digit that was taught.

    Raises:
        ComcatError: matplotlib is not installed.
    """
    methods = list(zip(*outcomes.values(), strict=True))
    figure = new_figure(12.5, 2.0 + 0.36 * (len(methods) + 1))
    names = " and ".join(WORDS[digit] for digit in outcomes)
    heading(
        figure,
        f"A tiny Stable Diffusion that has never seen {names} learns each as V*, from five images of single ones",
        "left: what it draws when V* is asked for in other colors, places and numbers, and an image of each digit that "
        "it knew; right: how often all of it is right, over what has to be stored",
    )
    left, right = figure.subplots(1, 2, width_ratios=(2.4, 1))
    _images(left, methods, photos)
    _scores(right, [found for found in methods if found[0].method.kind != "base"])
    save(figure, path)


def _images(axes: Any, methods: Sequence[Sequence[MethodOutcome]], photos: Mapping[int, Sequence[Any]]) -> None:
    import numpy as np

    step = len(SHOWN) + 0.4
    known = [digit for digit in methods[0][0].scores.images if digit is not None]
    start = step * len(photos)
    axes.set_xlim(-4.6, start + len(known) + 0.2)
    axes.set_ylim(len(methods) + 1, -1.7)
    axes.axis("off")
    axes.set_aspect("equal")
    text = {"fontsize": 7, "color": MUTED, "ha": "center", "va": "bottom"}
    axes.text(-0.2, 0.5, "the five images", ha="right", va="center", fontsize=9, color=INK)
    for place, shown in enumerate(photos.values()):
        for x, scene in enumerate(SHOWN):
            axes.text(step * place + x + 0.5, -0.1, f"{scene.number}\n{scene.color}\n{scene.side}", **text)
        for x, photo in enumerate(shown):
            _put(axes, np.asarray(photo) / 255, step * place + x, 0)
    for y, found in enumerate(methods, 1):
        axes.text(-0.2, y + 0.5, found[0].method.name, ha="right", va="center", fontsize=9, color=INK)
        for place, outcome in enumerate(found):
            drawn = outcome.scores.images.get(None)
            if drawn is None:
                continue
            for x, scene in enumerate(SHOWN):
                _put(axes, drawn[_place(scene)].permute(1, 2, 0).numpy(), step * place + x, y)
        for x, digit in enumerate(known):
            _put(axes, found[0].scores.images[digit][x % 4].permute(1, 2, 0).numpy(), start + x, y)


def _place(scene: Scene) -> int:
    """Where the first image of a scene is among those of a concept."""
    return next(
        i
        for i, other in enumerate(all_scenes(0))
        if (other.color, other.side, other.number) == (scene.color, scene.side, scene.number)
    )


def _put(axes: Any, pixels: Any, x: float, y: float) -> None:
    extent = (x + 0.04, x + 0.96, y + 0.96, y + 0.04)
    axes.imshow(pixels.clip(0, 1), extent=extent, interpolation="nearest")


def _scores(axes: Any, methods: Sequence[Sequence[MethodOutcome]]) -> None:
    for kind, label in LABELS.items():
        points = [found for found in methods if found[0].method.kind == kind]
        sizes, style = [found[0].bytes for found in points], {"color": COLORS[kind], "markersize": 7, "linewidth": 1.2}
        axes.plot(sizes, [fmean(o.concept for o in found) for found in points], "o-", label=label, **style)
        retention = [fmean(o.retention for o in found) for found in points]
        axes.plot(sizes, retention, "o", markerfacecolor="white", **style)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.set_xscale("log")
    all_sizes = [found[0].bytes for found in methods]
    axes.set_xlim(min(all_sizes) / 2, max(all_sizes) * 2)
    axes.set_ylim(0, 103)
    labelled = [found[0].bytes for found in methods if found[0].method.kind in ("comcat", "full")]
    axes.set_xticks(labelled)
    axes.set_xticklabels([fmt.size(size) for size in labelled], rotation=30)
    axes.minorticks_off()
    axes.set_ylabel("percent", fontsize=9, color=INK)
    axes.set_title("filled: V* is right in all;  open: the other prompts are", fontsize=9, color=MUTED, loc="left")
    tidy(axes, grid="y")
