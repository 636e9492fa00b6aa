"""One step of the rank search: a gate per component against the mixture of candidate matrices it stands for.

    python benchmarks/search_step.py [--json results/search_step.json] [--model deit_small_patch16_224] [--batch 16]

COMCAT's Eq. 6, read literally, keeps one full D x D matrix per candidate rank and head (and one full matrix per
candidate of both FFN matrices) and weighs them by their probabilities. Two readings: "outputs mixed" evaluates every
candidate and weighs the results, as differentiable architecture search does; "matrices mixed" weighs matrices first.
A search step is a batch for the weights and a batch for the logits, gradients and AdamW updates included. Random
weights, data-free factors, five candidates (a sixth to five sixths of every width) and the dense layer; float32. Times
and peak memory (above what is resident before the model is made) in processes of their own, in turns; median and most.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import comcat
from comcat.layers.gates import AttentionGates, LinearGates
from comcat.models.profile import default_input_size
from comcat.rank_search.distribution import RankDistribution
from comcat.rank_search.gated_model import GatedModel
from comcat.rank_search.space import SearchSpace
from common import parser, write

WAYS = ("gates", "matrices mixed", "outputs mixed")
Step = Callable[[bool], tuple[Tensor, Tensor]]


class Candidates(nn.Module):
    """One full matrix per candidate, (A, ..., in, out), and the probabilities that weigh them."""

    def __init__(self, matrices: Tensor, outputs: bool) -> None:
        super().__init__()
        self.matrices = nn.Parameter(matrices)
        self.outputs = outputs
        self.p: Tensor | None = None

    def apply_to(self, product: Callable[[Tensor], Tensor]) -> Tensor:
        """``product`` is linear in the matrix it is given."""
        if self.outputs:
            return sum(p * product(matrix) for p, matrix in zip(self.p, self.matrices, strict=True))
        return product(torch.einsum("a,a...->...", self.p, self.matrices))


class TextbookAttention(nn.Module):
    """``scores_h = scale [x, 1] M_h x^T`` and ``out = sum_h softmax(scores_h) [x, 1] N_h``, biases folded in."""

    def __init__(self, gates: AttentionGates, widths: tuple[list[int], list[int]], scale: float, outputs: bool) -> None:
        super().__init__()
        H, d = gates.heads.num, gates.heads.width
        query, value = (
            torch.cat([weight.detach(), bias.detach()[..., None]], -1)  # (H, d, D + 1)
            for weight, bias in ((gates.query, gates.query_bias), (gates.value, gates.value_bias))
        )
        key = gates.key.detach()
        output = gates.output.weight.detach().unflatten(0, (d, H)).transpose(0, 1)  # (H, d, D_out)
        self.qk = Candidates(torch.stack([query[:, :r].mT @ key[:, :r] for r in widths[0]]), outputs)
        self.vo = Candidates(torch.stack([value[:, :r].mT @ output[:, :r] for r in widths[1]]), outputs)
        # What a candidate drops of the value bias is in its output bias.
        lost = [(value[:, r:, -1:] * output[:, r:]).sum((0, 1)) for r in widths[1]]
        self.lost = nn.Parameter(torch.stack(lost))
        self.bias = nn.Parameter(gates.output.bias.detach().clone())
        self.scale = scale

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x1 = F.pad(x, (0, 1), value=1.0)
        scores = self.qk.apply_to(lambda M: torch.einsum("bnd,hde->bhne", x1, M) @ x[:, None].mT)
        z = (self.scale * scores).softmax(-1) @ x1[:, None]  # (B, H, N, D + 1)
        out = self.vo.apply_to(lambda N: torch.einsum("bhnd,hde->bne", z, N))
        return out + self.bias + self.vo.p @ self.lost


class TextbookLinear(nn.Module):
    def __init__(self, gates: LinearGates, widths: list[int], outputs: bool) -> None:
        super().__init__()
        up, down = gates.up.detach(), gates.down.detach()
        self.weights = Candidates(torch.stack([up[:, :r] @ down[:r] for r in widths]), outputs)
        self.bias = nn.Parameter(gates.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.weights.apply_to(lambda W: F.linear(x, W)) + self.bias


class Textbook(nn.Module):
    """The same mixture as a :class:`GatedModel`, candidate by candidate."""

    def __init__(self, gated: GatedModel, parts: list, outputs: bool) -> None:
        super().__init__()
        self.model = gated.model
        widths = {(site.name, part): candidates for site, part, candidates in parts}
        self.slots: list[tuple[int, Candidates]] = []
        rows = {key: row for row, key in enumerate(widths)}
        for site, part, _ in parts:
            name = site.name
            if part == "qk":
                gates = gated.gates[name.replace(".", "/")][0]
                scale = self.model.get_submodule(name).scale
                made = TextbookAttention(gates, (widths[name, "qk"], widths[name, "vo"]), scale, outputs)
                self.slots += [(rows[name, "qk"], made.qk), (rows[name, "vo"], made.vo)]
            elif part in ("fc1", "fc2"):
                name = f"{name}.{part}"
                gates = next(g for g in gated.gates[site.name.replace(".", "/")] if g.prefix == name)
                made = TextbookLinear(gates, widths[site.name, part], outputs)
                self.slots.append((rows[site.name, part], made.weights))
            else:
                continue
            self.model.set_submodule(name, made)

    def forward(self, images: Tensor, probabilities: Tensor) -> Tensor:
        for row, candidates in self.slots:
            candidates.p = probabilities[row, : len(candidates.matrices)]
        return self.model(images)


def build(way: str, name: str) -> tuple[nn.Module, RankDistribution]:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for bias in (p for n, p in model.named_parameters() if n.endswith("bias")):
        nn.init.normal_(bias, std=0.02)
    parts, budget = ("qk", "vo", "ffn"), comcat.Budget(params=0.5)
    plan = comcat.plan(model, budget, method="uniform", parts=parts)
    space = SearchSpace(model, budget, plan, candidates=6, ffn="low-rank", parts=parts)
    mixture = space.gated if way == "gates" else Textbook(space.gated, space.rows, way == "outputs mixed")
    return mixture, space.ranks


def stepper(way: str, name: str, batch: int) -> Step:
    """A function that takes one step, with or without updates, and returns the loss and the logits' gradient."""
    mixture, ranks = build(way, name)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, batch, *default_input_size(mixture.model), generator=generator)
    labels = torch.randint(mixture.model.num_classes, (2, batch), generator=generator)
    noise = ranks.gumbel(generator)
    weights = [p for p in mixture.parameters() if p.requires_grad]
    updates = (torch.optim.AdamW(weights, lr=1e-4), torch.optim.AdamW([ranks.logits], lr=1e-2))

    def step(update: bool) -> tuple[Tensor, Tensor]:
        if update:
            F.cross_entropy(mixture(images[0], ranks.probabilities(5.0, noise).detach()), labels[0]).backward()
            updates[0].step()
            updates[0].zero_grad()
        p = ranks.probabilities(5.0, noise)
        loss = F.cross_entropy(mixture(images[1], p), labels[1]) * ranks.cost(p) ** 1.5
        (gradient,) = torch.autograd.grad(loss, [ranks.logits])
        if update:
            ranks.logits.grad = gradient
            updates[1].step()
        return loss.detach(), gradient

    return step


