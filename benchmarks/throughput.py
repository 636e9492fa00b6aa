"""Does cutting MACs cut time? Dense against compressed, in turns, whole model and per layer type.

    python benchmarks/throughput.py [--model deit_small_patch16_224] [--keep 0.5] [--batch 1 32] [--device cpu]
    python benchmarks/throughput.py --model transformers/vit-small    (a ViT-S whose own forward is kept)

Realized fraction = (time dense / time small) / (MACs dense / MACs small); 1 means every saved MAC is saved time.
Weights are random, so ranks are those of the uniform plan; times do not depend on the values.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import timm
import torch
from torch import Tensor, nn

import comcat
from comcat.hosts import find_layers
from common import parser, write


def turns(
    a: Callable[[], object], b: Callable[[], object], rounds: int, device: str
) -> tuple[float, float, list[float]]:
    """Median seconds of both, run in turns, and the sorted ratios a / b pair by pair."""

    def once(f: Callable[[], object]) -> float:
        start = time.perf_counter()
        f()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once(a), once(b), once(a), once(b)
    pairs = [(once(a), once(b)) for _ in range(rounds)]
    ratios = sorted(x / y for x, y in pairs)
    first, second = (sorted(column)[rounds // 2] for column in zip(*pairs, strict=True))
    return first, second, ratios


def layer_inputs(model: nn.Module, names: list[str], images: Tensor) -> dict[str, Tensor]:
    """The inputs that modules get in a forward pass."""
    got: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda m, args, n=n: got.__setitem__(n, args[0]))
        for n in names
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return got


def run(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Call some submodules on given inputs."""
    for name, x in inputs.items():
        model.get_submodule(name)(x)


def made(name: str) -> nn.Module:
    """A timm model, or transformers' ViT of the same size as DeiT-S."""
    if not name.startswith("transformers/"):
        return timm.create_model(name).eval()
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 1000}
    return ViTForImageClassification(ViTConfig(**sizes)).eval()


@torch.no_grad()
def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", default="deit_small_patch16_224")
    p.add_argument("--keep", type=float, default=0.5, help="fraction of the MACs")
    p.add_argument("--ffn", choices=("neurons", "low-rank"), default="neurons")
    p.add_argument("--rank-multiple", type=int, default=8)
    p.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    args = p.parse_args()

    torch.manual_seed(0)
    dense = made(args.model)
    size = comcat.profile(dense).input_size
    noise = None if args.ffn == "low-rank" else comcat.calibrate(dense, [torch.randn(4, *size)], probe_images=0)
    budget = comcat.Budget(macs=args.keep)
    plan = comcat.plan(dense, budget, noise, method="uniform", rank_multiple=args.rank_multiple)
    small = comcat.compress(dense, plan, noise)
    report = small.comcat.report
    whole_ratio = report.macs_before / report.macs_after
    options = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    dense.to(**options), small.to(**options)
    print(f"{args.model}, {args.dtype} on {args.device}, {torch.get_num_threads()} threads, {args.rounds} rounds")
    print("batch  what        dense ms  small ms  speed-up     min..max  MAC ratio  realized")
    found = find_layers(dense).layers
    rows = []
    for batch in args.batch:
        images = torch.randn(batch, *size, **options)
        parts = [("model", whole_ratio, {"": images})]
        for kind in ("attention", "ffn"):
            layers = [layer for layer in report.layers if layer.kind == kind]
            ratio = sum(x.macs_before for x in layers) / sum(x.macs_after for x in layers)
            parts.append((kind, ratio, layer_inputs(dense, [s.name for s in found if s.kind == kind], images)))
        for what, ratio, inputs in parts:
            slow, fast, ratios = turns(
                partial(run, dense, inputs), partial(run, small, inputs), args.rounds, args.device
            )
            speedup = ratios[len(ratios) // 2]
            print(
                f"{batch:>5}  {what:<10} {1e3 * slow:>9.1f} {1e3 * fast:>9.1f} {speedup:>9.2f}  "
                f"{ratios[0]:>5.2f}..{ratios[-1]:<5.2f} {ratio:>9.2f} {speedup / ratio:>9.2f}",
                flush=True,
            )
            row = {"batch": batch, "what": what, "dense_s": slow, "small_s": fast, "speedups": ratios}
            rows.append({**row, "mac_ratio": ratio, "realized": speedup / ratio})
    write(args.json, {**{k: v for k, v in vars(args).items() if k != "json"}, "rows": rows})


if __name__ == "__main__":
    main()
