"""Accuracy after compression without training on a rotary, gated ViT (DINOv3-style: rotary pairs, SwiGLU, LayerScale).

    python benchmarks/rotary_training_free.py --shared SHARED [--json results/rotary_training_free.json]

Rows: which parts may be reduced (values and FFN only, or rotary pairs of the query-key product too) and how widths are
chosen. Mean and standard deviation over calibration seeds (another sample of unlabelled training images each); finished
cells are kept in the JSON file, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.models.eva import Eva
from torch import nn

import comcat
from common import accuracy, cifar10, parser, spread, write

KEPT = (0.7, 0.5, 0.4, 0.3, 0.2)
SEEDS = (0, 1, 2)
PARTS = {"VO and FFN": ("vo", "ffn", "head"), "pairs, VO and FFN": ("pairs", "vo", "ffn", "head")}
METHODS = {
    "uniform": (False, "uniform"),
    "spectrum, loss-aware": (True, "spectrum"),
    "probe": (False, "probe"),
}


def rotary_teacher(shared: Path) -> nn.Module:
    """The rotary ViT trained on CIFAR-10 (see the README beside the checkpoint), in float32."""
    data = json.loads((shared / "teachers/rope_cifar10.json").read_text())
    model = Eva(**data["args"], norm_layer=functools.partial(timm.layers.LayerNorm, eps=1e-5))
    tensors = load_file(shared / "teachers/rope_cifar10.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.eval()


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--shared", type=Path, required=True)
    p.add_argument("--calibration-images", type=int, default=2048)
    p.add_argument("--test-images", type=int, default=10_000)
    args = p.parse_args()
    torch.manual_seed(0)
    model = rotary_teacher(args.shared)
    train, _ = cifar10(args.shared, "train")
    images, labels = cifar10(args.shared, "test", args.test_images)
    done = json.loads(args.json.read_text())["cells"] if args.json and args.json.exists() else {}
    ready = comcat.prepare(model)

    @functools.lru_cache(maxsize=2)
    def calibrated(seed: int, fisher: bool) -> comcat.Calibration:
        pick = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: args.calibration_images]
        return comcat.calibrate(ready, train[pick].split(128), fisher=fisher, seed=seed)

    def cell(key: str, work: functools.partial) -> float:
        if key not in done:
            done[key] = accuracy(work(), images, labels, amp=True)
            settings = {"calibration_images": args.calibration_images, "test_images": args.test_images}
            write(args.json, {**settings, "cells": done})
        return done[key]

    def small(parts: tuple[str, ...], method: str, fisher: bool, kept: float, seed: int) -> nn.Module:
        calibration = calibrated(seed, fisher)
        budget = comcat.Budget(params=kept)
        return comcat.compress(ready, comcat.plan(ready, budget, calibration, method, parts), calibration)

    dense = cell("dense", functools.partial(lambda: model))
    # Seeds outside: a calibration is collected once.
    for seed in SEEDS:
        for method, (fisher, name) in METHODS.items():
            for what, parts in PARTS.items():
                for kept in KEPT:
                    key = f"{what} | {method} | {kept} | {seed}"
                    cell(key, functools.partial(small, parts, name, fisher, kept, seed))
    print(f"dense {dense:.2f}; {args.test_images} test images, {args.calibration_images} for the statistics")
    print(f"{'':44}" + "".join(f"{100 * kept:14.0f} %" for kept in KEPT))
    for what in PARTS:
        for method in METHODS:
            cells = [spread([done[f"{what} | {method} | {kept} | {seed}"] for seed in SEEDS]) for kept in KEPT]
            print(f"{what + ', ' + method:44}" + "".join(f"{text:>16}" for text in cells))


if __name__ == "__main__":
    main()
