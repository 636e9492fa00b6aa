"""Accuracy after the same short fine-tune: how the ranks were chosen, and where the fine-tune starts.

    python benchmarks/finetuned.py --shared SHARED [--seeds 0 1 2] [--images N] [--amp] [--json FILE]

Rows are comcat's allocations, uniform, spectrum, probe and the learned one (search), each from calibrated factors and,
"data-free start", from the truncated products of the weights at the same ranks. The search sees 12 800 training images
(200 batches, every second one for the weights, which are thrown away). All rows are trained by
``cifar_finetune.finetune_on_cifar``. A seed stands for another calibration sample, another search and another order of
the training images. Finished cells are kept in the JSON file, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import comcat
from cifar_finetune import Crops, fill_table, fused_attention_is_slow, table_parser, training_pixels
from common import cifar10, teacher

CALIBRATION_IMAGES = 2048
SEARCH = comcat.SearchConfig(
    max_steps=200, objective="exact", temperature=(1.0, 1.0), lr=0.03, precision="bf16", log_every=50
)
#: The loss as the paper has it, for comparison.
SEARCHES = {"search": SEARCH, "search, two-sided": replace(SEARCH, objective="two-sided")}
METHODS = ("uniform", "spectrum", "probe", *SEARCHES)


def rows(model: nn.Module, shared: Path, images: Tensor) -> dict[str, Callable[[float, int], nn.Module]]:
    """Row -> function of kept share and seed."""

    @functools.cache
    def calibrated(seed: int) -> comcat.Calibration:
        sample = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_IMAGES]
        return comcat.calibrate(model, images[sample].split(128), fisher=True, seed=seed)

    @functools.cache
    def planned(method: str, kept: float, seed: int) -> comcat.Plan:
        budget, calibration = comcat.Budget(params=kept), calibrated(seed)
        if method not in SEARCHES:
            return comcat.plan(model, budget, calibration, method=method)
        loader = DataLoader(Crops(*training_pixels(shared)), 64, shuffle=True, drop_last=True)
        config = replace(SEARCHES[method], seed=seed)
        with fused_attention_is_slow():
            return comcat.search(model, budget, loader, config, calibration=calibration)

    def made(method: str, calibrate: bool, kept: float, seed: int) -> nn.Module:
        return comcat.compress(model, planned(method, kept, seed), calibrated(seed) if calibrate else None)

    starts = {f"comcat, {method}": functools.partial(made, method, True) for method in METHODS}
    return starts | {f"comcat, {method}, data-free start": functools.partial(made, method, False) for method in METHODS}


def main() -> None:
    args = table_parser(__doc__).parse_args()
    model = teacher(args.shared)
    images, _ = cifar10(args.shared, "train", 20_000)
    fill_table(args, model, rows(model, args.shared, images))


if __name__ == "__main__":
    main()
