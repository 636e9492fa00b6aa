"""Tables of the customization demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from comcat.report import format as fmt

if TYPE_CHECKING:
    from .contest import MethodOutcome


def outcomes_table(outcomes: Sequence[MethodOutcome], title: str) -> Table:
    """The demo's methods side by side."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("method", no_wrap=True)
    for column in ("stored", "V* right", "others right", "time", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for o in outcomes:
        if o.method.kind == "base":
            table.add_row(o.method.name, "", "", f"{o.retention:.1f} %", "", "")
            continue
        cells = [fmt.size(o.bytes), f"{o.concept:.1f} %", f"{o.retention:.1f} %"]
        table.add_row(o.method.name, *cells, f"{o.seconds:.0f} s", f"+{fmt.size(o.peak)}")
    return table


def storages_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The same adapter in every storage."""
    table = Table(title="The adapter of rank 2, stored and loaded again", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("storage")
    for column in ("on disk", "products off by", "V* right", "others right"):
        table.add_column(column, justify="right")
    for row in rows:
        scores = [f"{row[key]:.1f} %" for key in ("concept", "retention")]
        table.add_row(row["storage"], fmt.size(row["bytes"]), fmt.error(row["error"]), *scores)
    return table
