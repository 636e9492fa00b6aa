"""What ``comcat bench`` found, as tables that fit into 80 columns: the models, and their times by batch size."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from . import format as fmt
from .tables import MAC_NOTE, new_table, titled

if TYPE_CHECKING:
    from ..runtimes.bench import Bench, BenchRow

NOTE = (
    "ms: median of a batch over all turns; between: its quartiles; faster: median over the turns of the time of the "
    "first model over that of this one, in the same runtime; of MACs: that over the ratio of MACs, 100 % where every "
    "MAC saved is time saved"
)


def bench_tables(found: Bench) -> Group:
    """The models, then a table for every batch size with the models by runtime and precision."""
    shown: list[Group | Text] = [_models(found.rows)]
    rows = sorted(found.rows, key=lambda row: (row.batch_size, row.runtime, row.precision))
    for batch, of_batch in groupby(rows, lambda row: row.batch_size):
        shown.append(_times(found, batch, list(of_batch)))
    shown.append(Text(f"{NOTE}; {MAC_NOTE}", style="dim"))
    return Group(*shown)


def batches(size: int) -> str:
    """``single images``, ``batches of 8``."""
    return "single images" if size == 1 else f"batches of {size}"


def _models(rows: list[BenchRow]) -> Group:
    table = new_table()
    table.add_column("", overflow="ellipsis", no_wrap=True)
    for heading in ("parameters", "MACs", "on disk"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in {row.model: row for row in rows}.values():
        counts = [fmt.count(n) if n else "" for n in (row.params, row.macs)]
        table.add_row(row.model, *counts, fmt.size(row.bytes) if row.bytes else "")
    return titled("Models", table)


def _times(found: Bench, batch: int, rows: list[BenchRow]) -> Group:
    table = new_table()
    metric = next((row.metric for row in rows if row.metric), None)
    table.add_column("", overflow="ellipsis", no_wrap=True)
    for heading in ("ms", "between", "faster", "of MACs", *([metric] if metric else [])):
        style = "cyan" if heading in ("faster", "of MACs") else None
        table.add_column(heading, justify="right", style=style, no_wrap=True)
    for place, group in groupby(rows, lambda row: (row.runtime, row.precision)):
        table.add_row(Text(", ".join(place), style="bold"))
        _group(table, list(group), metric is not None)
    title = f"{batches(batch).capitalize()}, {found.place}"
    return titled(f"{title}; {metric} of {found.images:,} images" if metric and found.images else title, table)


def _group(table: Table, rows: list[BenchRow], scored: bool) -> None:
    for row in rows:
        realized = row.speedup / row.mac_ratio if row.speedup and row.mac_ratio else None
        cells = [
            fmt.milliseconds(row.median_ms),
            f"{fmt.milliseconds(row.low_ms)} and {fmt.milliseconds(row.high_ms)}",
            f"{row.speedup:.2f} x" if row.speedup else "",
            f"{realized:.0%}" if realized else "",
        ]
        score = fmt.score(row.accuracy, row.unit) if row.accuracy is not None else ""
        table.add_row(f"  {row.model}", *cells, *([score] if scored else []))
    table.add_section()
