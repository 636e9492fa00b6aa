"""What ``comcat judge`` found, as tables: scores with their intervals, and costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from . import format as fmt
from .tables import new_table, titled

if TYPE_CHECKING:
    from ..customize.judging.judgement import JudgedRow, Judgement
    from ..customize.judging.metrics import Estimate
    from ..customize.judging.subject_benchmark import BenchmarkResult

NOTE = "mean and half of its 95 % interval (bootstrap over prompts, and seeds within); bold: none is measurably better"


def scores_table(found: Judgement, title: str) -> Group:
    """One row for the photos, the base and every adapter; a column for every score that was measured."""
    from ..customize.judging.judgement import KINDS

    measured = [name for name in KINDS if any(name in row.scores for row in found.rows)]
    table = new_table()
    table.add_column("")
    for name in measured:
        table.add_column(KINDS[name].label, justify="right")
    if found.ceiling:
        ceilings = [f"{found.ceiling[name]:.3f}" if name in found.ceiling else "" for name in measured]
        table.add_row(Text(f"{found.photos} photos, each to all others", style="dim"), *ceilings)
    for row in found.rows:
        table.add_row(row.name, *(_score(row, name) for name in measured))
    return titled(title, table, "; ".join(_notes(found, measured)))


def _score(row: JudgedRow, name: str) -> Text:
    estimate = row.scores.get(name)
    style = "bold" if name in row.best else ""
    return Text("" if estimate is None else shown(estimate), style=style)


def shown(estimate: Estimate) -> str:
    """``0.712 ± 0.013``."""
    margin = "" if estimate.margin is None else f" ± {estimate.margin:.3f}"
    return f"{estimate.mean:.3f}{margin}"


def _notes(found: Judgement, measured: Sequence[str]) -> list[str]:
    from ..customize.judging.judgement import KINDS

    notes = [NOTE]
    notes += [f"{KINDS[name].label}: {KINDS[name].meaning}" for name in measured]
    if found.other_seeds:
        values = ", ".join(f"{key.upper()} {value:.3f}" for key, value in found.other_seeds.items())
        notes.append(f"the base's own pictures at other seeds, to read 'kept' against: {values}")
    notes += [f"not measured: {label}, which {why}" for label, why in found.missing.items()]
    return notes


def costs_table(rows: Sequence[JudgedRow]) -> Group:
    """Bytes, seconds and memory, as far as they are known."""
    table = new_table()
    table.add_column("")
    for heading in ("file", "training", "a picture", "of the base's", "peak memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        seconds = row.cost.per_picture
        table.add_row(
            row.name,
            "" if row.bytes is None else fmt.size(row.bytes),
            "" if row.train_seconds is None else f"{row.train_seconds:,.0f} s",
            "" if seconds is None else f"{seconds:.3g} s",
            "" if row.speed is None else f"{row.speed:.2f} x",
            "" if row.cost.peak_bytes is None else fmt.size(row.cost.peak_bytes),
        )
    devices = ", ".join(sorted({row.cost.device for row in rows if row.cost.device}))
    on_gpu = devices.startswith("cuda")
    memory = "allocated by PyTorch on the GPU" if on_gpu else "resident, of the whole process"
    return titled("Cost", table, f"pictures drawn on {devices or 'nothing yet'}; memory: {memory}, while drawing")


def benchmark_table(found: BenchmarkResult) -> Group:
    """One row for every subject's adapter, and the means of adapters and of the base."""
    from ..customize.judging.judgement import KINDS

    means = [found.mean(row) for row in (1, 0)]
    measured = [name for name in KINDS if any(name in mean for mean in means)]
    table = new_table()
    for heading in ("subject", "class", *(KINDS[name].label for name in measured)):
        table.add_column(heading, justify="left" if heading in ("subject", "class") else "right")
    for name, judgement in found.judgements.items():
        scores = judgement.rows[1].scores
        cells = [f"{scores[key].mean:.3f}" if key in scores else "" for key in measured]
        table.add_row(name, judgement.class_word, *cells)
    table.add_section()
    for label, mean in zip(("mean", "base"), means, strict=True):
        cells = [shown(mean[key]) if key in mean else "" for key in measured]
        table.add_row(label, "", *cells, style="bold" if label == "mean" else "")
    judgements = list(found.judgements.values())
    if all(judgement.ceiling for judgement in judgements):
        ceilings = [
            f"{sum(j.ceiling[key] for j in judgements) / len(judgements):.3f}" if key in judgements[0].ceiling else ""
            for key in measured
        ]
        table.add_row("photos", "", *ceilings, style="dim")
    count = len(judgements)
    title = f"{count} subjects" if count == found.subjects else f"{count} of {found.subjects} subjects"
    notes = ["means over subjects and half of their 95 % interval (bootstrap over subjects)"]
    notes += [f"not measured: {label}, which {why}" for label, why in judgements[0].missing.items()]
    return titled(title, table, "; ".join(notes))
