"""The figures of ``comcat bench``, as a page shows them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from ..storage.reader import read_json, validated


class BenchRowRecord(BaseModel):
    """See :class:`comcat.runtimes.bench.BenchRow`; milliseconds for a batch."""

    model_config = ConfigDict(extra="ignore")

    model: str
    runtime: str
    precision: str
    batch_size: PositiveInt
    median_ms: PositiveFloat
    low_ms: NonNegativeFloat
    high_ms: NonNegativeFloat
    speedup: PositiveFloat | None = None
    mac_ratio: PositiveFloat | None = None
    accuracy: float | None = None
    metric: str | None = None


class MachineRecord(BaseModel):
    model_config = ConfigDict(extra="ignore")

    device: str
    threads: PositiveInt | None = None
    runtimes: dict[str, str] = Field(default_factory=dict)


class BenchRecord(BaseModel):
    """The file that :meth:`comcat.runtimes.bench.Bench.save` writes."""

    model_config = ConfigDict(extra="ignore")

    rows: list[BenchRowRecord]
    machine: MachineRecord
    left_out: list[str] = Field(default_factory=list)


class TimeBar(NamedTuple):
    """One model: its time relative to the slowest beside it, in percent, and what is said of it."""

    model: str
    share: float
    time: str
    faster: str
    score: str


class TimeGroup(NamedTuple):
    """Models that were timed in turns, in one runtime, precision and batch size."""

    title: str
    bars: list[TimeBar]


def read_bench(path: str | Path) -> BenchRecord:
    """The figures in a file of ``comcat bench --out``.

    Raises:
        CheckpointError: it is none, or damaged.
    """
    found: BenchRecord = validated(BenchRecord, read_json(path, what="bench"), f"'{path}'")
    return found


def time_groups(record: BenchRecord) -> list[TimeGroup]:
    """By batch size, runtime and precision; quantized models beside those that they were made from."""
    groups: dict[tuple[int, str], list[BenchRowRecord]] = {}
    for row in record.rows:
        groups.setdefault((row.batch_size, row.runtime), []).append(row)
    found = []
    for (batch, runtime), rows in sorted(groups.items()):
        slowest = max(row.median_ms for row in rows)
        several = len({row.precision for row in rows}) > 1
        bars = [_bar(row, slowest, several) for row in rows]
        precision = "" if several else f", {rows[0].precision}"
        found.append(TimeGroup(f"{runtime}{precision}, batches of {batch}", bars))
    return found


def _bar(row: BenchRowRecord, slowest: float, several: bool) -> TimeBar:
    score = ""
    if row.accuracy is not None and row.metric:
        score = f"{row.metric} {row.accuracy:.2f}"
    return TimeBar(
        model=f"{row.model}, {row.precision}" if several else row.model,
        share=100 * row.median_ms / slowest,
        time=f"{row.median_ms:.2f} ms ({row.low_ms:.2f} to {row.high_ms:.2f})",
        faster=f"{row.speedup:.2f} ×" if row.speedup else "",
        score=score,
    )
