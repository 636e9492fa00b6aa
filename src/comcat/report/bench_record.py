"""The figures of ``comcat bench``, as a page shows them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from ..errors import CheckpointError
from ..storage.reader import read_json, validated
from ..wording import some
from . import format as fmt
from .bench_table import batches


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
    unit: str | None = None
    params: PositiveInt | None = None


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
    images: PositiveInt | None = None


class TimeBar(NamedTuple):
    """One model: its time relative to the slowest of this batch size, in percent, and what is said of it."""

    model: str
    share: float
    time: str
    faster: str
    score: str


class TimeGroup(NamedTuple):
    """Models that were timed in turns, in one runtime."""

    title: str
    bars: list[TimeBar]


def read_bench(path: str | Path, params: int) -> BenchRecord:
    """The figures in a file of ``comcat bench --out``.

    Args:
        params: of the model that they are to be of. Exported files do not say theirs.

    Raises:
        CheckpointError: it is none, it is damaged, or holds the times of other models.
    """
    document = read_json(path, what="bench")
    if not isinstance(document, dict) or not {"rows", "machine"} <= document.keys():
        raise CheckpointError(f"'{path}' holds no times: write them with comcat bench DIR --out FILE")
    found: BenchRecord = validated(BenchRecord, document, f"'{path}'")
    sizes = {row.model: row.params for row in found.rows if row.params is not None}
    if sizes and params not in sizes.values():
        said = some(f"'{name}' with {size:,} parameters" for name, size in sizes.items())
        raise CheckpointError(
            f"'{path}' holds the times of other models ({said}), and this one has {params:,} parameters: measure it "
            "with comcat bench DIR --out FILE"
        )
    return found


def time_groups(record: BenchRecord) -> list[tuple[str, list[TimeGroup]]]:
    """By batch size, then by runtime; quantized models beside those that they were made from."""
    found = []
    for batch in sorted({row.batch_size for row in record.rows}):
        rows = [row for row in record.rows if row.batch_size == batch]
        slowest = max(row.median_ms for row in rows)
        groups = []
        for runtime in sorted({row.runtime for row in rows}):
            of_runtime = [row for row in rows if row.runtime == runtime]
            several = len({row.precision for row in of_runtime}) > 1
            title = runtime if several else f"{runtime}, {of_runtime[0].precision}"
            groups.append(TimeGroup(title, [_bar(row, slowest, several) for row in of_runtime]))
        found.append((batches(batch), groups))
    return found


def _bar(row: BenchRowRecord, slowest: float, several: bool) -> TimeBar:
    score = ""
    if row.accuracy is not None and row.metric:
        score = f"{row.metric} {fmt.score(row.accuracy, row.unit)}"
    low, middle, high = (fmt.milliseconds(ms) for ms in (row.low_ms, row.median_ms, row.high_ms))
    return TimeBar(
        model=f"{row.model}, {row.precision}" if several else row.model,
        share=100 * row.median_ms / slowest,
        time=f"{middle} ms ({low} to {high})",
        faster=f"{row.speedup:.2f} ×" if row.speedup else "",
        score=score,
    )
