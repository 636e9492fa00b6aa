"""One training step of text-to-image customization: added products, LoRA, Custom Diffusion, the whole UNet.

    python benchmarks/customize_step.py [--json results/customize_step_cpu.json] [--resolution 512] [--device auto]

The UNet and VAE of Stable Diffusion 1.x (random weights, random text embeddings), batch 1, epsilon loss, AdamW. A step
is noise, forward, backward and update, with the photo's latents given or encoded in the step. Every method has a process
and a model of its own; they take turns, one at a time, and every ratio is one of times of the same round. On a CPU the
whole UNet (13.8 GB with its gradients and moments) runs with comcat alone. Memory is the peak of the process (CPU) or
of its allocations (GPU). The floor is the same step for one bias of the first attention layer: what any method pays
that changes this layer. In half precision the frozen weights are bfloat16, trained ones float32.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from comcat import customize
from comcat.customize.objective import Objective, loss
from common import parser, write

METHODS = {
    "comcat": "comcat, rank 2",
    "lora": "LoRA, rank 16",
    "custom": "Custom Diffusion",
    "full": "full fine-tuning",
}
CELLS = ("cached", "encoded")
PHASES = ("encode", "forward", "backward", "update")
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "sample_size": 512,
}
# Targets: at most LoRA's time, full fine-tuning 2.6 times slower, 540 times less to store than the UNet in float32.
LORA_TARGET, FULL_TARGET, STORAGE_TARGET = 1.0, 2.6, 540


class Job:
    """One method on a model of its own."""

    def __init__(self, method: str, resolution: int, device: str, precision: str) -> None:
        self.device, self.half = torch.device(device), precision == "bf16"
        torch.manual_seed(0)
        with self.device:
            self.unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        self.unet_parameters = sum(p.numel() for p in self.unet.parameters())
        self.unet.requires_grad_(method == "full")
        if self.half and method != "full":
            self.unet.to(torch.bfloat16)
        self.handle: customize.Adapter | None = None
        if method == "comcat":
            self.handle = customize.add_adapter(self.unet, rank=2, dtype=torch.float32)
        elif method == "lora":
            self.unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        elif method == "custom":
            for name, parameter in self.unet.named_parameters():
                parameter.requires_grad_(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")))
        self.trained = [p for p in self.unet.parameters() if p.requires_grad]
        for p in self.trained:
            p.data = p.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        self.objective = Objective(DDPMScheduler(**SCHEDULER))
        self.vae: nn.Module | None = None
        generator = torch.Generator().manual_seed(1)
        dtype = torch.bfloat16 if self.half else torch.float32
        self.image = (torch.rand(1, 3, resolution, resolution, generator=generator) * 2 - 1).to(self.device, dtype)
        self.latents = torch.randn(1, 4, resolution // 8, resolution // 8, generator=generator).to(self.device)
        self.text = torch.randn(1, 77, 768, generator=generator).to(self.device, dtype)
        self.generator = torch.Generator()

    def open_vae(self) -> None:
        torch.manual_seed(0)
        with self.device:
            self.vae = AutoencoderKL(**VAE).requires_grad_(False).eval().to(self.image.dtype)

    def encode(self) -> Tensor:
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            latents = self.vae.encode(self.image).latent_dist.sample()
        return latents.float() * self.vae.config.scaling_factor

    def forward(self, latents: Tensor) -> Tensor:
        noisy = self.objective(latents, self.generator)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            out = self.unet(noisy.sample.to(self.text.dtype), noisy.timesteps, self.text, return_dict=False)[0]
        return loss(out, noisy)

    def step(self, cell: str, mark: Callable[[], None] = lambda: None) -> float:
        latents = self.latents if cell == "cached" else self.encode()
        mark()
        value = self.forward(latents)
        mark()
        value.backward()
        mark()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mark()
        return float(value)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def run(self, cell: str, steps: int) -> list[float]:
        """Seconds of steps; the noise starts anew, so that all methods see the same."""
        self.generator.manual_seed(2)
        seconds = []
        for _ in range(steps):
            start = self.now()
            value = self.step(cell)
            seconds.append(self.now() - start)
            assert value == value
        return seconds

    def phases(self, steps: int) -> list[dict[str, float]]:
        """Seconds of the parts of some steps, each waited for."""
        found = []
        for _ in range(steps):
            times = [self.now()]
            self.step("encoded", lambda times=times: times.append(self.now()))
            found.append({p: b - a for p, a, b in zip(PHASES, times, times[1:], strict=True)})
        return found

    def floor(self, steps: int) -> list[dict[str, float]]:
        """Seconds of the base model: forward alone, and with the gradient of one bias of the first attention layer."""
        self.handle.enabled = False
        bias = self.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_out[0].bias.requires_grad_()
        found = []
        for _ in range(steps):
            times = [self.now()]
            with torch.no_grad():
                self.forward(self.latents)
            times.append(self.now())
            self.forward(self.latents).backward()
            times.append(self.now())
            found.append({"forward": times[1] - times[0], "floor": times[2] - times[1]})
        bias.requires_grad_(False).grad = None
        self.handle.enabled = True
        return found

    def warm_up(self, cell: str, steps: int) -> float:
        """Untimed steps; the peak of memory in MiB."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if cell == "encoded":
            self.open_vae()
        self.run(cell, steps)
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def size(self) -> dict[str, int]:
        """Bytes of what is stored: of the trained tensors, and of comcat's files with their headers."""
        count = sum(p.numel() for p in self.trained)
        sizes = {"parameters": count, "unet_parameters": self.unet_parameters, "fp32": 4 * count, "fp16": 2 * count}
        if self.handle is not None:
            with tempfile.TemporaryDirectory() as folder:
                for key, storage in (("fp32", "float32"), ("fp16", "float16"), ("int8", "int8")):
                    path = customize.save_adapter(self.unet, Path(folder) / key, storage=storage)
                    sizes[f"file_{key}"] = path.stat().st_size
        return sizes


