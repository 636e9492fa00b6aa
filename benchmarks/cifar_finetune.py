"""The fine-tune that all rows of the accuracy tables share, peers included: CIFAR-10, taught by the dense model."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

import comcat
from common import MEAN, STD, accuracy, cifar10, parser, spread, write

BATCH, PAD, LR = 128, 4, 5e-4
KEPT = (0.3, 0.2, 0.1)
COLUMNS = ("top-1 before", "top-1 after", "params", "MACs")


@functools.cache
def training_pixels(shared: Path) -> tuple[Tensor, Tensor]:
    """All training images (50 000, 3, 32, 32) as uint8, and their labels."""
    table = pq.read_table(shared / "data/cifar10/train.parquet")
    images = [pil_to_tensor(Image.open(io.BytesIO(cell["bytes"]))) for cell in table["img"].to_pylist()]
    return torch.stack(images), torch.tensor(table["label"].to_pylist())


class Crops(Dataset):
    """Normalized crops (3, 32, 32) of images padded by reflection, every second one mirrored, with labels.

    They draw from PyTorch's own generator, which :func:`comcat.finetune` seeds by (seed, epoch, index): all rows of a
    table see the same pixels. Reflection, because the teacher answers to black borders with 82 % accuracy instead of
    94 % and would teach its mistakes.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.mean, self.std = (255 * torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        top, left, mirrored = (int(torch.randint(n, ())) for n in (2 * PAD + 1, 2 * PAD + 1, 2))
        padded = F.pad((self.images[index] - self.mean) / self.std, (PAD,) * 4, mode="reflect")
        crop = padded[:, top : top + 32, left : left + 32]
        return crop.flip(-1) if mirrored else crop, self.labels[index]


def settings(epochs: float, seed: int, lr: float = LR) -> comcat.FinetuneConfig:
    """The one setting; chosen on a comcat model with 20 % of the parameters for the accuracy after 20 000 images."""
    return comcat.FinetuneConfig(
        epochs=epochs,
        lr=lr,
        warmup_epochs=0.05 * epochs,
        weight_decay=0.05,
        distillation="soft",
        distillation_weight=1.0,
        distillation_temperature=2.0,
        label_smoothing=0.0,
        precision="bf16",
        seed=seed,
        eval_every=None,
    )


def fused_attention_is_slow() -> contextlib.AbstractContextManager[None]:
    """In bfloat16 on CPUs the backward pass of fused attention takes several times as long as that of the plain one."""
    return contextlib.nullcontext() if torch.cuda.is_available() else sdpa_kernel(SDPBackend.MATH)


def finetune_on_cifar(
    student: nn.Module, teacher: nn.Module, shared: Path, images: int, seed: int, lr: float = LR
) -> None:
    """Train ``student`` in place on ``images`` augmented images, counted with repetition and rounded up to batches."""
    data = Crops(*training_pixels(shared))
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True)
    with fused_attention_is_slow():
        comcat.finetune(student, teacher, loader, None, settings(images / len(data), seed, lr))


def table_parser(description: str | None) -> argparse.ArgumentParser:
    """Options of the tables."""
    p = parser(description)
    p.add_argument("--shared", type=Path, required=True, help="folder with teachers/ and data/cifar10/")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--kept", type=float, nargs="+", default=KEPT)
    p.add_argument("--images", type=int, default=20_000, help="training images seen by the fine-tune")
    p.add_argument("--test-images", type=int, default=10_000)
    p.add_argument("--rows", nargs="+", help="only these rows, by name")
    p.add_argument("--amp", action="store_true", help="evaluate under bfloat16 autocast, two to three times faster")
    return p


def fill_table(
    args: argparse.Namespace,
    model: nn.Module,
    table: Mapping[str, Callable[[float, int], nn.Module]],
    rates: Mapping[str, float] | None = None,
) -> None:
    """Make, fine-tune and evaluate every missing cell, and print all.

    Args:
        table: row -> function of kept share and seed; rates: row -> learning rate, where it is a row's own.
    """
    for name in args.rows or ():
        if name not in table:
            raise SystemExit(f"no row {name!r}; the rows are {', '.join(map(repr, table))}")
    test = cifar10(args.shared, "test", args.test_images)
    settings_ = {name: getattr(args, name) for name in ("images", "test_images", "amp")}
    settings_ |= {"fine-tune": settings(1, 0).to_dict()}
    known = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    same = known.get("settings") == settings_
    if known and not same:
        raise SystemExit(f"{args.json} was measured with other settings; name another file")
    done: dict[str, dict[str, float]] = known["cells"] if same else {}
    costs = comcat.profile(model)
    dense = known["dense"] if same else {"top-1": accuracy(model, *test, amp=args.amp)}
    dense |= {"params": costs.params, "MACs": costs.macs}
    for seed in args.seeds:
        for kept in args.kept:
            for name in args.rows or table:
                key = f"{name}/{kept}/{seed}"
                if key in done:
                    continue
                small = table[name](kept, seed)
                costs = comcat.profile(small)
                before = accuracy(small, *test, amp=args.amp)
                finetune_on_cifar(small, model, args.shared, args.images, seed, (rates or {}).get(name, LR))
                figures = (before, accuracy(small, *test, amp=args.amp), costs.params, costs.macs)
                done[key] = dict(zip(COLUMNS, figures, strict=True))
                print(f"{key}: {before:.2f} -> {figures[1]:.2f}", flush=True)
                write(args.json, {"settings": settings_, "dense": dense, "cells": done})
    show(dense, done, table)


def show(dense: Mapping[str, float], done: Mapping[str, Mapping[str, float]], names: Mapping[str, Any]) -> None:
    """All cells so far, as Markdown."""
    print(f"\n| kept | | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 2)}")
    print(f"| | dense | {dense['top-1']:.2f} | | {dense['params'] / 1e3:,.0f} k | {dense['MACs'] / 1e6:.1f} M |")
    for kept in KEPT:
        for name in names:
            cells = [v for k, v in done.items() if k.startswith(f"{name}/{kept}/")]
            if cells:
                before, after, params, macs = ([cell[column] for cell in cells] for column in COLUMNS)
                size, work = sum(params) / len(cells) / 1e3, sum(macs) / len(cells) / 1e6
                print(f"| {kept:.0%} | {name} | {spread(before)} | {spread(after)} | {size:,.0f} k | {work:.1f} M |")
