"""What the recipes cut, against the rows of the paper (COMCAT, arXiv 2305.17235, tables 1 and 2), counted as there.

    python benchmarks/recipes.py [--json results/recipes.json]

The paper counts linear layers and convolutions only: no norms, no class token, no position table, and of the MACs
neither of the two products inside attention. Weights are random and ranks uniform, data-free: a plan of any method
meets the same budget.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import nn

import comcat
from comcat.cli.run_command import Recipe
from common import parser, write

FOLDER = Path(__file__).parent.parent / "recipes"
#: Recipe -> parameters kept (None: the recipe's own) -> the paper's cuts in percent, parameters and MACs.
PAPER = {
    "deit_small": {None: (49.98, 51.21), 12_429_000: (43.82, 44.93), 13_244_000: (40.11, 41.15)},
    "deit_base": {None: (61.06, 61.68)},
    "deit_tiny": {None: None},
    "swin_tiny": {None: None},
}


def layer_counts(model: nn.Module, size: tuple[int, int, int]) -> tuple[int, int]:
    """Parameters and MACs of the linear layers and convolutions for one image."""
    macs = 0

    def count(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal macs
        outputs = out.numel() // out.shape[1] if isinstance(module, nn.Conv2d) else out.numel() // out.shape[-1]
        macs += outputs * module.weight.numel()

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model(torch.zeros(1, *size))
    for handle in handles:
        handle.remove()
    return sum(p.numel() for layer in layers for p in layer.parameters(recurse=False)), macs


def main() -> None:
    args = parser(__doc__).parse_args()
    print("| recipe | parameters | cut % | paper | MACs cut % | paper | whole model, parameters | MACs |")
    print("|---|---|---|---|---|---|---|---|")
    results = []
    for name, budgets in PAPER.items():
        recipe = Recipe.read(FOLDER / f"{name}.yaml")
        torch.manual_seed(0)
        model = timm.create_model(recipe.model, **recipe.model_args).eval()
        dense, size = comcat.profile(model), comcat.profile(model).input_size
        dense_layers = layer_counts(model, size)
        for kept, paper in budgets.items():
            budget = comcat.Budget(**recipe.budget) if kept is None else comcat.Budget(params=kept)
            plan = comcat.plan(model, budget, method="uniform", parts=recipe.compress["parts"])
            small = comcat.compress(model, plan)
            cuts = [100 - 100 * a / b for a, b in zip(layer_counts(small, size), dense_layers, strict=True)]
            whole = comcat.profile(small)
            shares = [100 - 100 * a / b for a, b in ((whole.params, dense.params), (whole.macs, dense.macs))]
            said = [f"{x:.2f}" for x in paper] if paper else ["", ""]
            print(
                f"| {name} | {whole.params:,} | {cuts[0]:.2f} | {said[0]} | {cuts[1]:.2f} | {said[1]} | "
                f"{shares[0]:.2f} | {shares[1]:.2f} |",
                flush=True,
            )
            results.append(
                {"recipe": name, "params": whole.params, "cuts": cuts, "paper": paper, "cuts of all": shares}
            )
    write(args.json, {"recipes": results})


if __name__ == "__main__":
    main()
