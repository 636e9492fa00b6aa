"""How all figures look. Figures are drawn without pyplot, so nothing global changes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from ..errors import ComcatError
from ..storage.atomic import atomic_file
from .text import one_line

COLORS = {
    "qk": "#3a6ea5",
    "pairs": "#3a6ea5",
    "vo": "#2a9d8f",
    "channels": "#6aa84f",
    "ffn": "#e08e45",
    "fc1": "#e08e45",
    "fc2": "#c1666b",
    "neurons": "#c9a227",
    "head": "#8d6a9f",
}
TITLES = {
    "qk": "queries and keys (QK)",
    "pairs": "rotary pairs of queries and keys",
    "vo": "values and output (VO)",
    "channels": "values and output, channels",
    "ffn": "feed-forward (FFN)",
    "fc1": "FFN, first layer",
    "fc2": "FFN, second layer",
    "neurons": "FFN, neurons",
    "head": "classifier",
}
INK = "#2b2b2b"
MUTED = "#8a8a8a"
TRACK = "#ececec"


def check_drawing() -> None:
    """Raise ComcatError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ComcatError("drawing needs another package. Install it: pip install matplotlib")


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of this size in inches.

    Raises:
        ComcatError: matplotlib is not installed.
    """
    check_drawing()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def tidy(axes: Any, *, grid: str | None = None) -> None:
    """Only the lines that carry information."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c8c8c8")
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=8, length=3)
    if grid:
        axes.grid(axis=grid, color=TRACK, linewidth=0.8)
        axes.set_axisbelow(True)


def heading(figure: Any, title: str, subtitle: str | None = None) -> None:
    """Title and subtitle, flush left, above everything else."""
    height = figure.get_figheight()
    title = one_line(title)
    look = {"x": 0.01, "ha": "left", "fontsize": 13, "fontweight": "bold", "color": INK, "parse_math": False}
    figure.suptitle(title, **look)
    if subtitle:
        # Constrained layout reserves room for the suptitle: a second line in it is the subtitle's place.
        figure.suptitle(f"{title}\n", **look)
        place = (0.01, 1 - 0.42 / height)
        figure.text(*place, one_line(subtitle), ha="left", va="center", fontsize=9.5, color=MUTED, parse_math=False)


def save(figure: Any, path: str | Path | IO[bytes]) -> None:
    """As PNG; a file appears complete or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    if isinstance(path, (str, Path)):
        with atomic_file(path) as file:
            figure.savefig(file, dpi=150, format="png")
    else:
        figure.savefig(path, dpi=150, format="png")
