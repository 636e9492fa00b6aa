"""The denoiser of the digits pipeline made smaller: digits drawn right before, training-free, and after a distillation.

A support vector machine that knows nothing of the pipeline says which digit an image looks like. Budgets are shares of
the parameters that can be reduced (attention and FFNs; convolutions stay), the whole UNet's share is beside them.
Every row is scored on images of several seeds. Then the demo's contest on the dense and on a compressed base.

    python benchmarks/compress_denoiser.py --json benchmarks/results/compress_denoiser.json
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import comcat
import common
from comcat import Budget, denoisers
from comcat.denoisers.prediction_error import prediction_error
from comcat_demos import digits, digits_cache
from comcat_demos.contest import METHODS, Contest
from comcat_demos.digits_score import Classifier, score


class Digits:
    """The pipeline, what its denoiser was recorded with, and the figures so far."""

    def __init__(self, args: Any, folder: Path) -> None:
        self.args, self.pipe = args, digits_cache.load_or_train(args.cache)
        self.dense, self.classifier = self.pipe.unet, Classifier()
        prompts = [digits.prompt(digit) for digit in range(10) if digit != digits.LEFT_OUT]
        self.recording = denoisers.record(
            self.pipe, prompts, folder, seeds=range(8), steps=10, guidance_scale=4.0, share=0.5, batch_size=24
        )
        self.ready = comcat.prepare(self.dense, next(iter(self.recording))[:3].call)
        self.calibration = comcat.calibrate(
            self.ready, self.recording, fisher=True, outputs="features", probe_images=args.probe_images
        )
        layers = self.ready.inventory.layers
        own = {id(p): p.numel() for layer in layers for one in layer.originals().values() for p in one.parameters()}
        whole = sum(p.numel() for p in self.dense.parameters())
        self.found: dict[str, Any] = {
            "prompts": len(prompts),
            "examples": self.recording.examples,
            "seeds": args.seeds,
            "images_per_digit": args.images,
            "distill_steps": args.steps,
            "distill_lr": args.lr,
            "params": whole,
            "reducible": sum(own.values()),
            "rows": [],
            "contest": {},
        }

    def judge(self, unet: nn.Module, name: str, keep: float | None, seeds: list[int]) -> None:
        """One row, written at once."""
        row: dict[str, Any] = {"name": name, "keep": keep, "params": sum(p.numel() for p in unet.parameters())}
        examples = self.calibration.unseen
        assert examples is not None
        row["error"] = prediction_error(self.dense, unet, examples)
        self.pipe.unet = unet
        row["score"] = [
            score(self.pipe, self.classifier, count_other=self.args.images, seed=100 * seed).retention for seed in seeds
        ]
        self.pipe.unet = self.dense
        self.found["rows"].append(row)
        self.write()
        share = 100 * row["params"] / self.found["params"]
        print(
            f"{name:<22} {keep or 1:4.0%} {share:6.1f} % {row['error']:9.2e} {common.spread(row['score']):>14}",
            flush=True,
        )

    def at(self, keep: float) -> nn.Module:
        """All rows of a budget; the distilled model of the best plan."""
        budget, best = Budget(params=keep, of="parts"), None
        for method in self.args.methods:
            plan = comcat.plan(self.ready, budget, self.calibration, method)
            small = comcat.compress(self.ready, plan, self.calibration)
            self.judge(small, method, keep, self.args.seeds)
            error = self.found["rows"][-1]["error"]
            if best is None or error < best[0]:
                best = error, small, method
        assert best is not None
        _, small, method = best
        if self.args.steps:
            config = denoisers.DistillConfig(steps=self.args.steps, batch_size=32, lr=self.args.lr)
            denoisers.distill(small, self.dense, self.recording, config, cpu=True)
            self.judge(small, f"{method}, distilled", keep, self.args.seeds)
        return small

    def contest(self, unet: nn.Module, name: str) -> None:
        """The demo's concept taught to this base."""
        self.pipe.unet = unet
        with tempfile.TemporaryDirectory() as folder:
            contest = Contest(self.pipe, Path(folder), digits.LEFT_OUT, 0, self.args.contest_steps)
            contest.prepare()
            method = next(one for one in METHODS if one.name == "comcat, rank 2")
            outcome = contest.run(method)
        self.pipe.unet = self.dense
        self.found["contest"][name] = outcome.to_dict()
        self.write()
        print(f"contest, {name}: concept {outcome.concept:.1f}, others {outcome.retention:.1f}", flush=True)

    def write(self) -> None:
        if self.args.json:
            self.args.json.write_text(json.dumps(self.found, indent=1) + "\n")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of the images that are scored")
    parser.add_argument("--images", type=int, default=16, help="of every digit and seed")
    parser.add_argument("--kept", type=float, nargs="*", default=[0.7, 0.5, 0.3, 0.1], help="budgets")
    parser.add_argument("--steps", type=int, default=250, help="of the distillation; 0 leaves it out")
    parser.add_argument("--lr", type=float, default=3e-4, help="of the distillation")
    parser.add_argument("--methods", nargs="*", default=["uniform", "spectrum", "probe"])
    parser.add_argument("--probe-images", type=int, default=256)
    parser.add_argument("--contest-steps", type=int, default=200, help="of customization; 0 leaves it out")
    parser.add_argument("--contest-at", type=float, default=0.5, help="the budget whose distilled model is customized")
    parser.add_argument("--cache", type=Path, help="where the trained base is kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = Digits(args, Path(folder))
        print(f"{'':<22} {'kept':>4} {'of UNet':>8} {'error':>9} {'digits right':>14}")
        base.judge(base.dense, "dense", None, args.seeds)
        made = {keep: base.at(keep) for keep in args.kept}
        if args.contest_steps:
            base.contest(base.dense, "dense")
            base.contest(made[args.contest_at], f"{args.contest_at:.0%}, distilled")


if __name__ == "__main__":
    main()
