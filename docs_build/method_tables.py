"""The tables of ``benchmarks/customize_methods.py``: methods of teaching a concept, and whose lead is settled."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from tables import spread, table

_PARTS = ("digit", "color", "side", "number")


def method_tables(results: Mapping[str, Any]) -> str:
    """Every method, all of them at equal seconds, and the differences to comcat."""
    cells = {key: cell for key, cell in results["cells"].items() if not key.startswith("sweep")}
    runs: dict[str, dict[str, Any]] = {}
    for key, cell in cells.items():
        name, _, run = key.partition(" | ")  # the run: digit and seed
        runs.setdefault(name, {})[run] = cell
    equal = {name.partition(": ")[2]: found for name, found in runs.items() if name.startswith("equal seconds")}
    steps = {name: found for name, found in runs.items() if not name.startswith("equal seconds")}
    rows = []
    for name, found in steps.items():
        one = next(iter(found.values()))
        rate = one["lr"] or one["token_lr"]
        kept = [f"{one['parameters']:,}", f"{one['bytes'] / 1e3:,.1f} kB", f"{rate:g}"]
        parts = [f"{statistics.fmean(c['taught'][p] for c in found.values()):.0f}" for p in _PARTS]
        rows.append([name, *kept, _over(found, "concept"), *parts, _over(found, "retention"), _score(found)])
    head = (
        f"Digits {' and '.join(map(str, results['settings']['digits']))}, {results['settings']['steps']} steps. "
        "*V\\* right*: digit, color, side and number are all what was asked for; *others right*: the same of the "
        "digits that the base knows; *score*: the mean of the two. Means and standard deviations over seeds, "
        "of the mean of both digits; percent.\n\n"
    )
    titles = ["", "parameters", "float16", "rate", "V\\* right", *_PARTS, "others right", "score"]
    text = head + table(titles, rows)
    times = results.get("times", {}).get("step seconds")
    if times:
        ratios = {
            kind: statistics.median(a / b for a, b in zip(found, times["comcat"], strict=True))
            for kind, found in times.items()
        }
        shown = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in ratios.items())
        text += f"\nCPU time of a step at the middle size, in units of comcat's: {shown}.\n"
    if equal:
        text += "\nThe CPU time of comcat at rank 2 for every method, instead of its steps:\n\n"
        shown = [[n, str(next(iter(f.values()))["steps"]), _over(f, "concept"), _over(f, "retention"), _score(f)]
                 for n, f in equal.items()]  # fmt: skip
        text += table(["", "steps", "V\\* right", "others right", "score"], shown)
    return text + _paired(steps, equal)


def _mean(cell: Mapping[str, Any]) -> float:
    return float(cell["concept"] + cell["retention"]) / 2


def _by_seed(found: Mapping[str, Any], value: Callable[[Any], float]) -> list[float]:
    seeds: dict[str, list[float]] = {}
    for run, cell in found.items():
        seeds.setdefault(run.rpartition(" | ")[2], []).append(value(cell))
    return [statistics.fmean(values) for values in seeds.values()]


def _over(found: Mapping[str, Any], key: str) -> str:
    return spread(_by_seed(found, lambda cell: cell[key]), 1)


def _score(found: Mapping[str, Any]) -> str:
    return spread(_by_seed(found, _mean), 1)


def _paired(steps: Mapping[str, Any], equal: Mapping[str, Any]) -> str:
    """Differences within runs of the same digit, photos and noise, to comcat at about as many parameters."""
    ours = {name: found for name, found in steps.items() if name.startswith("comcat")}
    rows = []
    for title, group in (("same steps", steps), ("same seconds", equal)):
        for name, found in group.items():
            if name in ours:
                continue
            size = next(iter(found.values()))["parameters"]
            near = min(ours, key=lambda n: abs(math.log(next(iter(ours[n].values()))["parameters"] / size)))
            rival = "comcat, rank 2" if group is equal else near  # whose seconds they are
            against = ours[rival]
            differences = [_mean(against[run]) - _mean(cell) for run, cell in found.items() if run in against]
            if len(differences) < 2:
                continue
            mean = statistics.fmean(differences)
            error = statistics.stdev(differences) / len(differences) ** 0.5
            verdict = "tie" if abs(mean) < 2 * error else "comcat" if mean > 0 else name
            rows.append([f"{rival} − {name}, {title}", f"{mean:+.1f} ±{error:.1f}", verdict])
    if not rows:
        return ""
    text = (
        "\nDifferences of the score within the same digit, photos and noise: mean and its standard error; a tie is "
        "less than twice that.\n\n"
    )
    return text + table(["", "difference", "ahead"], rows)
