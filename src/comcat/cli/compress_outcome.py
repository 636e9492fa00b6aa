"""What a run of ``comcat compress`` comes to: for machines, for people, and as a picture."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import timings
from .compress_settings import CompressSettings
from .console import Screen

if TYPE_CHECKING:
    from ..calibration.statistics import Calibration
    from ..compression import Report
    from ..planning.plan import Plan
    from ..report.tables import Measured


@dataclass(frozen=True)
class CompressOutcome:
    """Everything that is shown and written.

    Attributes:
        made_with: what it takes to do it again.
        latency: what :func:`comcat.cli.timings.describe` says, where timings were used.
        place: what it was evaluated on; skipped: images that could not be read, and why.
        more: what else the document says.
    """

    settings: CompressSettings
    made_with: dict[str, Any]
    plan: Plan
    calibration: Calibration | None
    report: Report
    dense: Measured
    small: Measured
    latency: dict[str, Any] | None
    place: str | None
    skipped: dict[str, str]
    more: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The outcome for machines: the ``--json`` document and ``report.json``."""
        made = self.calibration
        return {
            **self.made_with,
            "model": self.settings.model,
            "out": str(self.settings.out),
            "method": self.plan.method,
            "seed": self.settings.seed,
            "calibration": {"images": made.num_images, "fisher": made.fisher} if made else None,
            "latency": self.latency,
            "evaluated_on": self.place,
            "skipped_images": self.skipped,
            "dense": self.dense.to_dict(),
            "compressed": self.small.to_dict(),
            "report": self.report.to_dict(),
            **self.more,
        }

    def write(self, stage: Path, screen: Screen) -> None:
        """Plan, document and picture, beside the model."""
        from ..errors import ComcatError
        from ..report.figures import draw_kept

        self.plan.save(stage / "plan.json")
        (stage / "report.json").write_text(json.dumps(self.to_dict(), indent=1, default=str) + "\n")
        try:
            draw_kept(self.report, stage / "report.png", *self._titles())
        except ComcatError as error:
            screen.note(f"no report.png: {error}")

    def _titles(self) -> tuple[str, str]:
        from ..report.format import count

        dense, small = self.dense, self.small
        title = f"{self.settings.model}: {count(dense.params)} → {count(small.params)} parameters"
        subtitle = f"what every layer kept · MACs {count(dense.macs)} → {count(small.macs)}"
        if dense.evaluation and small.evaluation:
            before, after = dense.evaluation.figures()[0], small.evaluation.figures()[0]
            subtitle += f" · {before.label} {before.shown().removesuffix(' %')} → {after.shown()}"
        return title, subtitle

    def show(self, screen: Screen, loaded_by: str) -> None:
        """Print it.

        Args:
            loaded_by: what opens the model in Python.
        """
        from ..report import tables

        screen.out.print()
        screen.out.print(tables.layers(self.report))
        if dense := tables.left_dense(self.report):
            screen.out.print(dense)
        title = f"{self.settings.model}, ranks by {self.plan.method}, "
        title += f"evaluated on {self.place}" if self.place else "not evaluated"
        screen.out.print(tables.comparison([self.dense, self.small], title))
        if self.latency:
            screen.out.print(timings.line(self.latency))
        screen.say("written to ", (self.settings.out, "bold"), f"; in Python: {loaded_by}")
        screen.result(self.to_dict())
