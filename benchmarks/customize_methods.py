"""Teaching digits of scenes by added products, LoRA, DoRA, LoKr, OFT (PEFT), a token alone and full fine-tuning.

Same photos, prior images, steps, batches, noise and times for all; all of them learn a token too. Every kind runs at
the best of three learning rates, found at its middle size on a seed of its own; where that is the outermost of the
three, one beyond it is tried as well. ``score`` is the mean of the concept's and of the other prompts' share of right
images. ``equal seconds`` gives every kind the CPU time of comcat instead of its steps. Cells are kept: what the file
has is not run again.

    python benchmarks/customize_methods.py --json benchmarks/results/customize_methods.json
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import common
from comcat_demos import digits_cache, scenes
from comcat_demos.contest_methods import Method
from comcat_demos.scene_contest import STEPS, SceneContest
from comcat_demos.scenes_judge import Hits, SceneScores

#: Kind -> the rates of its sweep; of the token alone they are those of the token, in units of the table's spread.
SWEEP = {
    "comcat": (1e-2, 2e-2, 4e-2),
    "lora": (1e-2, 2e-2, 4e-2),
    "dora": (1e-2, 2e-2, 4e-2),
    "lokr": (1e-2, 2e-2, 4e-2),
    "oft": (5e-3, 1e-2, 2e-2),
    "token": (0.1, 0.2, 0.4),
    "full": (2.5e-4, 5e-4, 1e-3),
}
SWEEP_SEED = 100
#: Sizes by the number of parameters: about 12, 24 and 48 thousand, which float16 stores in 24, 48 and 96 kB.
METHODS = (
    Method("comcat, rank 1", "comcat", 1),
    Method("comcat, rank 2", "comcat", 2),
    Method("comcat, rank 4", "comcat", 4),
    Method("LoRA, rank 2", "lora", 2),
    Method("LoRA, rank 4", "lora", 4),
    Method("LoRA, rank 8", "lora", 8),
    Method("DoRA, rank 2", "dora", 2),
    Method("DoRA, rank 4", "dora", 4),
    Method("LoKr, factor 4", "lokr", 0, factor=4),
    Method("LoKr, factor 2, rank 8", "lokr", 8, factor=2),
    Method("OFT, blocks of 8", "oft", 8),
    Method("OFT, blocks of 16", "oft", 16),
    Method("token alone", "token"),
    Method("full fine-tuning", "full"),
)
#: What stands for its kind in the sweep and at equal seconds.
MIDDLE = {
    method.kind: method
    for method in METHODS
    if method.name
    in (
        "comcat, rank 2",
        "LoRA, rank 4",
        "DoRA, rank 4",
        "LoKr, factor 2, rank 8",
        "OFT, blocks of 16",
        "token alone",
        "full fine-tuning",
    )
}


class Cells:
    """The figures so far, written after each."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        found = json.loads(path.read_text()) if path.exists() else {}
        if found and found["settings"] != settings:
            raise SystemExit(f"{path} was made with other settings; give another --json")
        self.cells: dict[str, dict[str, Any]] = found.get("cells", {})
        self.times: dict[str, dict[str, list[float]]] = found.get("times", {})

    def get(self, key: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self.cells:
            self.cells[key] = run()
            self.write()
            cell = self.cells[key]
            print(f"{key:<50} {cell['concept']:6.1f} {cell['retention']:6.1f} {cell['seconds']:6.1f} s", flush=True)
        return self.cells[key]

    def write(self) -> None:
        common.write(self.path, {"settings": self.settings, "cells": self.cells, "times": self.times})


def score(cell: dict[str, Any]) -> float:
    return (cell["concept"] + cell["retention"]) / 2


@contextmanager
def contest(pipe: Any, digit: int, seed: int) -> Iterator[Callable[..., dict[str, Any]]]:
    """A function that runs a method; photos and prior images are made at its first call."""
    with tempfile.TemporaryDirectory() as folder:
        made: list[SceneContest] = []

        def run(method: Method, steps: int = STEPS) -> dict[str, Any]:
            if not made:
                made.append(SceneContest(pipe, Path(folder), digit, seed=seed))
                made[0].prepare()
            made[0].config = replace(made[0].config, steps=steps)
            return {**made[0].run(method).to_dict(), "steps": steps}

        yield run


def at(method: Method, rate: float) -> Method:
    return replace(method, **{"token_lr" if method.kind == "token" else "lr": rate})


def sweep(pipe: Any, cells: Cells, digits: list[int], kind: str) -> float:
    """The best rate of a kind, over all digits."""

    def reached(rate: float) -> float:
        method, scores = at(MIDDLE[kind], rate), []
        for digit in digits:
            with contest(pipe, digit, SWEEP_SEED) as run:
                scores.append(score(cells.get(f"sweep | {kind} | {rate:g} | {digit}", lambda r=run: r(method))))
        return statistics.fmean(scores)

    rates = {rate: reached(rate) for rate in SWEEP[kind]}
    best = max(rates, key=lambda rate: rates[rate])
    beyond = {min(rates): best / 2, max(rates): best * 2}.get(best)
    if beyond is not None:
        rates[beyond] = reached(beyond)
    return max(rates, key=lambda rate: rates[rate])


class Untold(SceneContest):
    """A contest of which only the time counts."""

    def score(self, prompt: str | None = None) -> SceneScores:
        return SceneScores(None, Hits(0, 0, 0, 0, 0), {})


def equal_steps(pipe: Any, cells: Cells, digit: int, rounds: int = 5, steps: int = 10) -> dict[str, int]:
    """Kind -> its steps in the CPU time of comcat's; the ratio is a median over rounds, in turns within each."""
    if "step seconds" not in cells.times:
        with tempfile.TemporaryDirectory() as folder:
            one = Untold(pipe, Path(folder), digit, seed=SWEEP_SEED, steps=steps)
            one.prepare()
            for _ in range(rounds):
                for kind, method in MIDDLE.items():
                    seconds = one.run(at(method, SWEEP[kind][0])).cpu_seconds / steps
                    cells.times.setdefault("step seconds", {}).setdefault(kind, []).append(seconds)
        cells.write()
    times = cells.times["step seconds"]
    ratios = {kind: [a / b for a, b in zip(times["comcat"], found, strict=True)] for kind, found in times.items()}
    return {kind: round(STEPS * statistics.median(found)) for kind, found in ratios.items()}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="*", choices=list(SWEEP), default=list(SWEEP), help="these alone")
    parser.add_argument("--cache", type=Path, help="where the trained base is kept")
    args = parser.parse_args()
    torch.set_num_threads(1)  # layers this small gain nothing from a second thread
    digits = list(scenes.LEFT_OUT)
    pipe = digits_cache.load_or_train_scenes(args.cache, digits)
    cells = Cells(args.json, {"steps": STEPS, "digits": digits})
    best = {kind: sweep(pipe, cells, digits, kind) for kind in args.kinds}
    print("rates:", best)
    runs = [(seed, digit) for seed in args.seeds for digit in digits]
    for seed, digit in runs:
        with contest(pipe, digit, seed) as run:
            for method in [at(method, best[method.kind]) for method in METHODS if method.kind in best]:
                cells.get(f"{method.name} | {digit} | {seed}", lambda m=method: run(m))
    steps = equal_steps(pipe, cells, digits[0])
    for seed, digit in runs:
        with contest(pipe, digit, seed) as run:
            for kind in [k for k in best if k != "comcat"]:  # whose seconds they are
                method, n = at(MIDDLE[kind], best[kind]), steps[kind]
                cells.get(f"equal seconds: {method.name} | {digit} | {seed}", lambda m=method, n=n: run(m, n))


if __name__ == "__main__":
    main()
