"""Int8 files of a CIFAR-10 teacher, dense and compressed: accuracy, bytes and time, against the same files in fp32.

    python benchmarks/int8.py --shared SHARED [--json results/int8.json] [--test-images 10000] [--teacher vit_cifar10]

The compressed models have 44 % of the parameters, so that their int8 files (ONNX) have an eighth of the dense file's
bytes; each is made without training from its own sample of 2048 unlabelled training images. Int8 is calibrated on 256
of them, once with all layers quantized and once with the default tolerance. Accuracy is that of the file, run in its
runtime; times are of all files of a format, the first sample's, in turns in one run. Other teachers and formats in the
JSON file are kept.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import comcat
from comcat.exporting.exporter import INT8_TOLERANCE
from comcat.exporting.file_model import FileModel
from comcat.exporting.formats import file_format
from comcat.runtimes import session
from comcat.runtimes.sessions import in_turns
from common import MEAN, STD, accuracy, cifar10, parser, teacher, write

#: Images that a model is compressed with.
SAMPLE = 2048
#: Above any divergence: all layers are quantized.
ALL = 100.0
FILES = (("fp32", "fp32", ALL), ("int8, all layers", "int8", ALL), ("int8", "int8", INT8_TOLERANCE))
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}


def measured(
    model: nn.Module, path: Path, to: str, precision: str, tolerance: float, pool: Tensor, test: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    target = file_format(to)
    images = pool if precision == "int8" else test[0]
    report = comcat.export(model, path, to, precision, images=images, int8_tolerance=tolerance)
    made = FileModel(path, target, precision, list(report.outputs), None, model)
    return {
        "top1": accuracy(made, *test),
        "bytes": report.bytes,
        "relative": report.relative,
        "divergence": report.divergence,
        "weights_only": report.weights_only,
        "floats": report.floats,
    }


def timed(files: dict[tuple[str, str], Path], to: str, batch: int) -> dict[tuple[str, str], dict[str, float]]:
    """Milliseconds of a batch, and the median ratio to the dense file in fp32, turn by turn, on one thread."""
    precisions = {name: precision for name, precision, _ in FILES}
    sessions = [session(path, RUNTIMES[to], precisions[name], threads=1) for (_, name), path in files.items()]
    inputs = [np.random.default_rng(0).standard_normal((batch, 3, 32, 32), dtype=np.float32)]
    seconds = in_turns(sessions, inputs, 41, seconds=20, least_seconds=4)
    first = seconds[list(files).index(("dense", "fp32"))]
    return {
        key: {"ms": 1e3 * float(np.median(own)), "of_dense_fp32": float(np.median(np.divide(own, first)))}
        for key, own in zip(files, seconds, strict=True)
    }


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--shared", type=Path, required=True, help="folder with teachers/ and data/cifar10/")
    p.add_argument("--test-images", type=int, default=10_000)
    p.add_argument("--teacher", default="vit_cifar10")
    p.add_argument("--method", default="auto", help="of the plan")
    p.add_argument("--keep", type=float, default=0.44, help="of the parameters")
    p.add_argument("--samples", type=int, default=3, help="of calibration images, each with a model of its own")
    p.add_argument("--to", nargs="*", default=("onnx", "openvino", "torch"))
    args = p.parse_args()
    known = json.loads(args.json.read_text())["results"] if args.json and args.json.is_file() else {}
    dense = teacher(args.shared, args.teacher)
    dense.pretrained_cfg = {**(getattr(dense, "pretrained_cfg", None) or {}), "mean": MEAN, "std": STD}
    pool, _ = cifar10(args.shared, "train", SAMPLE * args.samples)
    test = cifar10(args.shared, "test", args.test_images)
    rows = known.setdefault(args.teacher, {"test_images": args.test_images, "keep": args.keep, "method": args.method})
    models = {"dense": (dense, pool[:SAMPLE])}
    for number, images in enumerate(pool.split(SAMPLE)):
        calibration = comcat.calibrate(dense, images.split(64), fisher=True)
        plan = comcat.plan(dense, comcat.Budget(params=args.keep), calibration, method=args.method)
        models[f"compressed {number}"] = comcat.compress(dense, plan, calibration).eval(), images
    for to in args.to:
        with tempfile.TemporaryDirectory() as folder:
            files = {}
            for kind, (model, images) in models.items():
                for name, precision, tolerance in FILES:
                    path = Path(folder) / f"{kind}-{precision}-{tolerance}{file_format(to).suffix}"
                    with torch.random.fork_rng():
                        found = measured(model, path, to, precision, tolerance, images[:256], test)
                    rows.setdefault(kind, {}).setdefault(to, {})[name] = found
                    if kind in ("dense", "compressed 0"):
                        files[kind, name] = path
                    spared = f"{len(found['weights_only'])} int8 weights only, {len(found['floats'])} float"
                    size = f"{found['top1']:.2f} %  {found['bytes'] / 1e6:.2f} MB"
                    print(f"{kind:12} {to:9} {name:17} {size}  {found['divergence']}  {spared}", flush=True)
                    write(args.json, {"results": known})
            for batch in (1, 8) if to in RUNTIMES else ():
                for (kind, name), took in timed(files, to, batch).items():
                    rows[kind][to][name][f"batch {batch}"] = took
                    print(f"{kind:12} {to:9} {name:17} batch {batch}: {took}", flush=True)
                write(args.json, {"results": known})


if __name__ == "__main__":
    main()
