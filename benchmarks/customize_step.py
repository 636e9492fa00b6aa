"""One training step of text-to-image customization: added products, LoRA, Custom Diffusion, the whole UNet.

    python benchmarks/customize_step.py [--json results/customize_step_cpu.json] [--resolution 512] [--device auto]

UNet and VAE of Stable Diffusion 1.x (random weights, random text embeddings), batch 1, epsilon loss, AdamW. A step is
noise, forward, backward and update, with the photo's latents given or encoded in the step. Every method has a process
and a model of its own; they take turns, one at a time, and a ratio is one of times of one round. On a CPU: one
thread and its CPU seconds, which other work on the machine changes little; full fine-tuning (13.8 GB with gradients and
moments) runs with comcat alone. Memory is the peak of the process (CPU) or of its allocations (GPU). The floor is the
same step, with no update, for one bias of the first attention layer: what any method pays that changes this layer. In
half precision frozen weights are bfloat16, trained ones float32.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from comcat import customize
from comcat.customize.teaching.objective import Objective, loss
from common import parser, write

METHODS = {"comcat": "comcat rank 2", "lora": "LoRA rank 16", "custom": "Custom Diffusion", "full": "full fine-tuning"}
CELLS = ("cached", "encoded")
PHASES = ("encode", "forward", "backward", "update")
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 512}
TARGETS, STORAGE_TARGET = (("lora", 1.0), ("full", 2.6)), 540
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}


class Clock:
    """Marks in a step: CPU seconds, or events of the GPU, which do not hold it up."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.marks = device.type == "cuda", []
        self.mark()

    def mark(self) -> None:
        self.marks.append(torch.cuda.Event(enable_timing=True) if self.cuda else time.process_time())
        if self.cuda:
            self.marks[-1].record()

    def seconds(self) -> list[float]:
        """Between every two marks."""
        if self.cuda:
            torch.cuda.synchronize()
            self.marks = [self.marks[0].elapsed_time(mark) / 1000 for mark in self.marks]
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


