"""What ``comcat judge`` found, as tables: scores with their intervals, costs, and means over subjects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Group
from rich.text import Text

from . import format as fmt
from .tables import new_table, titled

if TYPE_CHECKING:
    from ..customize.judging.judgement import JudgedRow, Judgement
    from ..customize.judging.metrics import Estimate
    from ..customize.judging.subject_benchmark import BenchmarkResult

#: Scores that stand in one table.
_GROUPS = {
    "The subject": ("dino", "clip_i", "clip_t", "diversity"),
    "The rest": ("kept_dino", "kept_clip_i", "lost_clip_t"),
}
_NOTES = {
    "The subject": "mean and half of its 95 % interval (bootstrap over prompts, and seeds within)",
    "The rest": "prompts without the subject",
}
_SUBJECTS = "mean over subjects and half of its 95 % interval (bootstrap over subjects)"


class _Line(NamedTuple):
    """A row: its name, cells by score, and the style of each cell."""

    name: str
    cells: Mapping[str, str]
    bold: Sequence[str] = ()
    style: str = ""


def scores_tables(found: Judgement) -> Group:
    """One row for the photos, the base and every adapter; what was measured of the subject, and of the rest."""
    lines = [
        _Line(row.name, {name: shown(estimate) for name, estimate in row.scores.items()}, row.best)
        for row in found.rows
    ]
    if found.ceiling:
        ceiling = {name: f"{value:.3f}" for name, value in found.ceiling.items()}
        lines.insert(0, _Line(f"{found.photos} photos, each to all others", ceiling, style="dim"))
    notes = {title: [note] for title, note in _NOTES.items()}
    if len(found.rows) > 2:
        notes["The subject"].append("bold: no adapter is measurably better")
    if found.other_seeds:
        values = ", ".join(f"{key.upper()} {value:.3f}" for key, value in found.other_seeds.items())
        notes["The rest"].append(f"the base's own pictures of a prompt at other seeds: {values}")
    if found.missing:
        notes["The rest"].append(_unmeasured(found.missing))
    return Group(*_tables(lines, notes))


def shown(estimate: Estimate) -> str:
    """``0.712 ± 0.013``."""
    margin = "" if estimate.margin is None else f" ± {estimate.margin:.3f}"
    return f"{estimate.mean:.3f}{margin}"


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
    memory = "allocated by PyTorch on the GPU" if devices.startswith("cuda") else "resident, of the whole process"
    return titled("Cost", table, f"pictures drawn on {devices or 'nothing yet'}; memory: {memory}, while drawing")


def benchmark_tables(found: BenchmarkResult) -> Group:
    """One row for every subject's adapter, then the means of the adapters and of the base."""
    from ..customize.judging.judgement import KINDS

    judgements = list(found.judgements.values())
    measured = [name for name in KINDS if name in judgements[0].rows[1].scores]
    table = new_table()
    table.add_column("subject", overflow="fold")
    for name in measured:
        table.add_column(KINDS[name].label.replace(" ", "\n"), justify="right", no_wrap=True)
    for name, judgement in found.judgements.items():
        scores = judgement.rows[1].scores
        table.add_row(name, *(f"{scores[key].mean:.3f}" for key in measured))
    means = (("base", found.mean(0)), ("adapters", found.mean(1)))
    lines = [_Line(label, {name: shown(estimate) for name, estimate in mean.items()}) for label, mean in means]
    ceiling = found.ceiling()
    if ceiling:
        lines.insert(0, _Line("photos", {name: f"{value:.3f}" for name, value in ceiling.items()}, style="dim"))
    count = len(judgements)
    title = f"{count} subjects" if count == found.subjects else f"{count} of {found.subjects} subjects"
    notes = {"The subject": [_SUBJECTS], "The rest": [_NOTES["The rest"]]}
    if judgements[0].missing:
        notes["The rest"].append(_unmeasured(judgements[0].missing))
    return Group(titled(title, table), *_tables(lines, notes))


def _tables(lines: Sequence[_Line], notes: Mapping[str, Sequence[str]]) -> list[Group]:
    from ..customize.judging.judgement import KINDS

    tables = []
    for title, names in _GROUPS.items():
        measured = [name for name in names if any(name in line.cells for line in lines)]
        table = new_table()
        table.add_column("", overflow="fold")
        for name in measured:
            table.add_column(KINDS[name].label, justify="right", no_wrap=True)
        for line in (line for line in lines if any(name in line.cells for name in measured)):
            cells = [Text(line.cells.get(name, ""), style="bold" if name in line.bold else "") for name in measured]
            table.add_row(line.name, *cells, style=line.style)
        meanings = [f"{KINDS[name].label}: {KINDS[name].meaning}" for name in measured]
        tables.append(titled(title, table, "; ".join([*notes[title], *meanings])))
    return tables


def _unmeasured(missing: Mapping[str, str]) -> str:
    return "; ".join(f"not measured: {label}, which {why}" for label, why in missing.items())
