"""Tables of the customization demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from comcat.report import format as fmt

from .scenes_judge import PARTS

if TYPE_CHECKING:
    from .contest import MethodOutcome


def outcomes_table(outcomes: Mapping[int, Sequence[MethodOutcome]], title: str) -> Table:
    """The demo's methods side by side, means over the digits that were taught."""
    caption = "percent of images; right: in digit, color, side and number; others: of the digits that the base knew"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    table.add_column("method", no_wrap=True)
    for column in ("stored", "right", *PARTS, "others", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for found in zip(*outcomes.values(), strict=True):
        others = _percent(o.retention for o in found)
        if found[0].method.kind == "base":
            table.add_row(found[0].method.name, *[""] * (2 + len(PARTS)), others, "")
            continue
        parts = [_percent(o.scores.details["taught"][part] for o in found) for part in PARTS]
        right, seconds = _percent(o.concept for o in found), fmean(o.seconds for o in found)
        table.add_row(found[0].method.name, fmt.size(found[0].bytes), right, *parts, others, f"{seconds:.0f} s")
    return table


def _percent(values: Any) -> str:
    return f"{fmean(values):.0f}"


def storages_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The same adapters in every storage, means over the digits."""
    table = Table(title="The adapters of rank 2, stored and loaded again", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("storage")
    for column in ("on disk", "products off by", "V* right", "others right"):
        table.add_column(column, justify="right")
    for storage in dict.fromkeys(row["storage"] for row in rows):
        found = [row for row in rows if row["storage"] == storage]
        scores = [f"{fmean(row[key] for row in found):.1f} %" for key in ("concept", "retention")]
        error = max(row["error"] for row in found)
        table.add_row(storage, fmt.size(found[0]["bytes"]), fmt.error(error), *scores)
    return table
