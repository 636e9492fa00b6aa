"""Tables about adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from ..wording import some
from . import format as fmt

if TYPE_CHECKING:
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
