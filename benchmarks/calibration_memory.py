"""Peak memory of a calibration does not depend on the number of images.

    python benchmarks/calibration_memory.py --shared SHARED [--counts 256 4096] [--fisher]

Each count runs in a process of its own, on the CIFAR-10 teacher and its training images, read batch by batch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import comcat
from comcat.data import calibration_batches, load_dataset
from common import MEAN, STD, parser, teacher, write


def peak(shared: Path, count: int, fisher: bool) -> float:
    """Peak resident set in MiB of this process after one calibration."""
    model = teacher(shared)
    config = {"input_size": (3, 32, 32), "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 1.0}
    data = load_dataset(str(shared / "data/cifar10"), "train", config, purpose="calibration")
    comcat.calibrate(model, calibration_batches(data, count, batch_size=64, workers=0), fisher=fisher)
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--shared", type=Path, required=True, help="folder with teachers/ and data/cifar10/")
    p.add_argument("--counts", type=int, nargs="+", default=[256, 4096])
    p.add_argument("--fisher", action="store_true")
    p.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        print(peak(args.shared, args.one, args.fisher))
        return
    rows = []
    for count in args.counts:
        command = [sys.executable, __file__, "--shared", str(args.shared), "--one", str(count)]
        start = time.perf_counter()
        done = subprocess.run(command + ["--fisher"] * args.fisher, capture_output=True, text=True, check=True)
        rows.append({"images": count, "peak_mib": float(done.stdout), "seconds": time.perf_counter() - start})
        print(f"{count:>6} images: peak {rows[-1]['peak_mib']:.0f} MiB, {rows[-1]['seconds']:.0f} s", flush=True)
    ratio = rows[-1]["peak_mib"] / rows[0]["peak_mib"]
    print(f"ratio of the last to the first: {ratio:.3f}")
    write(args.json, {"fisher": args.fisher, "rows": rows, "ratio": ratio})


if __name__ == "__main__":
    main()
