"""What the page of a compressed model says of its layers: what every one kept, its spectra, and what stayed dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from . import format as fmt
from .facts import Facts
from .figures import kept_by_part, stayed_dense
from .spectra_figure import SpectrumSummary
from .style import TITLES
from .vector import Curve, spectrum_curve

#: A second moment that needed more than this is not that of any data, see :class:`comcat.LayerReport`.
_LARGE_RIDGE = 1e-4


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


def kept_bars(facts: Facts) -> list[tuple[str, str, list[Bar]]]:
    """For every part its key, its title and a bar for every block that has it."""
    rows, parts = kept_by_part(facts.report)
    panels = []
    for part, blocks in parts.items():
        dense = stayed_dense(rows, parts, part)
        bars = [Bar(row, 100 * blocks[row].share, blocks[row].label) for row in rows if row in blocks]
        bars += [Bar(row, None, "dense") for row in dense]
        panels.append((part, TITLES[part], sorted(bars, key=lambda bar: rows.index(bar.row))))
    return panels


def layer_rows(facts: Facts, spectra: Sequence[SpectrumSummary]) -> list[LayerRow]:
    """One row for every layer that was reduced."""
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


def left_dense(facts: Facts) -> list[tuple[str, str, list[str]]]:
    """Reason, class and the layers that have them."""
    found: dict[tuple[str, str], list[str]] = {}
    for entry in facts.report.dense:
        found.setdefault((entry.reason, entry.cls), []).append(entry.name)
    return [(*key, names) for key, names in found.items()]


def spectra_panels(facts: Facts, spectra: Sequence[SpectrumSummary]) -> list[Panel]:
    """Spectra part by part, where there are any."""
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
