"""What ``comcat bench`` found, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group

from . import format as fmt
from .tables import MAC_NOTE, new_table, titled

if TYPE_CHECKING:
    from ..runtimes.bench import Bench, BenchRow

NOTE = (
    "median and quartiles of turns; faster: median over the turns of the first model's time over this one's; of MACs: "
    "that over the ratio of MACs, 100 % where every MAC saved is time saved"
)


def bench_table(found: Bench, title: str) -> Group:
    """One row per model, runtime, precision and batch size, grouped by the last three."""
    table = new_table()
    scored = any(row.accuracy is not None for row in found.rows)
    metric = next((row.metric for row in found.rows if row.metric), "")
    for heading, justify in (("batch", "right"), ("runtime", "left"), ("model", "left")):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for heading in ("ms", "25 to 75 %", "images/s", "faster", "of MACs", "MACs", *([metric] if scored else [])):
        style = "cyan" if heading in ("faster", "of MACs") else None
        table.add_column(heading, justify="right", style=style, no_wrap=True)
    place = lambda row: (row.batch_size, row.runtime, row.precision)  # noqa: E731
    previous = None
    for row in sorted(found.rows, key=place):
        if previous is not None and place(row) != previous:
            table.add_section()
        first = place(row) != previous
        previous = place(row)
        where = [str(row.batch_size), f"{row.runtime}, {row.precision}"] if first else ["", ""]
        table.add_row(*where, row.model, *_cells(row, scored))
    return titled(title, table, f"{NOTE}; {MAC_NOTE}")


def _cells(row: BenchRow, scored: bool) -> list[str]:
    realized = row.speedup / row.mac_ratio if row.speedup and row.mac_ratio else None
    cells = [
        f"{row.median_ms:.2f}",
        f"{row.low_ms:.2f} to {row.high_ms:.2f}",
        f"{row.images_per_second:,.0f}",
        f"{row.speedup:.2f} x" if row.speedup else "",
        f"{realized:.0%}" if realized else "",
        fmt.count(row.macs) if row.macs else "",
    ]
    return cells + ([f"{row.accuracy:.2f}" if row.accuracy is not None else ""] if scored else [])
