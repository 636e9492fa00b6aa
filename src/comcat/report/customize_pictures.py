"""Tables about adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from ..wording import some
from . import format as fmt

if TYPE_CHECKING:
    from ..customize.contest import Outcome
    from ..customize.lora.exporting import Conversion, LayerError


def conversion(result: Conversion, title: str, output: float | None = None) -> Table:
    """Errors by layer, largest effect first, and what was left out."""
    caption = f"all layers: {fmt.error(result.relative)} of what the products do"
    if output is not None:
        caption += f"; the denoiser's output: {fmt.error(output)} of the change"
    if result.dropped:
        caption += f". Left out: {some(result.dropped, '; ')}"
    table = Table(title=f"Error {title}", caption=caption, box=None, title_justify="left", caption_justify="left")
    table.add_column("layer", overflow="fold")
    for column in ("QK effect", "QK error", "VO effect", "VO error"):
        table.add_column(column, justify="right")
    rows: dict[tuple[str, str], dict[str, LayerError]] = {}
    for error in result.errors:
        rows.setdefault((error.component, error.layer), {})[error.part] = error
    for (component, layer), parts in sorted(rows.items(), key=lambda r: -max(e.effect for e in r[1].values())):
        cells = []
        for part in ("qk", "vo"):
            found = parts.get(part)
            cells += (
                [f"{found.effect:.3g}", "left out" if not found.kept else fmt.error(found.relative)]
                if found
                else ["", ""]
            )
        table.add_row(f"{component}.{layer}", *cells)
    return table


def contest(outcomes: Sequence[Outcome], title: str) -> Table:
    """The demo's methods side by side."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("method", no_wrap=True)
    for column in ("stored", "V* right", "others right", "time", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for o in outcomes:
        if o.method.kind == "base":
            table.add_row(o.method.name, "", "", f"{o.retention:.1f} %", "", "")
            continue
        cells = [fmt.size(o.bytes), f"{o.concept:.1f} %", f"{o.retention:.1f} %"]
        table.add_row(o.method.name, *cells, f"{o.seconds:.0f} s", f"+{fmt.size(o.peak)}")
    return table


def storages(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The same adapter in every storage."""
    table = Table(title="The adapter of rank 2, stored and loaded again", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("storage")
    for column in ("on disk", "largest error", "V* right", "others right"):
        table.add_column(column, justify="right")
    for row in rows:
        scores = [f"{row[key]:.1f} %" for key in ("concept", "retention")]
        table.add_row(row["storage"], fmt.size(row["bytes"]), fmt.error(row["error"]), *scores)
    return table
