"""The picture of customize_methods.py: score against stored bytes, one line a kind of method.

python benchmarks/customize_methods_figure.py benchmarks/results/customize_methods.json docs/customize-methods.png
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from comcat.report.style import INK, MUTED, heading, new_figure, save, tidy

KINDS = {
    "comcat": ("comcat", "#3a6ea5"),
    "lora": ("LoRA", "#e08e45"),
    "dora": ("DoRA", "#b5543c"),
    "lokr": ("LoKr", "#6b9e57"),
    "oft": ("OFT", "#7a6bb0"),
    "token": ("token alone", MUTED),
    "full": ("full fine-tuning", "#555555"),
}
#: Far from the others in size, and shown as lines.
APART = {"token": "0.1 kB", "full": "2.2 MB"}
TITLES = {"score": "mean of both", "concept": "V* right in everything", "retention": "other prompts right"}


def value(cell: dict, key: str) -> float:
    return (cell["concept"] + cell["retention"]) / 2 if key == "score" else cell[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    cells = json.loads(args.results.read_text())["cells"]
    runs = {key: cell for key, cell in cells.items() if not key.startswith(("sweep", "equal"))}
    figure = new_figure(12.5, 4.6)
    heading(
        figure,
        "Two digits that a tiny Stable Diffusion never saw, taught from five images of single ones each",
        "percent of images over what is stored (float16 values, without names); mean and standard error over seeds and "
        "digits",
    )
    for axes, (key, title) in zip(figure.subplots(1, 3, sharey=True), TITLES.items(), strict=True):
        for kind, (label, color) in KINDS.items():
            names = dict.fromkeys(cell["name"] for cell in runs.values() if cell["kind"] == kind)
            found = [[cell for cell in runs.values() if cell["name"] == name] for name in names]
            values = [[value(cell, key) for cell in group] for group in found]
            means = [statistics.fmean(group) for group in values]
            if kind in APART:
                axes.axhline(means[0], color=color, linestyle="--", linewidth=1.2, label=f"{label}, {APART[kind]}")
                continue
            errors = [statistics.stdev(group) / len(group) ** 0.5 if len(group) > 1 else 0 for group in values]
            sizes = [2 * group[0]["parameters"] / 1000 for group in found]
            style = {"color": color, "markersize": 5, "linewidth": 1.3, "elinewidth": 0.8}
            axes.errorbar(sizes, means, errors, fmt="o-", label=label, **style)
        axes.set_xscale("log")
        axes.set_xticks([20, 30, 50, 100], ["20", "30", "50", "100"])
        axes.minorticks_off()
        axes.set_xlabel("kB", fontsize=9, color=INK)
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        tidy(axes, grid="y")
    figure.axes[0].set_ylabel("percent", fontsize=9, color=INK)
    figure.axes[2].legend(frameon=False, fontsize=8, loc="lower left")
    save(figure, args.out)


if __name__ == "__main__":
    main()
