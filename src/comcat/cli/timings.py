"""Latency in a run of ``comcat compress``: the table of timings before, what came of the budget after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import Screen

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from ..planning.latency import LatencyTable
    from ..planning.plan import Budget, Plan
    from ..prepared import Prepared
    from ..report.tables import Measured
    from ..runtimes.realizing import Outcome
    from .making import SmallModel


@dataclass(frozen=True)
class LatencyWanted:
    """What the options say of a latency budget: the file of timings, and where and how they are measured."""

    file: Path | None = None
    batch_size: int | None = None
    runtime: str | None = None
    precision: str = "fp32"
    threads: int | None = None

    def check(self) -> None:
        """Raise ComcatError for a runtime that is missing, or that does not do what is asked."""
        if self.runtime is not None:
            from ..runtimes.registry import session_class

            session_class(self.runtime).check(self.precision, self.threads)

    def read(self, screen: Screen) -> LatencyTable | None:
        """The table in a file that exists.

        Raises:
            CalibrationError: it cannot be read, or was measured in another way than asked for.
        """
        from ..errors import CalibrationError
        from ..planning.latency import LatencyTable

        if self.file is None or not self.file.is_file():
            return None
        table = LatencyTable.load(self.file)
        if self.batch_size not in (None, table.batch_size):
            raise CalibrationError(
                f"{self.file} was measured with batches of {table.batch_size}, not {self.batch_size}. "
                "Leave --latency-batch out or name another file"
            )
        there, asked = (table.runtime, table.precision), (self.runtime, self.precision)
        if self.runtime is not None and there != asked:
            raise CalibrationError(
                f"{self.file} was measured in {' and '.join(there)}, not in {self.runtime} and {self.precision}. Leave "
                "--runtime out or name another file"
            )
        if self.threads is not None and self.threads != table.threads:
            raise CalibrationError(
                f"{self.file} was measured with {table.threads or 'any number of'} threads, not {self.threads}. Leave "
                "--threads out or name another file"
            )
        screen.note(
            f"latency read from {self.file} ({table.device}, {table.runtime} in {table.precision}, batches of "
            f"{table.batch_size})"
        )
        return table

    def measure(self, prepared: Prepared, screen: Screen) -> LatencyTable:
        """A new table, kept in the file if one is named."""
        from ..planning.timing import measure_latency

        how: dict[str, Any] = {}
        if self.runtime is not None:
            how = {"runtime": self.runtime, "precision": self.precision, "threads": self.threads}
        table = measure_latency(prepared, self.batch_size or 1, progress=screen.progress, **how)
        if self.file is not None:
            table.save(self.file)
        return table

    def realized_in(self, table: LatencyTable) -> bool:
        """Whether the built model is to be measured in the table's runtime, and the budget met there."""
        return self.runtime is not None or table.runtime != "torch"


def realize(
    prepared: Prepared,
    table: LatencyTable,
    plan: Plan,
    budget: Budget,
    build: Callable[[Plan], SmallModel],
    replan: Callable[[LatencyTable], Plan] | None,
    screen: Screen,
) -> Outcome[SmallModel]:
    """The model of the plan that meets the budget in the table's runtime, as far as one does, which is said."""
    from ..runtimes.realizing import TOLERANCE, RuntimeClock
    from ..runtimes.realizing import realize as realized

    def built(plan: Plan) -> tuple[nn.Module, SmallModel]:
        made = build(plan)
        return made.model, made

    def told(table: LatencyTable) -> Plan:
        assert replan is not None
        screen.note("the model is not as fast, or faster, than planned: planning again by what was measured")
        return replan(table)

    limit = budget.absolute(table.dense, table.dense)
    with RuntimeClock(prepared, table) as clock:
        found = realized(clock, plan, limit, built, told if replan is not None else None)
    if not found.realized.met:
        wanted, kept = found.realized.budget, found.realized.kept
        screen.warn(
            f"the budget is {wanted:.1%} of the dense time, and the model takes {kept:.1%} in {table.runtime}, more "
            f"than {TOLERANCE:.0%} beside it: the machine was busy, or what stays dense takes too large a share. "
            "Measure on an idle machine, or give another budget"
        )
    return found


def describe(
    table: LatencyTable, plan: Plan, dense: Measured, small: Measured, outcome: Outcome[SmallModel] | None
) -> dict[str, Any]:
    """What was planned, and what came of it, in milliseconds for a batch.

    Args:
        outcome: what was measured in the table's runtime.
    """
    found: dict[str, Any] = {"device": table.device, "batch_size": table.batch_size}
    found |= {"planned_dense_ms": table.dense / 1e6, "planned_ms": plan.estimate["latency"] / 1e6}
    if outcome is None:
        for column in (dense, small):
            found[f"{column.name}_ms"] = 1e3 * table.batch_size / column.speed if column.speed else None
        return found
    realized, tried = outcome.realized, outcome.tried
    found |= {"dense_ms": realized.dense_ms, "compressed_ms": realized.small_ms}
    found |= {"runtime": table.runtime, "precision": table.precision, "threads": table.threads}
    return found | {"realized": realized.to_dict(), "tried": [one.to_dict() for one in tried]}


def line(latency: dict[str, Any]) -> str:
    """:func:`describe` for people."""
    kept = latency["planned_ms"] / latency["planned_dense_ms"]
    where = f" in {latency['runtime']}, {latency['precision']}" if "runtime" in latency else ""
    text = f"latency of a batch of {latency['batch_size']}{where}: {latency['planned_ms']:.2f} ms planned, "
    text += f"{kept:.1%} of dense"
    if realized := latency.get("realized"):
        text += f"; {latency['compressed_ms']:.2f} of {latency['dense_ms']:.2f} ms measured, {realized['kept']:.1%} "
        text += f"({realized['low']:.1%} to {realized['high']:.1%})"
        attempts = len(latency["tried"])
        return text + (f", at attempt {attempts}" if attempts > 1 else "")
    if latency["compressed_ms"]:
        text += f"; {latency['compressed_ms'] / latency['dense_ms']:.1%} measured"
    return text
