"""Tables of small models in other runtimes: their time, their files in int8, what files differ by."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from tables import spread, table

Results = Mapping[str, Any]


def latency_tables(results: Results) -> str:
    """Plans by MACs against plans by a runtime's own latency."""
    settings = results["settings"]
    parts = [f"{results['device']}, plans for {settings['keep']:.2f} of the dense time.\n"]
    refused = []
    for kind, more in (("speed", []), ("accuracy", ["top-1, %"])):
        rows = []
        for key, cell in sorted(results["cells"].items()):
            begin, name, rest = key.split(" ", 2)
            if begin != kind:
                continue
            if "refused" in cell:
                refused.append(f"- {name}, {rest}: {cell['refused']}")
                continue
            both = [(cell["macs"], "MACs"), (cell["latency"], "latency")]
            shown = [f"{one['kept']:.3f}" for one, _ in both]
            shown += [f"{one['macs']:.2f}" for one, _ in both] + [f"{one['realized']:.2f}" for one, _ in both]
            shown += [spread(one["top1"]) for one, _ in both if more]
            rows.append([f"{name}, {rest}", f"{cell['dense_ms']:.1f}", *shown])
        heads = ["time kept", "MACs kept", "realized", *more]
        titles = ["", "dense, ms", *(f"{head}, by {by}" for head in heads for by in ("MACs", "latency"))]
        if rows:
            parts.append(table(titles, rows))
    if refused:
        parts.append("\n".join(["Out of reach:\n", *refused, ""]))
    return "\n".join(parts)


def int8_tables(results: Results) -> str:
    """Accuracy, bytes and time of the files of a teacher."""
    parts = []
    for teacher, found in results["results"].items():
        rows = []
        for kind in ("dense", "compressed"):
            models = [files for name, files in found.items() if name.split()[0] == kind]
            for to, files in models[0].items():
                whole = found["dense"][to]["fp32"]["bytes"]
                for name, one in files.items():
                    every = [model[to][name] for model in models if to in model]
                    times = [one.get(f"batch {batch}", {}).get("of_dense_fp32") for batch in (1, 8)]
                    shown = ["" if time is None else f"{time:.2f}" for time in times]
                    size = statistics.fmean(file["bytes"] for file in every)
                    layers = [
                        spread(counts if len(set(counts)) > 1 else counts[:1], 0)
                        for counts in ([len(file[which]) for file in every] for which in ("weights_only", "floats"))
                    ]
                    top1 = spread([file["top1"] for file in every])
                    sizes = [f"{size / 1e6:.2f}", f"1/{whole / size:.1f}"]
                    rows.append([f"{to}, {kind}, {name}", top1, *sizes, *shown, *layers])
        titles = ["", "top-1, %", "MB", "of dense fp32", "time, batch 1", "batch 8", "int8 weights only", "float"]
        head = f"`{teacher}`, {found['test_images']} test images, {100 * found['keep']:g} % of the parameters kept."
        parts.append(f"{head}\n\n{table(titles, rows)}")
    return "\n".join(parts)


#: Cells of a file, with the head of their column.
_FILES = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "any size": "fp32, other size"}


def parity_table(results: Results) -> str:
    """The largest difference from PyTorch in float32, in units of the largest output; by format, then by model."""
    rows: list[list[str]] = []
    largest: dict[str, dict[str, list[float]]] = {}
    refusals: dict[str, list[str]] = {}
    for model, kinds in results["results"].items():
        for kind, formats in kinds.items():
            for to, cells in formats.items():
                rows.append([f"{model}, {kind}, {to}", *(_parity_cell(cells.get(name)) for name in _FILES)])
                for name, cell in cells.items():
                    if "refused" in cell:
                        refusals.setdefault(cell["refused"], []).append(f"{model}, {kind}, {to}, {_FILES[name]}")
                    elif cell["relative"] is not None:
                        largest.setdefault(to, {}).setdefault(name, []).append(cell["relative"])
    heads = list(_FILES.values())
    summary = [
        [to, *(f"{max(found[name]):.1e} ({len(found[name])})" if name in found else "" for name in _FILES)]
        for to, found in largest.items()
    ]
    parts = [
        "The largest of every format (over so many files):\n",
        table(["", *heads], summary),
        "All:\n",
        table(["", *heads], rows),
    ]
    if refusals:
        parts.append("Refused:\n")
        parts.append("\n".join(f"* {'; '.join(files)}: {_plain(text)}" for text, files in refusals.items()) + "\n")
    return "\n".join(parts)


def _parity_cell(cell: Any) -> str:
    if cell is None:
        return ""
    if "refused" in cell:
        return "refused"
    return "converted, never run" if cell["relative"] is None else f"{cell['relative']:.1e}"


def _plain(text: str) -> str:
    """A message as a line of code, whatever is in it."""
    return f"`{' '.join(text.replace('`', '').split())}`"
