"""Does the default of planning pick well? Every method, and what ``auto`` picks, on the CIFAR-10 teachers.

    python benchmarks/method_choice.py --shared SHARED [--teachers vit rope] [--json results/method_choice.json]

Whole models, without any training, at shares of their parameters; mean and standard deviation over calibration seeds.
``auto`` sees neither labels nor test images: it compares plans on images that it kept from the calibration.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

import comcat
from common import accuracy, cifar10, parser, spread, teacher, write

KEPT = (0.5, 0.4, 0.3)
SEEDS = (0, 1, 2)
METHODS = ("uniform", "spectrum", "probe")


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--shared", type=Path, required=True, help="folder with teachers/ and data/cifar10/")
    p.add_argument("--teachers", nargs="+", default=["vit", "rope"])
    p.add_argument("--test-images", type=int, default=5000)
    p.add_argument("--calibration-images", type=int, default=1024)
    p.add_argument("--probe-images", type=int, default=256)
    args = p.parse_args()
    images, labels = cifar10(args.shared, "test", args.test_images)
    pool, _ = cifar10(args.shared, "train", 20_000)
    cells: dict[str, list[float]] = {}
    picked: dict[str, list[str]] = {}
    divergence: dict[str, list[dict[str, float]]] = {}
    for name in args.teachers:
        model = teacher(args.shared, f"{name}_cifar10")
        measure = functools.partial(accuracy, images=images, labels=labels)
        cells[f"{name}/dense"] = [measure(model)]
        for seed in SEEDS:
            order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
            batches = pool[order[: args.calibration_images]].split(64)
            made = comcat.calibrate(model, batches, fisher=True, probe_images=args.probe_images, seed=seed)
            for kept in KEPT:
                budget = comcat.Budget(params=kept)
                found = {}
                for method in METHODS:
                    small = comcat.compress(model, comcat.plan(model, budget, made, method=method), made)
                    found[method] = measure(small)
                    cells.setdefault(f"{name}/{method}/{kept}", []).append(found[method])
                plan = comcat.plan(model, budget, made)
                cells.setdefault(f"{name}/auto/{kept}", []).append(found[plan.method])
                picked.setdefault(f"{name}/{kept}", []).append(plan.method)
                measured = {method: plan.estimate[f"divergence_{method}"] for method in METHODS}
                divergence.setdefault(f"{name}/{kept}", []).append(measured)
                print(name, seed, kept, found, plan.method, json.dumps(measured), flush=True)
                settings = {k: v for k, v in vars(args).items() if k not in ("json", "shared", "teachers")}
                write(args.json, {"settings": settings, "cells": cells, "picked": picked, "divergence": divergence})
    for name in args.teachers:
        print(f"\n{name}, dense {cells[f'{name}/dense'][0]:.2f}\n")
        print(f"| parameters kept | {' | '.join(f'{100 * k:.0f} %' for k in KEPT)} |\n|{'---|' * (len(KEPT) + 1)}")
        for row in (*METHODS, "auto"):
            print(f"| {row} | {' | '.join(spread(cells[f'{name}/{row}/{k}']) for k in KEPT)} |")
        print(f"| picked | {' | '.join(', '.join(picked[f'{name}/{k}']) for k in KEPT)} |")


if __name__ == "__main__":
    main()
