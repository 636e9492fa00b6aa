"""A model without a classifier, compressed without any training: do output gradients of its features help?

    python benchmarks/features_training_free.py --shared SHARED [--json results/features_training_free.json]

The CIFAR-10 teacher loses its classifier. It is calibrated on its features, with and without the gradients of a
squared error on them, and compressed to shares of its parameters. Told are the mean cosine of dense and compressed
features, and the top-1 of the classifier of the whole teacher put behind them, which no step has seen. Mean and
standard deviation over calibration seeds.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

import comcat
from common import cifar10, parser, spread, teacher, write

KEPT = (0.5, 0.4, 0.3)
SEEDS = (0, 1, 2)
#: Row -> method of planning, and whether the calibration has gradients.
ROWS = {
    "uniform": ("uniform", False),
    "spectrum, no gradients": ("spectrum", False),
    "spectrum, feature gradients": ("spectrum", True),
    "probe, no gradients": ("probe", False),
    "probe, feature gradients": ("probe", True),
}


@torch.inference_mode()
def features(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(64)])


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--shared", type=Path, required=True, help="folder with teachers/ and data/cifar10/")
    p.add_argument("--test-images", type=int, default=2000)
    p.add_argument("--calibration-images", type=int, default=512)
    p.add_argument("--probe-images", type=int, default=128)
    args = p.parse_args()
    whole = teacher(args.shared)
    classifier, body = whole.head, copy.deepcopy(whole)
    body.reset_classifier(0)
    images, labels = cifar10(args.shared, "test", args.test_images)
    pool, _ = cifar10(args.shared, "train", 20_000)
    dense = features(body, images)

    def top1(found: Tensor) -> float:
        with torch.inference_mode():
            return 100 * float((classifier(found).argmax(1) == labels).float().mean())

    cells: dict[str, dict[str, list[float]]] = {}
    for seed in SEEDS:
        chosen = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[: args.calibration_images]
        made = {
            fisher: comcat.calibrate(
                body, pool[chosen].split(64), fisher=fisher, probe_images=args.probe_images, seed=seed
            )
            for fisher in (False, True)
        }
        for row, (method, fisher) in ROWS.items():
            for kept in KEPT:
                plan = comcat.plan(body, comcat.Budget(params=kept), made[fisher], method=method)
                found = features(comcat.compress(body, plan, made[fisher]), images)
                cell = cells.setdefault(f"{row}/{kept}", {"top1": [], "cosine": []})
                cell["top1"].append(top1(found))
                cell["cosine"].append(float(torch.cosine_similarity(found, dense).mean()))
                print(
                    f"seed {seed}, {row}, {kept}: {cell['top1'][-1]:.2f}, cosine {cell['cosine'][-1]:.4f}", flush=True
                )
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "shared")}
    write(args.json, {"settings": settings, "dense": top1(dense), "cells": cells})
    print(f"\ndense: {top1(dense):.2f}")
    for score in ("top1", "cosine"):
        print(f"\n| {score}, parameters kept | {' | '.join(f'{100 * k:.0f} %' for k in KEPT)} |\n|{'---|' * 4}")
        for row in ROWS:
            values = [cells[f"{row}/{kept}"][score] for kept in KEPT]
            if score == "cosine":
                shown = [f"{torch.tensor(v).mean():.4f} ±{torch.tensor(v).std():.4f}" for v in values]
            else:
                shown = [spread(v) for v in values]
            print(f"| {row} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