def serve(method: str, args: argparse.Namespace) -> None:
    """In a process of its own: for every line ``[name, arguments]`` the result of that method of :class:`Job`."""
    if args.device == "cpu":  # rather an error of its own than a machine that runs out of memory
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") - 2**30
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    job = Job(method, args.resolution, args.device, args.precision)
    print(json.dumps(job.size()), flush=True)
    for line in sys.stdin:
        name, given = json.loads(line)
        print(json.dumps(getattr(job, name)(*given)), flush=True)


class Worker:
    """The other end of :func:`serve`."""

    def __init__(self, method: str, args: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--child", method, "--resolution", str(args.resolution)]
        command += ["--device", args.device, "--precision", args.precision]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.method, self.size = method, self.answer()

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {METHODS[self.method]} ended")
        return json.loads(line)

    def ask(self, name: str, *given: Any) -> Any:
        print(json.dumps([name, given]), file=self.process.stdin, flush=True)
        return self.answer()


def measure(methods: list[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Methods in turns, comcat first: what they need, and per cell the seconds of every round."""
    workers = [Worker(method, args) for method in methods]
    try:
        found: dict[str, dict[str, Any]] = {}
        for w in workers:
            peaks = {cell: w.ask("warm_up", cell, args.warmup) for cell in CELLS}
            found[w.method] = {"size": w.size, "peak_mib": peaks, "rounds": {cell: [] for cell in CELLS}, "phases": []}
            print(f"{METHODS[w.method]}: ready, {max(peaks.values()):,.0f} MiB", flush=True)
        found["comcat"]["floor"] = []
        for r in range(args.rounds):
            for w in workers[:: 1 if r % 2 else -1]:
                for cell in CELLS:
                    found[w.method]["rounds"][cell].append(statistics.median(w.ask("run", cell, args.steps)))
                found[w.method]["phases"] += w.ask("phases", 1)
                if w.method == "comcat":
                    found["comcat"]["floor"] += w.ask("floor", 1)
    finally:
        for w in workers:
            w.process.kill()
            w.process.wait()
    for method, row in found.items():
        pairs = {c: zip(row["rounds"][c], found["comcat"]["rounds"][c], strict=True) for c in CELLS}
        row["ratios"] = {cell: sorted(a / b for a, b in pairs[cell]) for cell in CELLS}
        row["ratio"] = {cell: statistics.median(row["ratios"][cell]) for cell in CELLS}
        row["seconds"] = {cell: statistics.median(row["rounds"][cell]) for cell in CELLS}
        for key in ("phases", "floor"):
            if key in row:
                row[key] = {k: statistics.median(x[k] for x in row[key]) for k in row[key][0]}
        print(f"{METHODS[method]}: {row['ratio']} of comcat's time, parts in seconds {row['phases']}", flush=True)
    return found


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
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    if args.child:
        return serve(args.child, args)
    groups = [list(METHODS)] if args.device == "cuda" else [["comcat", "lora", "custom"], ["comcat", "full"]]
    print(f"{args.resolution} px, {args.precision} on {args.device}, {torch.get_num_threads()} threads", flush=True)
    runs = [measure(group, args) for group in groups]
    results = {method: row for run in reversed(runs) for method, row in run.items()}
    results = {method: results[method] for method in METHODS}

    unet = 4 * results["comcat"]["size"]["unet_parameters"]
    print(
        "\n| method | times comcat, latents cached | encoded | peak MiB, cached | encoded | parameters | UNet / stored |"
    )
    print("|---|---|---|---|---|---|---|")
    for method, row in results.items():
        cells = [f"{row['ratio'][c]:.2f} ({row['ratios'][c][0]:.2f}..{row['ratios'][c][-1]:.2f})" for c in CELLS]
        cells += [f"{row['peak_mib'][c]:,.0f}" for c in CELLS]
        size = row["size"]
        row["storage_ratio"] = {key: unet / n for key, n in size.items() if "parameters" not in key}
        stored = ", ".join(f"{r:,.1f} {key}" for key, r in row["storage_ratio"].items())
        print(f"| {METHODS[method]} | {' | '.join(cells)} | {size['parameters']:,} | {stored} |")
    for run in runs:
        base, own = run["comcat"]["floor"], run["comcat"]["seconds"]["cached"]
        shares = {METHODS[m]: row["seconds"]["cached"] / base["floor"] for m, row in run.items()}
        print(f"base forward {base['forward'] / own:.2f} of comcat's step; times the floor: {shares}")
    lora, full, stored = results["lora"]["ratio"], results["full"]["ratio"], results["comcat"]["storage_ratio"]
    targets = {f"LoRA at least as slow, {c}": (lora[c], lora[c] >= LORA_TARGET) for c in CELLS}
    targets |= {f"full >= {FULL_TARGET} times slower, {c}": (full[c], full[c] >= FULL_TARGET) for c in CELLS}
    targets |= {f"UNet >= {STORAGE_TARGET} x {key}": (r, r >= STORAGE_TARGET) for key, r in stored.items()}
    for name, (value, met) in targets.items():
        print(f"{name}: {value:.2f}, {'yes' if met else 'no'}")
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "child")}
    write(args.json, {"settings": settings, "groups": groups, "results": results, "runs": runs, "targets": targets})


if __name__ == "__main__":
    main()