def child(way: str, args: argparse.Namespace) -> None:
    """In a process of its own: loss and gradient, seconds of some steps, and the peak of memory they needed."""

    def resident() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    # Rather an error of its own than a machine that runs out of memory.
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") - 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    before = resident()
    step = stepper(way, args.model, args.batch)
    step(True)
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        step(True)
        seconds.append(time.perf_counter() - start)
    peak = resident() - before
    loss, gradient = stepper(way, args.model, args.batch)(False)
    print(json.dumps({"seconds": seconds, "peak_mib": peak, "loss": float(loss), "gradient": gradient.tolist()}))


def measure(way: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """What :func:`child` prints; None if it did not fit into memory."""
    command = [sys.executable, __file__, "--child", way, "--model", args.model]
    command += ["--batch", str(args.batch), "--steps", str(args.steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and not ("memory" in done.stderr or "MemoryError" in done.stderr):
        raise RuntimeError(done.stderr)
    return None if done.returncode else json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", default="deit_small_patch16_224")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--steps", type=int, default=2, help="timed steps of a process")
    p.add_argument("--turns", type=int, default=2, help="processes of every way, in turns")
    p.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    p.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        return child(args.child, args)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
    for _ in range(args.turns):
        for way in list(runs):
            found = measure(way, args)
            if found is None:
                print(f"{way}: does not fit into the memory of this machine", flush=True)
                del runs[way]
            else:
                runs[way].append(found)
    results: dict[str, dict[str, Any]] = {}
    gates = runs["gates"][0]
    scale = torch.tensor(gates["gradient"]).abs().max()
    for way, found in runs.items():
        difference = (torch.tensor(found[0]["gradient"]) - torch.tensor(gates["gradient"])).abs().max()
        results[way] = {
            "seconds": statistics.median(t for run in found for t in run["seconds"]),
            "all_seconds": [run["seconds"] for run in found],
            "peak_mib": max(run["peak_mib"] for run in found),
            "loss_difference": abs(found[0]["loss"] - gates["loss"]) / gates["loss"],
            "gradient_difference": float(difference / scale),
        }
    print("| way | seconds per step | times gates | peak MiB | times gates | loss differs by | gradient differs by |")
    print("|---|---|---|---|---|---|---|")
    for way, r in results.items():
        time_ratio = r["seconds"] / results["gates"]["seconds"]
        memory_ratio = r["peak_mib"] / results["gates"]["peak_mib"]
        print(
            f"| {way} | {r['seconds']:.2f} | {time_ratio:.2f} | {r['peak_mib']:.0f} | {memory_ratio:.2f} | "
            f"{r['loss_difference']:.1e} | {r['gradient_difference']:.1e} |"
        )
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "child")}
    write(args.json, {"settings": settings, "results": results})


if __name__ == "__main__":
    main()
