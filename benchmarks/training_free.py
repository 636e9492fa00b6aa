"""Accuracy after compression without any training, on the CIFAR-10 teacher: published routes beside ours.

    python benchmarks/training_free.py --shared SHARED [--json results/training_free.json] [--test-images 10000]

(a) attention only, parameters of the four attention matrices cut; (b) FFN only; (c) whole model kept. Rows that look
at images are the mean and standard deviation over calibration seeds (another sample of unlabelled training images
each); the others are one run. Finished cells are kept in the JSON file, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import comcat
from comcat.hosts import find_layers
from comcat.layers.attention import AttentionLayer
from comcat.linalg.factorize import whitening
from common import accuracy, cifar10, parser, spread, teacher, write

MHA = (0.8, 0.6, 0.4, 0.2)
FFN = (0.9, 0.8, 0.7, 0.6, 0.5)
MODEL = (0.7, 0.5, 0.4, 0.3, 0.2)
SEEDS = (0, 1, 2)
Calibrations = Callable[[int, bool], comcat.Calibration]


def truncate(weight: Tensor, rank: int, moment: Tensor | None = None) -> Tensor:
    """Best rank-r ``weight`` (out, in) for inputs of the given second moment; white ones without."""
    R = torch.eye(weight.shape[1]).double() if moment is None else whitening(moment)
    U, S, Vh = torch.linalg.svd(weight.double() @ R.mT, full_matrices=False)
    return (U[:, :rank] * S[:rank] @ torch.linalg.solve_triangular(R.mT, Vh[:rank], upper=False, left=False)).float()


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    return [layer for layer in find_layers(model).layers if layer.kind == "attention"]


def matrix_level(model: nn.Module, kept: float, moments: dict[str, Tensor] | None = None) -> nn.Module:
    """Every D x D matrix of attention for itself, ``kept * D / 2`` components: SVD, or SVD-LLM with moments."""
    small = copy.deepcopy(model)
    for layer in attention_layers(small):
        rank = int(kept * layer.module.qkv.in_features / 2)
        x, z = (None, None) if moments is None else (moments[layer.name + ".qkv"], moments[layer.name + ".proj"])
        parts = [truncate(w, rank, x) for w in layer.module.qkv.weight.data.chunk(3)]
        layer.module.qkv.weight.data = torch.cat(parts)
        layer.module.proj.weight.data = truncate(layer.module.proj.weight.data, rank, z)
    return small


def input_moments(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Second moments of the inputs of the attention matrices (uncentred, as SVD-LLM takes them)."""
    moments: dict[str, Tensor] = {}

    def hook(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2)
        moments[name] = moments.get(name, 0) + (rows.mT @ rows).double()

    handles = [
        linear.register_forward_pre_hook(functools.partial(hook, f"{layer.name}.{part}"))
        for layer in attention_layers(model)
        for part, linear in layer.linears.items()
    ]
    with torch.inference_mode():
        for batch in images.split(128):
            model(batch)
    for handle in handles:
        handle.remove()
    return moments


def head_level_without_biases(model: nn.Module, kept: float) -> nn.Module:
    """Head-level SVD as the paper's reference code has it: all attention biases zero."""
    bare = copy.deepcopy(model)
    for layer in attention_layers(bare):
        nn.init.zeros_(layer.module.qkv.bias), nn.init.zeros_(layer.module.proj.bias)
    return ours(bare, kept, None, "uniform", ("qk", "vo"))


def ours(
    model: nn.Module, kept: float, calibration: comcat.Calibration | None, method: str, parts: tuple[str, ...]
) -> nn.Module:
    """comcat with one allocation; the budget is of the parts, or of the whole model where all parts take part."""
    budget = comcat.Budget(params=kept, of="model" if len(parts) == 4 else "parts")
    return comcat.compress(model, comcat.plan(model, budget, calibration, method=method, parts=parts), calibration)


def low_rank_ffn(model: nn.Module, kept: float, calibration: comcat.Calibration | None) -> nn.Module:
    """Both FFN matrices at one share of their ranks: SVD, or whitened SVD with the mean restored."""
    plan = comcat.plan(model, comcat.Budget(params=kept, of="parts"), method="uniform", parts=("ffn",))
    return comcat.compress(model, plan, calibration)


