"""Latency in a run of ``comcat compress``: the table of timings before, what came of the budget after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import Screen

if TYPE_CHECKING:
    from torch import nn

    from ..planning.latency import LatencyTable
    from ..planning.plan import Plan
    from ..prepared import Prepared
    from ..report.tables import Measured


def read_table(path: Path | None, batch_size: int | None, screen: Screen) -> LatencyTable | None:
    """The table in a file that exists.

    Raises:
        CalibrationError: it cannot be read, or was measured at another batch size than asked for.
    """
    from ..errors import CalibrationError
    from ..planning.latency import LatencyTable

    if path is None or not path.is_file():
        return None
    table = LatencyTable.load(path)
    if batch_size not in (None, table.batch_size):
        raise CalibrationError(
            f"{path} was measured with batches of {table.batch_size}, not {batch_size}. "
            "Leave --latency-batch out or name another file"
        )
    screen.note(f"latency read from {path} ({table.device}, batches of {table.batch_size})")
    return table


def measure_table(
    model: nn.Module | Prepared, path: Path | None, batch_size: int | None, screen: Screen
) -> LatencyTable:
    """A new table, kept in a file if one is named."""
    from ..planning.timing import measure_latency

    table = measure_latency(model, batch_size or 1, progress=screen.progress)
    if path is not None:
        table.save(path)
    return table


def describe(table: LatencyTable, plan: Plan, dense: Measured, small: Measured) -> dict[str, Any]:
    """What was planned, and what came of it, in milliseconds for a batch."""
    measured = {
        f"{column.name}_ms": 1e3 * table.batch_size / column.speed if column.speed else None
        for column in (dense, small)
    }
    planned = {"planned_dense_ms": table.dense / 1e6, "planned_ms": plan.estimate["latency"] / 1e6}
    return {"device": table.device, "batch_size": table.batch_size, **planned, **measured}


def line(latency: dict[str, Any]) -> str:
    """:func:`describe` for people."""
    kept = latency["planned_ms"] / latency["planned_dense_ms"]
    text = f"latency of a batch of {latency['batch_size']}: {latency['planned_ms']:.2f} ms planned, {kept:.1%} of dense"
    if latency["compressed_ms"]:
        text += f"; {latency['compressed_ms'] / latency['dense_ms']:.1%} measured"
    return text