class Job:
    """One method on a model of its own."""

    def __init__(self, method: str, resolution: int, device: str, precision: str) -> None:
        self.device, self.half = torch.device(device), precision == "bf16"
        torch.manual_seed(0)
        with self.device:
            self.unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        self.unet_parameters = sum(p.numel() for p in self.unet.parameters())
        self.dtype = torch.bfloat16 if self.half else torch.float32
        self.unet.requires_grad_(method == "full")
        if self.half and method != "full":
            self.unet.to(self.dtype)
        if method == "comcat":
            self.handle = customize.add_adapter(self.unet, rank=2, dtype=torch.float32)
        elif method == "lora":
            self.unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        for name, p in self.unet.named_parameters() if method == "custom" else ():
            p.requires_grad_(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")))
        self.trained = [p for p in self.unet.parameters() if p.requires_grad]
        for p in self.trained:
            p.data = p.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        self.objective = Objective(DDPMScheduler(**SCHEDULER))
        self.generator = torch.Generator().manual_seed(1)
        shapes = [(1, 3, resolution, resolution), (1, 4, resolution // 8, resolution // 8), (1, 77, 768)]
        given = [torch.randn(shape, generator=self.generator).to(self.device) for shape in shapes]
        self.image, self.latents, self.text = given

    def loss(self, latents: Tensor) -> Tensor:
        noisy = self.objective(latents, self.generator)
        inputs = noisy.sample.to(self.dtype), noisy.timesteps, self.text.to(self.dtype)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            return loss(self.unet(*inputs, return_dict=False)[0], noisy)

    @torch.no_grad()
    def encode(self) -> Tensor:
        latents = self.vae.encode(self.image.to(self.dtype)).latent_dist.sample()
        return latents.float() * self.vae.config.scaling_factor

    def step(self, cell: str) -> list[float]:
        """Seconds of the phases."""
        clock = Clock(self.device)
        latents = self.latents if cell == "cached" else self.encode()
        clock.mark()
        value = self.loss(latents)
        clock.mark()
        value.backward()
        clock.mark()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clock.mark()
        assert value.isfinite()
        return clock.seconds()

    def run(self, cell: str, steps: int) -> list[float]:
        """Median seconds of the phases of some steps; the noise starts anew, so that all methods see the same."""
        self.generator.manual_seed(2)
        return medians([self.step(cell) for _ in range(steps)])

    def floor(self) -> list[float]:
        """Seconds of the base model: forward alone, and with the gradient of one bias of the first attention layer."""
        self.handle.enabled = False
        bias = self.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_out[0].bias.requires_grad_()
        clock = Clock(self.device)
        with torch.no_grad():
            self.loss(self.latents)
        clock.mark()
        self.loss(self.latents).backward()
        clock.mark()
        bias.requires_grad_(False).grad = None
        self.handle.enabled = True
        return clock.seconds()

    def warm_up(self, cell: str, steps: int) -> float:
        """Untimed steps; the peak of memory in MiB."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        if cell == "encoded":
            self.vae = AutoencoderKL(**VAE).to(self.device, self.dtype)
        self.run(cell, steps)
        peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20

    def size(self) -> dict[str, Any]:
        """Parameters, and bytes of what is stored: the trained tensors, and comcat's files with their headers."""
        count = sum(p.numel() for p in self.trained)
        stored = {"fp32": 4 * count, "fp16": 2 * count}
        if hasattr(self, "handle"):
            with tempfile.TemporaryDirectory() as folder:
                for storage in ("float32", "float16", "int8"):
                    path = customize.save_adapter(self.unet, Path(folder) / storage, storage=storage)
                    stored[f"file, {storage}"] = path.stat().st_size
        return {"trained": count, "unet": self.unet_parameters, "bytes": stored}


def serve(job: Job) -> None:
    """In a process of its own: for every line ``[name, arguments]`` the result of that method of ``job``."""
    for name, given in map(json.loads, sys.stdin):
        print(json.dumps(getattr(job, name)(*given)), flush=True)


def ask(worker: subprocess.Popen[str], name: str, *given: Any) -> Any:
    print(json.dumps([name, given]), file=worker.stdin, flush=True)
    return json.loads(worker.stdout.readline())  # nothing to read where the process has ended


def measure(methods: list[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Methods in turns, comcat first: what they need, and the seconds of every round and cell, by phases."""
    workers, floors, found = {}, [], {}
    try:
        for method in methods:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", method]
            w = workers[method] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            row = found[method] = {"rounds": {cell: [] for cell in CELLS}, "size": ask(w, "size")}
            row["peak_mib"] = {cell: ask(w, "warm_up", cell, args.warmup) for cell in CELLS}
            print(f"{METHODS[method]} is ready: {row['peak_mib']}", flush=True)
        for r in range(args.rounds):
            for method in methods[:: -1 if r % 2 else 1]:
                for cell in CELLS:
                    found[method]["rounds"][cell].append(ask(workers[method], "run", cell, args.steps))
            floors.append(ask(workers["comcat"], "floor"))
    finally:
        for w in workers.values():
            w.kill()
            w.wait()
    for row in found.values():
        totals, own = ({c: list(map(sum, x["rounds"][c])) for c in CELLS} for x in (row, found["comcat"]))
        row["seconds"] = {cell: statistics.median(totals[cell]) for cell in CELLS}
        row["ratios"] = {c: sorted(a / b for a, b in zip(totals[c], own[c], strict=True)) for c in CELLS}
        row["ratio"] = {cell: statistics.median(row["ratios"][cell]) for cell in CELLS}
        values = medians(row["rounds"]["encoded"]) + medians(floors)
        row["parts"] = dict(zip((*PHASES, "base forward", "floor"), values, strict=True))
    return found


def medians(rows: list[list[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--resolution", type=int, default=512)
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    p.add_argument("--precision", choices=("fp32", "bf16"), help="bf16 on a GPU, fp32 on a CPU by default")
    p.add_argument("--steps", type=int, default=10, help="of a turn")
    p.add_argument("--warmup", type=int, default=2)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    args = p.parse_args()
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    args.device, args.precision = ("cuda", args.precision or "bf16") if cuda else ("cpu", args.precision or "fp32")
    if not cuda:
        torch.set_num_threads(1)
    if args.child:
        return serve(Job(args.child, args.resolution, args.device, args.precision))
    groups = [list(METHODS)] if cuda else [["comcat", "lora", "custom"], ["comcat", "full"]]
    print(f"{args.resolution} px, {args.precision} on {args.device}", flush=True)
    runs = [measure(group, args) for group in groups]
    rows = {method: row for run in reversed(runs) for method, row in run.items()}

    print("\n| method | times comcat: cached | encoded | MiB: cached | encoded | trained | fp32 UNet / stored |")
    print("|---|---|---|---|---|---|---|")
    for method, name in METHODS.items():
        row, size = rows[method], rows[method]["size"]
        row["stored"] = {key: 4 * size["unet"] / n for key, n in size["bytes"].items()}
        cells = [f"{row['ratio'][c]:.2f} ({row['ratios'][c][0]:.2f}..{row['ratios'][c][-1]:.2f})" for c in CELLS]
        cells += [f"{row['peak_mib'][c]:,.0f}" for c in CELLS]
        cells += [f"{size['trained']:,}", ", ".join(f"{r:,.1f} {key}" for key, r in row["stored"].items())]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\nseconds, with latents cached and by parts (medians, of the methods that took turns)")
    for method, row in (pair for run in runs for pair in run.items()):
        parts = {"step": row["seconds"]["cached"], **row["parts"]}
        print(f"{METHODS[method]:<17}" + "".join(f"  {key} {value:.3f}" for key, value in parts.items()))
    targets = {f"{METHODS[m]} in units of comcat, {c}": (rows[m]["ratio"][c], x) for m, x in TARGETS for c in CELLS}
    targets |= {f"fp32 UNet / comcat's {key}": (r, STORAGE_TARGET) for key, r in rows["comcat"]["stored"].items()}
    for name, (value, least) in targets.items():
        print(f"{name}: {value:.2f}, at least {least}: {'yes' if value >= least else 'no'}")
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "child")}
    rows["comcat"]["beside_full"] = runs[-1]["comcat"]["rounds"]
    write(args.json, {"settings": settings, "targets": targets, "results": rows})


if __name__ == "__main__":
    main()
