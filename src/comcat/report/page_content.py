"""What the page of a compressed model says, section by section, as plain data for its template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..models.machine import versions
from .bench_record import BenchRecord, time_groups
from .facts import Facts, TrainingRecord
from .method_words import method_terms
from .page_layers import kept_bars, layer_rows, left_dense, spectra_panels
from .page_samples import Pixels, disagreements
from .spectra_figure import SpectrumSummary
from .tables import MAC_NOTE, Row, compared
from .vector import Chart, progress_chart

if TYPE_CHECKING:
    from ..evaluation.side_by_side import Comparison


class Tile(NamedTuple):
    """A headline: the figure, what it was before, and the share that is left (for a bar), where it is one."""

    label: str
    figure: str
    detail: str
    share: float | None


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
    pixels: Pixels = (None, None)
    spectra: Sequence[SpectrumSummary] = ()
    spectra_of: str = ""
    bench: BenchRecord | None = None


def page_content(facts: Facts, extras: Extras) -> dict[str, Any]:
    """The variables of ``page.html``."""
    rows = compared([facts.dense, facts.small])
    found = extras.comparison
    return {
        "name": facts.name,
        "size": " × ".join(str(n) for n in facts.report.input_size),
        "tiles": _tiles(facts, rows),
        "rows": rows,
        "column": facts.small.name,
        "mac_note": MAC_NOTE,
        "evaluated_on": _evaluated(facts, for_this=found is not None),
        "latency": facts.record.latency if facts.record else None,
        "bench": _bench(extras.bench),
        "panels": kept_bars(facts),
        "layers": layer_rows(facts, extras.spectra),
        "dense": left_dense(facts),
        "notes": facts.report.notes,
        "spectra": spectra_panels(facts, extras.spectra),
        "spectra_of": extras.spectra_of,
        "method": method_terms(facts),
        "training": _training(facts.training),
        "samples": None if found is None else disagreements(found, extras.names, extras.pixels),
        "steps": _steps(facts),
        "versions": _versions(facts),
        "device": facts.record.device if facts.record else None,
        "load": facts.load_line,
        "written_by": versions()["comcat"],
    }


def _evaluated(facts: Facts, for_this: bool) -> str | None:
    """On what scores were measured, on how many images, and whether that was now."""
    if facts.evaluated_on is None or facts.small.evaluation is None:
        return facts.evaluated_on
    words = f"{facts.evaluated_on}, {facts.small.evaluation.images:,} images"
    return f"{words}, for this report" if for_this else words


def _tiles(facts: Facts, rows: Sequence[Row]) -> list[Tile]:
    tiles = []
    for row in rows:
        before, after = row.values
        if row.label in ("parameters", "MACs", "on disk"):
            share = float(row.changes[0].removesuffix(" %")) if row.changes[0].endswith("%") else None
            tiles.append(Tile(row.label, after, f"{row.changes[0]} of {before}", share))
        elif row.label == "images/s":
            tiles.append(Tile("speed", row.changes[0].replace(" x", " ×"), f"{after} images/s, dense {before}", None))
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
        "versions": {name: version.partition("+")[0] for name, version in record.machine.runtimes.items()},
        "images": record.images,
        "left_out": record.left_out,
    }


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


def _steps(facts: Facts) -> list[str]:
    """The commands that made the model, in their order."""
    commands = [record.command for record in (facts.record, facts.training) if record is not None]
    return [command for command in dict.fromkeys(commands) if command]


def _versions(facts: Facts) -> dict[str, str]:
    record = facts.training or facts.record
    return record.versions if record else {}
