"""Results as rich tables: before and after, layer by layer, and the spectra of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from . import format as fmt

if TYPE_CHECKING:
    from ..compression import Report
    from ..evaluation.results import Evaluation
    from .spectra_figure import SpectrumSummary

SPECTRA_NOTE = (
    "components that hold 90 / 99 % of the energy; below its break-even rank (even) a low-rank layer is smaller than "
    "the dense one; the curve is the energy of the components, largest first, on a scale down to 1/1000"
)
MAC_NOTE = "a MAC is one multiply-add of a matrix product, attention products included, for one image"


@dataclass(frozen=True)
class Measured:
    """One column of a before-and-after table.

    Attributes:
        name: heading, e.g. ``dense``.
        params, macs: of the whole model; macs for one image.
        bytes: of its weights on disk.
        evaluation: accuracy, where it was evaluated.
        speed: images per second, where it was measured.
    """

    name: str
    params: int
    macs: int
    bytes: int
    evaluation: Evaluation | None = None
    speed: float | None = None

    def to_dict(self) -> dict[str, Any]:
        evaluation = self.evaluation.to_dict() if self.evaluation else None
        return {
            "params": self.params,
            "macs": self.macs,
            "bytes": self.bytes,
            "images_per_second": self.speed,
            "evaluation": evaluation,
        }


def new_table() -> Table:
    """As all tables here look."""
    return Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)


def titled(title: str, table: Table, caption: str | None = None) -> Group:
    """A table below its title; rich would wrap both to the table's width."""
    lines: list[Any] = [Text(title, style="bold"), table]
    if caption:
        lines.append(Text(caption, style="dim"))
    return Group(*lines, Text())


def comparison(columns: Sequence[Measured], title: str) -> Group:
    """One model per column; the first is the dense one, to which the others are compared."""
    table = new_table()
    table.add_column("")
    base = columns[0]
    for column in columns:
        table.add_column(column.name, justify="right")
        if column is not base:
            table.add_column("kept", justify="right", style="cyan")

    for row in compared(columns):
        cells = [row.values[0]]
        for value, change in zip(row.values[1:], row.changes, strict=True):
            cells += [value, change]
        table.add_row(row.label, *cells)
    return titled(title, table, MAC_NOTE)


class Row(NamedTuple):
    """One figure of several models; ``changes`` has one entry less, the first model is what they are compared to."""

    label: str
    values: list[str]
    changes: list[str]


def compared(columns: Sequence[Measured]) -> list[Row]:
    """What a before-and-after table says, in words; figures that a column lacks are left out."""
    rows = []
    for label, name, shown in (
        ("parameters", "params", fmt.count),
        ("MACs", "macs", fmt.count),
        ("on disk", "bytes", fmt.size),
    ):
        numbers = [getattr(c, name) for c in columns]
        rows.append(Row(label, [shown(n) for n in numbers], [fmt.percent(n, numbers[0]) for n in numbers[1:]]))
    evaluations = [c.evaluation for c in columns if c.evaluation is not None]
    if len(evaluations) == len(columns):
        for figures in zip(*(e.figures() for e in evaluations), strict=True):
            changes = [f.change(figures[0]) for f in figures[1:]]
            rows.append(Row(figures[0].label, [f.shown() for f in figures], changes))
    speeds = [c.speed for c in columns if c.speed is not None]
    if len(speeds) == len(columns):
        changes = [f"{v / speeds[0]:.2f} x" for v in speeds[1:]]
        rows.append(Row("images/s", [f"{v:,.0f}" for v in speeds], changes))
    return rows


