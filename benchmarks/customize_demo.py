"""Teaching a tiny Stable Diffusion a digit: added products, LoRA at the same size, full fine-tuning.

The contest of ``comcat demo customize``, over seeds (photos, noise, order, factors and scored images all change). With
``--sweep`` every method is first run at several learning rates on a seed of its own, and the best one is shown.

    python benchmarks/customize_demo.py --seeds 0 1 2 --json benchmarks/results/customize_demo.json
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import common
from comcat_demos import digits, digits_cache
from comcat_demos.contest import METHODS, Contest, Method

RATES = {
    "comcat": (3e-3, 1e-2, 2e-2, 4e-2),
    "lora": (3e-3, 1e-2, 2e-2, 4e-2),
    "full": (1e-4, 3e-4, 1e-3),
}
SWEEP_SEED = 100


def sweep(pipe: object, steps: int, digit: int) -> list[dict]:
    """Every kind of method at its middle size, at every rate."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        contest = Contest(pipe, Path(folder), digit, SWEEP_SEED, steps)
        contest.prepare()
        for kind, rank in (("comcat", 2), ("lora", 4), ("full", 0)):
            for rate in RATES[kind]:
                outcome = contest.run(Method(f"{kind} {rank or ''} at {rate:g}", kind, rank, rate))
                print(f"{outcome.method.name:<20} {outcome.concept:6.1f} {outcome.retention:6.1f}", flush=True)
                rows.append(outcome.to_dict())
    return rows


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--digit", type=int, default=digits.LEFT_OUT)
    parser.add_argument("--cache", type=Path, help="where the trained base is kept")
    parser.add_argument("--sweep", action="store_true", help="also compare learning rates, on another seed")
    args = parser.parse_args()
    torch.set_num_threads(1)  # layers this small gain nothing from a second thread
    pipe = digits_cache.load_or_train(args.cache, args.digit)
    rates = sweep(pipe, args.steps, args.digit) if args.sweep else None
    runs: dict[str, list[dict]] = {}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            contest = Contest(pipe, Path(folder), args.digit, seed, args.steps)
            contest.prepare()
            for method in METHODS:
                outcome = contest.run(replace(method))
                runs.setdefault(method.name, []).append(outcome.to_dict())
                print(f"seed {seed} {method.name:<18} {outcome.concept:6.1f} {outcome.retention:6.1f}", flush=True)
    common.write(
        args.json, {"digit": args.digit, "steps": args.steps, "seeds": args.seeds, "runs": runs, "sweep": rates}
    )
    print(f"\n{'method':<18} {'stored':>10} {'V* right':>14} {'others right':>14} {'time':>6} {'memory':>9}")
    comcat = [r["seconds"] for r in runs["comcat, rank 2"]]
    for name, rows in runs.items():
        values = [[r[key] for r in rows] for key in ("concept", "retention")]
        cells = ["" if None in column else common.spread(column) for column in values]  # the base has no concept
        # In turns within a seed: the ratio of times is meaningful, the seconds of a shared machine are not.
        ratio = sum(r["seconds"] / c for r, c in zip(rows, comcat, strict=True)) / len(rows)
        peak = sum(r["peak"] for r in rows) / len(rows) / 1e6
        print(f"{name:<18} {rows[0]['bytes']:>10,} {cells[0]:>14} {cells[1]:>14} {ratio:>6.2f} {peak:>6.1f} MB")


if __name__ == "__main__":
    main()