def tables(model: nn.Module, calibrated: Calibrations, moments: Callable[[int], dict[str, Tensor]]) -> dict:
    """Table -> row -> (function of kept share and seed, whether it depends on the seed)."""
    mha, ffn, whole = ("qk", "vo"), ("ffn",), ("qk", "vo", "ffn", "head")

    def row(method: str, parts: tuple[str, ...], fisher: bool) -> tuple:
        return (lambda kept, seed: ours(model, kept, calibrated(seed, fisher), method, parts), True)

    return {
        "a": {
            "matrix-level SVD": (lambda kept, seed: matrix_level(model, kept), False),
            "matrix-level, whitened (SVD-LLM)": (lambda kept, seed: matrix_level(model, kept, moments(seed)), True),
            "head-level, biases zeroed": (lambda kept, seed: head_level_without_biases(model, kept), False),
            "head-level, data-free": (lambda kept, seed: ours(model, kept, None, "uniform", mha), False),
            "calibrated, uniform": row("uniform", mha, False),
            "calibrated, spectrum": row("spectrum", mha, False),
            "calibrated, probe": row("probe", mha, False),
            "loss-aware, uniform": row("uniform", mha, True),
            "loss-aware, spectrum": row("spectrum", mha, True),
            "loss-aware, probe": row("probe", mha, True),
        },
        "b": {
            "SVD": (lambda kept, seed: low_rank_ffn(model, kept, None), False),
            "whitened SVD": (lambda kept, seed: low_rank_ffn(model, kept, calibrated(seed, False)), True),
            "neurons + refit": row("uniform", ffn, False),
            "automatic (default)": row("probe", ffn, True),
        },
        "c": {
            "calibrated, uniform": row("uniform", whole, False),
            "calibrated, spectrum": row("spectrum", whole, False),
            "calibrated, probe": row("probe", whole, False),
            "loss-aware, uniform": row("uniform", whole, True),
            "loss-aware, spectrum": row("spectrum", whole, True),
            "loss-aware, probe": row("probe", whole, True),
        },
    }


TITLES = {
    "a": ("attention only, parameters cut by", [f"{100 - 100 * k:.0f} %" for k in MHA], MHA),
    "b": ("FFN only, parameters cut by", [f"{100 - 100 * k:.0f} %" for k in FFN], FFN),
    "c": ("whole model, parameters kept", [f"{100 * k:.0f} %" for k in MODEL], MODEL),
}


def show(done: dict[str, float], rows: dict) -> None:
    """All tables so far, as Markdown."""
    print(f"\ndense: {done['dense']:.2f}")
    for table, (title, labels, shares) in TITLES.items():
        print(f"\n| ({table}) {title} | {' | '.join(labels)} |\n|{'---|' * (len(labels) + 1)}")
        for name in rows[table]:
            cells = [[v for k, v in done.items() if k.startswith(f"{table}/{name}/{share}/")] for share in shares]
            print(f"| {name} | {' | '.join(spread(c) if c else '' for c in cells)} |")


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--shared", type=Path, required=True, help="folder with teachers/ and data/cifar10/")
    p.add_argument("--test-images", type=int, default=10_000)
    p.add_argument("--calibration-images", type=int, default=2048)
    p.add_argument("--probe-images", type=int, default=256)
    p.add_argument("--tables", default="cba")
    p.add_argument("--amp", action="store_true", help="evaluate under bfloat16 autocast, two to three times faster")
    args = p.parse_args()
    model = teacher(args.shared)
    images, labels = cifar10(args.shared, "test", args.test_images)
    pool, _ = cifar10(args.shared, "train", 20_000)

    def sample(seed: int) -> Tensor:
        return pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[: args.calibration_images]]

    @functools.cache
    def calibrated(seed: int, fisher: bool) -> comcat.Calibration:
        batches = sample(seed).split(128)
        return comcat.calibrate(model, batches, fisher=fisher, probe_images=args.probe_images, seed=seed)

    moments = functools.cache(lambda seed: input_moments(model, sample(seed)))
    rows = tables(model, calibrated, moments)
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "shared", "tables")}
    known = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    done: dict[str, float] = known.get("cells", {}) if known.get("settings") == settings else {}

    def record(key: str, make: Callable[[], nn.Module]) -> None:
        if key not in done:
            done[key] = accuracy(make(), images, labels, amp=args.amp)
            print(f"{key}: {done[key]:.2f}", flush=True)
            write(args.json, {"settings": settings, "cells": done})

    record("dense", lambda: model)
    for seed in SEEDS:
        for table in args.tables:
            for name, (make, seeded) in rows[table].items():
                for share in TITLES[table][2]:
                    if seeded or seed == SEEDS[0]:
                        record(f"{table}/{name}/{share}/{seed}", functools.partial(make, share, seed))
    show(done, rows)


if __name__ == "__main__":
    main()
