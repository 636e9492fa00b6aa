"""Small models where people run them: plans by MACs against plans by that runtime's own latency.

    python benchmarks/runtimes.py --json benchmarks/results/runtimes.json [--quick] [--only deit openvino]
    python benchmarks/runtimes.py --json ... --shared DIR [--tables accuracy]     (DIR has teachers/ and data/cifar10/)

speed      DeiT-S and Swin-T with random weights, uniform plans of half the MACs and of half the time, in turns in one
           run: time over the dense model's, and how much of the saved MACs is saved time (speed-up over MAC ratio).
accuracy   CIFAR-10 teachers: the plan of half the time against the plan by MACs that takes the same time. Both are
           timed once and made from several samples of calibration images, as plans vary with them.

Cells that the JSON file holds already are not measured again, so that a run may end at any time (Ctrl-C) and go on. A
budget that is out of reach is a cell too.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import comcat
from comcat.models.machine import device_name, versions
from comcat.prepared import Prepared
from comcat.runtimes.realizing import RuntimeClock, realize
from comcat.runtimes.sessions import in_turns
from common import accuracy, cifar10, parser, spread, teacher

MODELS = {"deit-s": "deit_small_patch16_224", "swin-t": "swin_tiny_patch4_window7_224"}
TEACHERS = {"vit": "vit_cifar10", "rope": "rope_cifar10"}
WHERE = (("torch", "fp32"), ("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "int8"))
#: For less than half an hour, what matters most first.
QUICK = [
    "speed deit-s openvino bf16 batch 1",
    "speed deit-s openvino fp32 batch 1",
    "speed deit-s onnxruntime fp32 batch 1",
    "speed deit-s torch fp32 batch 1",
    "accuracy vit openvino bf16 batch 8",
    "accuracy vit onnxruntime fp32 batch 8",
    "speed deit-s openvino bf16 batch 8",
    "speed deit-s openvino int8 batch 1",
    "speed swin-t openvino bf16 batch 1",
    "speed deit-s onnxruntime fp32 batch 8",
    "accuracy vit torch fp32 batch 8",
    "accuracy vit openvino int8 batch 8",
    "speed swin-t onnxruntime fp32 batch 1",
]
KEEP = 0.5


class Cells:
    """What was measured, in a file that is written after every cell."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        known = json.loads(path.read_text()) if path.is_file() else {}
        self.done: dict[str, Any] = known.get("cells", {}) if known.get("settings") == settings else {}
        self.head = {"settings": settings, "device": device_name(torch.device("cpu")), "versions": versions()}

    def measure(self, key: str, make: Callable[[], dict[str, Any]]) -> None:
        if key in self.done:
            return
        begin = time.perf_counter()
        try:
            found = make()
        except comcat.ComcatError as error:
            found = {"refused": str(error)}
        self.done[key] = {**found, "took_s": round(time.perf_counter() - begin)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({**self.head, "cells": self.done}, indent=1) + "\n")
        print(f"{key}: {shown(self.done[key])}", flush=True)


def shown(cell: dict[str, Any]) -> str:
    if "refused" in cell:
        return str(cell["refused"])
    text = [f"dense {cell['dense_ms']:.1f} ms"]
    for name in ("macs", "latency"):
        one = cell[name]
        line = f"by {name} {one['kept']:.3f} of the time at {one['macs']:.3f} of the MACs"
        line += f", realized {one['realized']:.2f}"
        text.append(line + (f", top-1 {spread(one['top1'])}" if "top1" in one else ""))
    return "; ".join([*text, f"{cell['latency']['attempts']} attempts, {cell['took_s']} s"])


class Subject:
    """A dense model with its statistics, and how plans are made of it."""

    def __init__(self, ready: Prepared, calibration: comcat.Calibration, method: str) -> None:
        self.ready, self.calibration, self.method = ready, calibration, method

    def plan(self, budget: comcat.Budget, table: comcat.LatencyTable | None) -> comcat.Plan:
        multiple = 8
        return comcat.plan(self.ready, budget, self.calibration, self.method, rank_multiple=multiple, latency=table)

    def build(self, plan: comcat.Plan) -> nn.Module:
        return comcat.compress(self.ready, plan, self.calibration)


