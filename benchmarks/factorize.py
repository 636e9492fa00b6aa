"""Factor every head of a ViT data-free: per-head projection against the textbook SVD of D x D products.

    python benchmarks/factorize.py [--model deit_base_patch16_224] [--rank 32] [--json results/factorize.json]

Both routes compute the best rank-r approximation of ``W_q W_k^T`` and ``W_v W_o`` of every head in float64. The
memory figure comes from a process of its own that only compresses the model in place: how far its resident set rises
above the state before the model was made, over the size of the model.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
from torch import Tensor

import comcat
from comcat.hosts import find_layers
from comcat.layers.attention import AttentionLayer
from comcat.layers.heads import HeadWeights
from common import parser, write


def textbook(heads: HeadWeights, rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """Truncated SVD of every D x D product, as (D, D) matrices."""
    products = ([], [])
    for h in range(len(heads.query)):
        qk = heads.query[h].double().mT @ heads.key[h].double()
        vo = heads.value[h].double().mT @ heads.output[h].double()
        for out, product in zip(products, (qk, vo), strict=True):
            U, S, Vh = torch.linalg.svd(product)
            out.append(U[:, :rank] * S[:rank] @ Vh[:rank])
    return products


def ours(layer: AttentionLayer, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four thin factors of every head, (H, r, D) each, in the layout of the layers that hold them."""
    factors = layer.factors()
    heads, qk, vo = factors.heads, factors.qk, factors.vo
    return (
        qk.q_map[..., :rank].mT @ heads.query.double(),
        qk.k_map[..., :rank].mT @ heads.key.double(),
        vo.down[..., :rank].mT @ heads.value.double(),
        vo.up[..., :rank, :] @ heads.output.double(),
    )


def peak_over_model(name: str, rank: int) -> float:
    """Rise of the peak resident set while a model is made and compressed in place, over the model's bytes."""
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    model = timm.create_model(name).eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    layers = [layer for layer in find_layers(model).layers if layer.kind == "attention"]
    comcat.compress_(model, comcat.Plan({s.name: {"qk": rank, "vo": rank} for s in layers}), keep_original=False)
    # Not getrusage: its peak is inherited from the process that started this one.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return (int(peak.split()[1]) * 1024 - before) / size


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", default="deit_base_patch16_224")
    p.add_argument("--rank", type=int, default=32)
    p.add_argument("--repeats", type=int, default=3, help="of ours; the textbook route runs once")
    p.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.memory_only:
        print(peak_over_model(args.model, args.rank))
        return

    torch.manual_seed(0)
    model = timm.create_model(args.model).eval()
    layers = [layer for layer in find_layers(model).layers if layer.kind == "attention"]
    seconds = []
    for _ in range(args.repeats + 1):
        start = time.perf_counter()
        factors = [ours(layer, args.rank) for layer in layers]
        seconds.append(time.perf_counter() - start)
    fast = sorted(seconds[1:])[args.repeats // 2]

    slow, difference = 0.0, 0.0
    for layer, (query, key, value, output) in zip(layers, factors, strict=True):
        start = time.perf_counter()
        reference = textbook(layer.weights(), args.rank)
        slow += time.perf_counter() - start
        for got, want in zip((query.mT @ key, value.mT @ output), reference, strict=True):
            want = torch.stack(want)
            difference = max(difference, float((got - want).abs().max() / want.abs().max()))
    command = [sys.executable, __file__, "--memory-only", "--model", args.model, "--rank", str(args.rank)]
    peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    heads = sum(layer.heads.num for layer in layers)
    print(f"{args.model}: {heads} heads, rank {args.rank}, both products, float64, {torch.get_num_threads()} threads")
    print(f"  SVD of every D x D product   {slow:8.2f} s")
    print(f"  projection of the heads      {fast:8.2f} s   (median of {args.repeats})")
    print(f"  ratio                        {slow / fast:8.0f} x")
    print(f"  largest relative difference  {difference:8.1e}")
    print(f"  peak memory / model          {peak:8.2f}     (made and compressed in place)")
    figures = {"textbook_s": slow, "ours_s": seconds[1:], "ratio": slow / fast, "difference": difference, "peak": peak}
    write(args.json, {"model": args.model, "rank": args.rank, **figures})


if __name__ == "__main__":
    main()
