"""How far exported files are from PyTorch in float32, dense and compressed, for every format that is installed here.

    python benchmarks/export_parity.py --shared SHARED [--json results/export_parity.json] [--models vit] [--to onnx]

Models with random weights (DeiT-S, Swin-T) are compared on random images, the CIFAR-10 teachers on test images. Results
are added to those that the JSON file holds, so that formats in an environment of their own come to the same table.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import comcat
from comcat.exporting.formats import FORMAT_NAMES, file_format
from common import cifar10, parser, teacher, write


def random_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name).eval()


def models(shared: Path) -> dict[str, Callable[[], nn.Module]]:
    return {
        "vit_cifar10": lambda: teacher(shared),
        "rope_cifar10": lambda: teacher(shared, "rope_cifar10"),
        "deit_small_patch16_224": lambda: random_model("deit_small_patch16_224"),
        "swin_tiny_patch4_window7_224": lambda: random_model("swin_tiny_patch4_window7_224"),
    }


def measured(model: nn.Module, to: str, precision: str, images: torch.Tensor | None) -> dict[str, Any]:
    target = file_format(to)
    with tempfile.TemporaryDirectory() as folder:
        report = comcat.export(
            model,
            Path(folder) / f"file{target.suffix}",
            to,
            precision,
            dynamic_batch=target.dynamic_batch,
            tolerance=1.0,
            images=images,
        )
    return {
        "bytes": report.bytes,
        "absolute": report.absolute,
        "relative": report.relative,
        "images": report.images,
        "batches": report.batches,
        "real": report.real,
        "notes": report.notes,
    }


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--shared", type=Path, required=True, help="folder with teachers/ and data/cifar10/")
    p.add_argument("--models", nargs="*", help="beginnings of names; all by default")
    p.add_argument("--to", nargs="*", default=FORMAT_NAMES, choices=FORMAT_NAMES)
    p.add_argument("--precisions", nargs="*", default=("fp32", "fp16", "bf16"))
    args = p.parse_args()
    known = json.loads(args.json.read_text())["results"] if args.json and args.json.is_file() else {}
    test, _ = cifar10(args.shared, "test", 64)
    for name, build in models(args.shared).items():
        if args.models and not name.startswith(tuple(args.models)):
            continue
        dense = build()
        small = comcat.compress(dense, comcat.plan(dense, comcat.Budget(params=0.5))).eval()
        for kind, model in (("dense", dense), ("compressed", small)):
            for to in args.to:
                for precision in file_format(to).precisions:
                    if precision not in args.precisions:
                        continue
                    found = measured(model, to, precision, test if "cifar" in name else None)
                    known.setdefault(name, {}).setdefault(kind, {}).setdefault(to, {})[precision] = found
                    print(f"{name:30} {kind:10} {to:10} {precision}  {found['relative']}", flush=True)
                    write(args.json, {"results": known})


if __name__ == "__main__":
    main()