def compared(
    subjects: list[Subject], runtime: str, precision: str, batch: int, threads: int, widths: int,
    score: Callable[[nn.Module], float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Both plans' models against the dense one.

    Args:
        subjects: one model, with different statistics; the first is timed.
        score: the plan by MACs shall take as long as the other, instead of half the MACs, and all are scored.
    """
    subject = subjects[0]
    table = comcat.measure_latency(
        subject.ready, batch, widths=widths, runtime=runtime, precision=precision, threads=threads
    )
    budget = comcat.Budget(latency=KEEP)

    def build(plan: comcat.Plan) -> tuple[nn.Module, nn.Module]:
        made = subject.build(plan)
        return made, made

    with RuntimeClock(subject.ready, table) as clock:
        limit = budget.absolute(table.dense, table.dense)
        found = realize(clock, subject.plan(budget, table), limit, build, lambda new: subject.plan(budget, new))
        share = as_long(subject, found.table, found.plan.estimate["latency"]) if score else KEEP
        by_macs = subject.build(subject.plan(comcat.Budget(macs=share), None))
        sessions = [clock.dense, clock.opened(by_macs, "macs"), clock.opened(found.built, "latency")]
        seconds = dict(zip(("dense", "macs", "latency"), in_turns(sessions, clock.inputs, 21, seconds=40), strict=True))
    models = {"macs": by_macs, "latency": found.built}
    cell: dict[str, Any] = {"dense_ms": 1e3 * float(np.median(seconds["dense"])), "table_ms": table.dense / 1e6}
    for name in ("macs", "latency"):
        cost = comcat.profile(models[name])
        ratios = np.divide(seconds[name], seconds["dense"])
        kept = float(np.median(ratios))
        macs = cost.macs / table.macs
        cell[name] = {"kept": kept, "quartiles": np.quantile(ratios, (0.25, 0.75)).tolist(), "macs": macs}
        cell[name] |= {"ms": 1e3 * float(np.median(seconds[name])), "realized": macs / kept, "params": cost.params}
        if score is not None:
            cell[name]["top1"] = [score(models[name])]
    for other in subjects[1:] if score is not None else ():
        plan = other.plan(comcat.Budget(latency=found.plan.estimate["latency"] / found.table.dense), found.table)
        same = other.plan(comcat.Budget(macs=as_long(other, found.table, plan.estimate["latency"])), None)
        for name, one in (("latency", plan), ("macs", same)):
            cell[name]["top1"].append(score(other.build(one)))
    cell["latency"] |= {"attempts": len(found.tried), "tried": [one.kept for one in found.tried]}
    return cell


def as_long(subject: Subject, table: comcat.LatencyTable, wanted: float) -> float:
    """The share of MACs whose plan takes this long by a table, by bisection."""
    low, high = 0.2, 0.95
    for _ in range(7):
        share = (low + high) / 2
        took = subject.plan(comcat.Budget(macs=share), table).estimate["latency"]
        low, high = (share, high) if took < wanted else (low, share)
    return (low + high) / 2


@functools.cache
def random_subjects(name: str) -> list[Subject]:
    torch.manual_seed(0)
    model = timm.create_model(MODELS[name]).eval()
    noise = comcat.calibrate(model, [torch.randn(4, *comcat.profile(model).input_size)], probe_images=0)
    return [Subject(comcat.prepare(model), noise, "uniform")]


@functools.cache
def trained_subjects(shared: Path, name: str, samples: int) -> list[Subject]:
    ready = comcat.prepare(teacher(shared, TEACHERS[name]))
    pool, _ = cifar10(shared, "train", samples * 2048)
    found = [comcat.calibrate(ready, part.split(128), probe_images=0) for part in pool.split(2048)]
    return [Subject(ready, calibration, "spectrum") for calibration in found]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--shared", type=Path, help="folder with teachers/ and data/cifar10/")
    p.add_argument("--tables", nargs="+", choices=("speed", "accuracy"), default=["speed", "accuracy"])
    p.add_argument("--only", nargs="+", default=[], help="words that a cell's name must hold, e.g. deit-s openvino")
    p.add_argument("--quick", action="store_true", help="the cells that take half an hour together")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--widths", type=int, default=6, help="of every part, in the tables of timings")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    p.add_argument("--test-images", type=int, default=10_000)
    p.add_argument("--samples", type=int, default=3, help="of calibration images, for accuracy")
    args = p.parse_args()
    settings = {"threads": args.threads, "widths": args.widths, "keep": KEEP, "test_images": args.test_images}
    settings["samples"] = args.samples
    cells = Cells(args.json or Path("runtimes.json"), settings)
    how = {"threads": args.threads, "widths": args.widths}

    @functools.cache
    def test() -> tuple[torch.Tensor, torch.Tensor]:
        return cifar10(args.shared, "test", args.test_images)

    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    for batch in args.batch:
        for runtime, precision in WHERE:
            where = f"{runtime} {precision} batch {batch}"
            for name in MODELS:
                jobs[f"speed {name} {where}"] = functools.partial(
                    lambda name, *place: compared(random_subjects(name), *place, **how),
                    name, runtime, precision, batch,
                )  # fmt: skip
            for name in TEACHERS if args.shared else ():
                jobs[f"accuracy {name} {where}"] = functools.partial(
                    lambda name, *place: compared(
                        trained_subjects(args.shared, name, args.samples), *place, **how,
                        score=lambda model: accuracy(model, *test()),
                    ),
                    name, runtime, precision, batch,
                )  # fmt: skip
    keys = [key for key in QUICK if key in jobs] if args.quick else list(jobs)
    for key in keys:
        if key.split()[0] in args.tables and all(word in key.split() for word in args.only):
            cells.measure(key, jobs[key])


if __name__ == "__main__":
    main()
