"""What the page of a compressed model says, section by section, as plain data for its template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import BudgetError
from ..models.machine import versions
from ..planning.choice import comparison
from ..planning.plan import Budget
from . import format as fmt
from .bench_record import BenchRecord, time_groups
from .facts import Facts, TrainingRecord
from .figures import kept_by_part
from .spectra_figure import SpectrumSummary
from .style import TITLES
from .tables import MAC_NOTE, Row, compared
from .thumbnails import data_uri
from .vector import Chart, Curve, progress_chart, spectrum_curve

if TYPE_CHECKING:
    from ..evaluation.side_by_side import Comparison, Sample

METHODS = {
    "uniform": "the same share of every layer",
    "spectrum": "by the spectra of the layers, the component that counts most for its cost first",
    "probe": "by cutting one part of one layer at a time and measuring what it does to the outputs",
    "search": "learned: a distribution over candidate widths, trained with the budget in its loss",
    "manual": "written by hand",
    "full-rank": "every layer at its full width",
}
VERDICTS = {
    "lost": "Only the dense model is right",
    "won": "Only the compressed model is right",
    "changed": "Another answer",
}
#: A second moment that needed more than this is not that of any data, see :class:`comcat.LayerReport`.
_LARGE_RIDGE = 1e-4


class Tile(NamedTuple):
    """A headline: the figure, what it was before, and the share that is left (for a bar), where it is one."""

    label: str
    figure: str
    detail: str
    share: float | None


class Bar(NamedTuple):
    row: str
    share: float | None
    label: str


class PartShown(NamedTuple):
    """One part of one layer in the table of layers."""

    key: str
    name: str
    kept: int
    full: int
    curve: Curve | None


class LayerRow(NamedTuple):
    name: str
    kind: str
    parts: list[PartShown]
    params: tuple[str, str, float]  # before, after, share in percent
    macs: tuple[str, str, float]
    error: str
    doubtful: bool


class Panel(NamedTuple):
    """Spectra of one part of all layers; ``even`` is where a low-rank layer stops being smaller, in percent."""

    key: str
    title: str
    full: int
    curves: list[Curve]
    even: float | None


class SampleShown(NamedTuple):
    """A sample as it is drawn: the picture, and lines of (whose answer, the answer, its probability)."""

    picture: str
    answers: list[tuple[str, str, str]]
    distance: str


@dataclass(frozen=True)
class Extras:
    """What a page can say if more than the directory is at hand.

    Attributes:
        comparison: of both models on images; names: of the classes; pixels: mean and std by which images were
            normalized.
        spectra: of the dense model; spectra_of: what they are the energies of, in words.
        bench: times of models in runtimes.
    """

    comparison: Comparison | None = None
    names: Sequence[str] | None = None
    pixels: tuple[Sequence[float] | None, Sequence[float] | None] = (None, None)
    spectra: Sequence[SpectrumSummary] = ()
    spectra_of: str = ""
    bench: BenchRecord | None = None


def page_content(facts: Facts, extras: Extras) -> dict[str, Any]:
    """The variables of ``page.html``."""
    rows = compared([facts.dense, facts.small])
    return {
        "name": facts.name,
        "size": " × ".join(str(n) for n in facts.report.input_size),
        "tiles": _tiles(facts, rows),
        "rows": rows,
        "column": facts.small.name,
        "mac_note": MAC_NOTE,
        "evaluated_on": facts.evaluated_on,
        "latency": facts.record.latency if facts.record else None,
        "bench": _bench(extras.bench),
        "panels": _kept(facts),
        "layers": _layers(facts, extras.spectra),
        "dense": _left_dense(facts),
        "notes": facts.report.notes,
        "spectra": _panels(facts, extras.spectra),
        "spectra_of": extras.spectra_of,
        "method": _method(facts),
        "training": _training(facts.training),
        "samples": _samples(extras),
        "steps": _steps(facts),
        "versions": _versions(facts),
        "device": facts.record.device if facts.record else None,
        "load": facts.load_line,
        "written_by": versions()["comcat"],
    }


def _tiles(facts: Facts, rows: Sequence[Row]) -> list[Tile]:
    tiles = []
    for row in rows:
        before, after = row.values
        if row.label in ("parameters", "MACs", "on disk"):
            share = float(row.changes[0].removesuffix(" %")) if row.changes[0].endswith("%") else None
            tiles.append(Tile(row.label, after, f"{row.changes[0]} of {before}", share))
        elif row.label == "images/s":
            tiles.append(Tile("speed", row.changes[0].replace(" x", " ×"), f"{after} images/s after {before}", None))
    figures = [row for row in rows if row.label not in ("parameters", "MACs", "on disk", "images/s")]
    if figures:  # the score that counts most, first of all
        best = figures[0]
        tiles.insert(0, Tile(best.label, best.values[1], f"{best.changes[0]} from {best.values[0]}", None))
    elif facts.small.evaluation is not None:
        score = facts.small.evaluation.figures()[0]
        tiles.insert(0, Tile(score.label, score.shown(), "the dense model was not evaluated with it", None))
    return tiles


def _bench(record: BenchRecord | None) -> dict[str, Any] | None:
    if record is None or not record.rows:
        return None
    return {
        "groups": time_groups(record),
        "device": record.machine.device,
        "threads": record.machine.threads,
        "versions": record.machine.runtimes,
        "left_out": record.left_out,
    }


def _kept(facts: Facts) -> list[tuple[str, str, list[Bar]]]:
    """For every part its key, its title and a bar for every block."""
    rows, parts = kept_by_part(facts.report)
    panels = []
    for part, blocks in parts.items():
        bars = [Bar(r, 100 * blocks[r].share, blocks[r].label) if r in blocks else Bar(r, None, "dense") for r in rows]
        panels.append((part, TITLES[part], bars))
    return panels


def _layers(facts: Facts, spectra: Sequence[SpectrumSummary]) -> list[LayerRow]:
    by_part = {(s.layer, s.part): s for s in spectra}
    rows = []
    for layer in facts.report.layers:
        parts = []
        for part, kept in layer.ranks.items():
            found = by_part.get((layer.name, "head" if part == "rank" else part))
            curve = spectrum_curve(layer.name, found.tail, kept) if found else None
            key = {"rank": "head"}.get(part, part)
            parts.append(PartShown(key, fmt.PART_NAMES.get(part, part), kept, layer.full[part], curve))
        rows.append(
            LayerRow(
                layer.name,
                layer.kind,
                parts,
                _fall(layer.params_before, layer.params_after),
                _fall(layer.macs_before, layer.macs_after),
                fmt.error(layer.error),
                (layer.ridge or 0) > _LARGE_RIDGE,
            )
        )
    return rows


def _fall(before: int, after: int) -> tuple[str, str, float]:
    return fmt.count(before), fmt.count(after), 100 * after / max(before, 1)


def _left_dense(facts: Facts) -> list[tuple[str, str, list[str]]]:
    """Reason, class and the layers that have them."""
    found: dict[tuple[str, str], list[str]] = {}
    for entry in facts.report.dense:
        found.setdefault((entry.reason, entry.cls), []).append(entry.name)
    return [(*key, names) for key, names in found.items()]


def _panels(facts: Facts, spectra: Sequence[SpectrumSummary]) -> list[Panel]:
    cut = {
        (layer.name, "head" if part == "rank" else part): kept
        for layer in facts.report.layers
        for part, kept in layer.ranks.items()
    }
    panels = []
    for part in TITLES:
        found = [s for s in spectra if s.part == part]
        if not found:
            continue
        curves = [
            spectrum_curve(s.layer, s.tail, cut.get((s.layer, part)), 0.3 + 0.7 * (i + 1) / len(found))
            for i, s in enumerate(found)
        ]
        even = 100 * found[0].break_even / found[0].full
        panels.append(Panel(part, TITLES[part], found[0].full, curves, even if even < 100 else None))
    return panels


def _method(facts: Facts) -> list[tuple[str, str]]:
    """What was asked for and how it was done: pairs of a term and its words."""
    plan, record = facts.plan, facts.record
    said = METHODS.get(plan.method)
    terms = [("widths", f"{plan.method}: {said}" if said else plan.method)]
    if plan.budget:
        terms.insert(0, ("budget", budget_words(plan.budget)))
    if line := comparison(plan):
        terms.append(("chosen from", line))
    if record and record.calibration:
        weighed = ", errors weighed by output gradients (Fisher)" if record.calibration.fisher else ""
        terms.append(("calibration", f"{record.calibration.images:,} images{weighed}"))
    elif record:
        terms.append(("calibration", "none: from the weights alone"))
    return terms


def budget_words(budget: Mapping[str, Any]) -> str:
    """``{"params": 0.5, "of": "model"}`` -> ``50 % of the parameters of the model``."""
    given = {key: value for key, value in budget.items() if value is not None}
    try:
        found = Budget(**given)
    except (BudgetError, TypeError):  # edited by hand
        return ", ".join(f"{key} {value}" for key, value in given.items())
    unit = {"params": "parameters", "macs": "MACs", "latency": "time"}.get(found.unit, found.unit)
    if isinstance(found.value, float):
        whole = "model" if found.of == "model" else "compressed parts"
        return f"{100 * found.value:g} % of the {unit} of the {whole}"
    if found.unit == "latency":
        return f"at most {found.value / 1e6:g} ms for a batch"
    return f"at most {fmt.count(found.value)} {unit}"


def _training(record: TrainingRecord | None) -> dict[str, Any] | None:
    if record is None:
        return None
    terms = [("images", record.data + (f", split {record.train_split}" if record.train_split else ""))]
    terms.append(("length", f"{record.epochs:g} epochs, {record.steps:,} steps"))
    for key in ("optimizer", "lr", "weight_decay", "distillation", "precision", "ema", "seed"):
        value = record.config.get(key)
        if value is not None:
            terms.append((key.replace("_", " "), f"{value:g}" if isinstance(value, float) else str(value)))
    return {"terms": terms, "chart": _history(record)}


def _history(record: TrainingRecord) -> tuple[str, Chart] | None:
    scores = [(entry.epoch, entry.evaluation.evaluation("the history").figures()) for entry in record.history]
    known = [(epoch, figures[0]) for epoch, figures in scores if figures]
    if len(known) < 2:
        return None
    ordered = sorted((figure for _, figure in known), key=lambda figure: figure.value)
    values = [(epoch, figure.value, f"{figure.shown()} after {epoch:g} epochs") for epoch, figure in known]
    return known[0][1].label, progress_chart(values, ordered[0].shown(), ordered[-1].shown())


def _samples(extras: Extras) -> dict[str, Any] | None:
    found = extras.comparison
    if found is None:
        return None
    groups = []
    for verdict, title in VERDICTS.items():
        samples = found.samples.get(verdict, [])
        if samples:
            count = found.differing.get(verdict, len(samples))
            shown = [_shown(sample, extras) for sample in samples]
            groups.append({"title": title, "count": count, "verdict": verdict, "samples": shown})
    changed = sum(found.differing.values()) if found.kind == "classes" else None
    return {
        "kind": found.kind,
        "images": found.images,
        "divergence": f"{found.divergence:.4g}",
        "changed": changed,
        "share": f"{100 * changed / found.images:.2f}" if changed is not None else None,
        "groups": groups,
    }


def _shown(sample: Sample, extras: Extras) -> SampleShown:
    answers = []
    if sample.dense is not None and sample.small is not None:
        for who, (number, probability) in (("dense", sample.dense), ("small", sample.small)):
            answers.append((who, class_name(number, extras.names), f"{100 * probability:.0f} %"))
        if sample.label is not None:
            answers.append(("truth", class_name(sample.label, extras.names), ""))
    return SampleShown(data_uri(sample.image, *extras.pixels), answers, f"{sample.divergence:.3g}")


def class_name(number: int, names: Sequence[str] | None) -> str:
    """The name of a class, or ``class 3``."""
    return names[number] if names is not None and 0 <= number < len(names) else f"class {number}"


def _steps(facts: Facts) -> list[str]:
    """The commands that made the model, in their order."""
    commands = [record.command for record in (facts.record, facts.training) if record is not None]
    return [command for command in dict.fromkeys(commands) if command]


def _versions(facts: Facts) -> dict[str, str]:
    record = facts.training or facts.record
    return record.versions if record else {}
