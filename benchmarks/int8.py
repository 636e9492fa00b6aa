"""Int8 files of a CIFAR-10 teacher, dense and compressed: accuracy and bytes, against the same files in fp32.

    python benchmarks/int8.py --shared SHARED [--json results/int8.json] [--test-images 10000] [--teacher vit_cifar10]

The compressed model has half the parameters, without training: ranks chosen on 1024 unlabelled training images.
Int8 is calibrated on 256 of them, once with all layers quantized and once with the default tolerance. Accuracy is that
of the file, run in its runtime.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import comcat
from comcat.exporting.exporter import INT8_TOLERANCE
from comcat.exporting.file_model import FileModel
from comcat.exporting.formats import file_format
from common import MEAN, STD, accuracy, cifar10, parser, teacher, write

#: Above any divergence: all layers are quantized.
ALL = 100.0


def measured(
    model: nn.Module, to: str, precision: str, tolerance: float, pool: Tensor, test: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    target = file_format(to)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{target.suffix}"
        images = pool if precision == "int8" else test[0]
        report = comcat.export(model, path, to, precision, images=images, int8_tolerance=tolerance)
        made = FileModel(path, target, precision, list(report.outputs), None, model)
        top1 = accuracy(made, *test)
    return {
        "top1": top1,
        "bytes": report.bytes,
        "relative": report.relative,
        "divergence": report.divergence,
        "floats": report.floats,
    }


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--shared", type=Path, required=True, help="folder with teachers/ and data/cifar10/")
    p.add_argument("--test-images", type=int, default=10_000)
    p.add_argument("--teacher", default="vit_cifar10")
    p.add_argument("--method", default="auto", help="of the plan")
    p.add_argument("--kinds", nargs="*", default=("dense", "compressed"))
    p.add_argument("--to", nargs="*", default=("onnx", "openvino", "torch"))
    args = p.parse_args()
    known = json.loads(args.json.read_text())["results"] if args.json and args.json.is_file() else {}
    dense = teacher(args.shared, args.teacher)
    dense.pretrained_cfg = {**(getattr(dense, "pretrained_cfg", None) or {}), "mean": MEAN, "std": STD}
    pool, _ = cifar10(args.shared, "train", 1024)
    test = cifar10(args.shared, "test", args.test_images)
    rows = known.setdefault(args.teacher, {"test_images": args.test_images})
    models = {"dense": dense}
    if "compressed" in args.kinds:
        calibration = comcat.calibrate(dense, pool.split(64))
        plan = comcat.plan(dense, comcat.Budget(params=0.5), calibration, method=args.method)
        models["compressed"] = comcat.compress(dense, plan, calibration).eval()
        rows["method"] = args.method
    for kind in args.kinds:
        model = models[kind]
        for to in args.to:
            for name, precision, tolerance in (
                ("fp32", "fp32", ALL),
                ("int8, all layers", "int8", ALL),
                ("int8", "int8", INT8_TOLERANCE),
            ):
                with torch.random.fork_rng():
                    found = measured(model, to, precision, tolerance, pool[:256], test)
                rows.setdefault(kind, {}).setdefault(to, {})[name] = found
                print(
                    f"{args.teacher:13} {kind:10} {to:9} {name:17} {found['top1']:.2f} %  "
                    f"{found['bytes'] / 1e6:.2f} MB  {found['divergence']}  {len(found['floats'])} float",
                    flush=True,
                )
                write(args.json, {"results": known})


if __name__ == "__main__":
    main()
