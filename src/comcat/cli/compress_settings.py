"""What ``comcat compress`` is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .judging import Judging

if TYPE_CHECKING:
    from .searching import Search
    from .timings import LatencyWanted


@dataclass(frozen=True)
class CompressSettings:
    """The options of the command that steer the run."""

    model: str
    out: Path
    overwrite: bool
    method: str | None
    parts: tuple[str, ...] | None
    rank_multiple: int | None
    latency: LatencyWanted
    calibration_images: int | None
    calibration_file: Path | None
    fisher: bool | None
    data_free: bool
    evaluate: bool
    calibration_split: str | None
    eval_split: str | None
    eval_images: int | None
    batch_size: int
    workers: int | None
    seed: int
    search: Search | None
    judging: Judging = field(default_factory=Judging)
    stock: bool = False