def budgets(models: Sequence[Measured], title: str) -> Group:
    """One evaluated model per row; the first is the dense one."""
    table = new_table()
    first = models[0].evaluation
    shown = first.figures()[0].label if first else "top-1"
    for heading in ("kept", "params", "MACs", "on disk", shown, "change", "img/s", "faster"):
        style = "cyan" if heading in ("change", "faster") else None
        table.add_column(heading, justify="right", style=style, no_wrap=True)
    dense = models[0]
    for model in models:
        cells = [model.name, fmt.count(model.params), fmt.count(model.macs), fmt.size(model.bytes)]
        if model.evaluation and dense.evaluation:
            score, before = model.evaluation.figures()[0], dense.evaluation.figures()[0]
            cells += [score.shown(), "" if model is dense else score.change(before)]
        if model.speed and dense.speed:
            cells += [f"{model.speed:,.0f}", "" if model is dense else f"{model.speed / dense.speed:.2f} x"]
        table.add_row(*cells)
    return titled(title, table, MAC_NOTE)


def evaluation(name: str, result: Evaluation, params: int, macs: int) -> Group:
    """One evaluated model."""
    table = new_table()
    scores = [(figure.label, figure.shown()) for figure in result.figures()]
    if result.outputs not in ("features", "metric") and not math.isnan(result.loss):  # that of features is a score
        scores.append(("loss", f"{result.loss:.4f}"))
    if not math.isnan(result.images_per_second):
        scores.append(("images/s", f"{result.images_per_second:,.0f}"))
    for heading in ("parameters", "MACs", *(label for label, _ in scores)):
        table.add_column(heading, justify="right")
    table.add_row(fmt.count(params), fmt.count(macs), *(shown for _, shown in scores))
    return titled(f"{name}, {result.images:,} images", table, MAC_NOTE)


def layers(report: Report) -> Group:
    """What was kept of every compressed layer."""
    table = new_table()
    table.add_column("layer", no_wrap=True)
    table.add_column("kept of full width", no_wrap=True)
    table.add_column("params", justify="right", no_wrap=True)
    table.add_column("share", justify="right", style="cyan", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("est. error", justify="right", no_wrap=True)
    for layer in report.layers:
        share = layer.params_after / max(layer.params_before, 1)
        table.add_row(
            layer.name,
            fmt.ranks(layer.ranks, layer.full),
            fmt.count(layer.params_after),
            f"{100 * share:.0f} %",
            bar(share),
            fmt.error(layer.error),
        )
    return titled("Layers", table)


def left_dense(report: Report) -> Group | None:
    """What was not compressed and why; None if there is nothing to say."""
    if not report.dense:
        return None
    table = new_table()
    table.add_column("layer")
    table.add_column("class")
    table.add_column("why")
    for entry in report.dense:
        table.add_row(entry.name, entry.cls, entry.reason)
    return titled("Left dense", table)


def spectra(summaries: Sequence[SpectrumSummary], calibrated: bool) -> Group:
    """How many components hold 90 and 99 % of the energy of every part of every layer."""
    source = "of the activations" if calibrated else "of the weights (no images)"
    table = new_table()
    table.add_column("layer", no_wrap=True, min_width=min(24, max((len(s.layer) for s in summaries), default=5)))
    table.add_column("part", no_wrap=True, min_width=len("neurons"))
    for heading in ("90 %", "99 %", "even", "full"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("spectrum", no_wrap=True)
    table.add_column("verdict", no_wrap=True, min_width=len("compressible"))
    previous = None
    for s in summaries:
        verdict = Text(s.verdict, style={"low-rank": "green", "compressible": "cyan"}.get(s.verdict, "dim"))
        table.add_row(
            s.layer if s.layer != previous else "",
            s.part,
            str(s.rank90),
            str(s.rank99),
            str(s.break_even),
            str(s.full),
            fmt.sparkline(s.decay, 10),
            verdict,
        )
        previous = s.layer
    return titled(f"Spectra, {source}", table, SPECTRA_NOTE)


def bar(share: float, width: int = 8) -> Text:
    """A share between 0 and 1 as a bar."""
    filled = round(width * min(max(share, 0.0), 1.0))
    return Text.assemble(("█" * filled, "cyan"), ("░" * (width - filled), "bright_black"))
