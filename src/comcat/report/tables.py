"""Results as rich tables: before and after, layer by layer, and the spectra of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from . import format as fmt

if TYPE_CHECKING:
    from ..compress import Report
    from ..evaluate import Evaluation
    from .spectra import SpectrumSummary

MAC_NOTE = "a MAC is one multiply-add of a matrix product, attention products included, for one image"


@dataclass(frozen=True)
class Measured:
    """One column of a before-and-after table.

    Attributes:
        name: heading, e.g. ``dense``.
        params, macs: of the whole model; macs for one image.
        bytes: of its weights on disk.
        evaluation: accuracy and speed, where it was evaluated.
    """

    name: str
    params: int
    macs: int
    bytes: int
    evaluation: Evaluation | None = None

    def to_dict(self) -> dict[str, Any]:
        evaluation = self.evaluation.to_dict() if self.evaluation else None
        return {"params": self.params, "macs": self.macs, "bytes": self.bytes, "evaluation": evaluation}


def _table(title: str | None = None, caption: str | None = None) -> Table:
    return Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        header_style="bold",
        pad_edge=False,
    )


def comparison(columns: Sequence[Measured], title: str | None = None) -> Table:
    """One model per column; the first is the dense one, to which the others are compared."""
    table = _table(title, caption=MAC_NOTE)
    table.add_column("")
    base = columns[0]
    for column in columns:
        table.add_column(column.name, justify="right")
        if column is not base:
            table.add_column("kept", justify="right", style="cyan")

    def row(label: str, values: Sequence[str], changes: Sequence[str]) -> None:
        cells = [values[0]]
        for value, change in zip(values[1:], changes, strict=True):
            cells += [value, change]
        table.add_row(label, *cells)

    for label, name, shown in (
        ("parameters", "params", fmt.count),
        ("MACs", "macs", fmt.count),
        ("on disk", "bytes", fmt.size),
    ):
        numbers = [getattr(c, name) for c in columns]
        row(label, [shown(n) for n in numbers], [fmt.percent(n, numbers[0]) for n in numbers[1:]])
    evaluations = [c.evaluation for c in columns if c.evaluation is not None]
    if len(evaluations) == len(columns):
        first = evaluations[0]
        top1, top5, speed = (
            [getattr(e, n) for e in evaluations] for n in ("top1", "top5", "images_per_second")
        )
        row("top-1", [f"{v:.2f} %" for v in top1], [_points(v - first.top1) for v in top1[1:]])
        row("top-5", [f"{v:.2f} %" for v in top5], [_points(v - first.top5) for v in top5[1:]])
        row(
            "images/s",
            [f"{v:,.0f}" for v in speed],
            [f"{v / first.images_per_second:.2f} x" for v in speed[1:]],
        )
    return table


def budgets(models: Sequence[Measured], title: str) -> Table:
    """One evaluated model per row; the first is the dense one."""
    table = _table(title, caption=MAC_NOTE)
    for heading in ("kept", "parameters", "MACs", "on disk", "top-1", "change", "images/s", "speed-up"):
        table.add_column(heading, justify="right", style="cyan" if heading in ("change", "speed-up") else None)
    base = models[0].evaluation
    for model in models:
        result = model.evaluation
        if result is None or base is None:
            continue
        first = model is models[0]
        table.add_row(
            model.name,
            fmt.count(model.params),
            fmt.count(model.macs),
            fmt.size(model.bytes),
            f"{result.top1:.2f} %",
            "" if first else _points(result.top1 - base.top1),
            f"{result.images_per_second:,.0f}",
            "" if first else f"{result.images_per_second / base.images_per_second:.2f} x",
        )
    return table


def evaluation(name: str, result: Evaluation, params: int, macs: int) -> Table:
    """One evaluated model."""
    table = _table(f"{name}, {result.images:,} images", caption=MAC_NOTE)
    for heading in ("parameters", "MACs", "top-1", "top-5", "loss", "images/s"):
        table.add_column(heading, justify="right")
    table.add_row(
        fmt.count(params),
        fmt.count(macs),
        f"{result.top1:.2f} %",
        f"{result.top5:.2f} %",
        f"{result.loss:.4f}",
        f"{result.images_per_second:,.0f}",
    )
    return table


def layers(report: Report) -> Table:
    """What was kept of every compressed layer."""
    table = _table("Layers")
    table.add_column("layer")
    table.add_column("kept of full width")
    table.add_column("parameters", justify="right")
    table.add_column("kept", justify="right", style="cyan")
    table.add_column("")
    table.add_column("est. error", justify="right")
    for layer in report.layers:
        share = layer.params_after / max(layer.params_before, 1)
        table.add_row(
            layer.name,
            fmt.ranks(layer.ranks, layer.full),
            f"{fmt.count(layer.params_before)} → {fmt.count(layer.params_after)}",
            f"{100 * share:.0f} %",
            bar(share),
            fmt.error(layer.error),
        )
    return table


def left_dense(report: Report) -> Table | None:
    """What was not compressed and why; None if there is nothing to say."""
    if not report.dense:
        return None
    table = _table("Left dense")
    table.add_column("layer")
    table.add_column("class")
    table.add_column("why")
    for entry in report.dense:
        table.add_row(entry.name, entry.cls, entry.reason)
    return table


def spectra(summaries: Sequence[SpectrumSummary], calibrated: bool) -> Table:
    """How many components hold 90 and 99 % of the energy of every part of every layer."""
    source = "of the activations" if calibrated else "of the weights (no images)"
    table = _table(
        f"Spectra, {source}",
        caption="components that hold 90 / 99 % of the energy; a low-rank layer pays off below its break-even "
        "rank; the curve is the energy of the components, from the largest, on a scale down to 1/1000",
    )
    table.add_column("layer")
    table.add_column("part")
    for heading in ("90 %", "99 %", "break-even", "full"):
        table.add_column(heading, justify="right")
    table.add_column("spectrum")
    table.add_column("verdict")
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
            fmt.sparkline(s.decay),
            verdict,
        )
        previous = s.layer
    return table


def bar(share: float, width: int = 10) -> Text:
    """A share between 0 and 1 as a bar."""
    filled = round(width * min(max(share, 0.0), 1.0))
    return Text.assemble(("━" * filled, "cyan"), ("━" * (width - filled), "bright_black"))


def _points(difference: float) -> str:
    return f"{difference:+.2f}"
