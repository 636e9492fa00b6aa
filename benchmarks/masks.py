"""Two concepts in one picture: adapters with masks, against plain mixing and against each alone.

The tiny Stable Diffusion of the demo draws one digit to a picture of 16 x 16 pixels, and two side by side on a canvas
of 32 x 16. Two adapters are taught one digit each under the same prompt, so that nothing but where they act can tell
their digits apart; a classifier looks at each half. 3 seeds (photos, factors, noise, order of the training).

    python benchmarks/masks.py --json benchmarks/results/masks.json --figure masks.png
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import common
from comcat import customize
from comcat.customize.pictures import save_png
from comcat.report.style import INK, heading, new_figure, save
from comcat_demos import digits, digits_cache
from comcat_demos.digits_score import Classifier

SIZE = digits.SIZE
PROMPT = digits.CLASS_PROMPT
SHOWN = 8
COLUMNS = ("left", "right", "both", "either order")


def teach(pipe: Any, digit: int, seed: int, steps: int) -> customize.Adapter:
    """Five photos of a digit, under the prompt of any digit."""
    config = customize.CustomizeConfig(
        rank=2, steps=steps, batch_size=5, lr=1e-2, warmup_steps=10, weight_decay=0.0, schedule="cosine", seed=seed
    )
    with tempfile.TemporaryDirectory() as folder:
        for i, image in enumerate(digits.concept_images(digit, 5, seed=seed)):
            save_png(image, Path(folder) / f"{i}.png")
        handle = customize.train(pipe, folder, PROMPT, config, name=f"digit-{digit}", cpu=True)
    handle.enabled = False
    return handle


@torch.no_grad()
def draw(pipe: Any, cells: int, count: int, seed: int) -> Tensor:
    """(count, 3, 16, 16 cells) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    found = pipe(
        [PROMPT] * count,
        num_inference_steps=10,
        guidance_scale=4.0,
        height=SIZE,
        width=SIZE * cells,
        generator=generator,
        output_type="pt",
    )
    pictures: Tensor = found.images.float()
    return pictures


def judge(classifier: Classifier, pictures: Tensor, left: int, right: int) -> dict[str, float]:
    """Percent of the halves and of whole pictures that show what they should; and in either order."""
    sees = [classifier.predict(pictures[..., start : start + SIZE]) for start in (0, SIZE)]
    wanted = (sees[0] == left) & (sees[1] == right)
    swapped = (sees[0] == right) & (sees[1] == left)
    shares = {"left": sees[0] == left, "right": sees[1] == right, "both": wanted, "either order": wanted | swapped}
    return {name: 100 * share.float().mean().item() for name, share in shares.items()}


def run(pipe: Any, classifier: Classifier, pair: tuple[int, int], seed: int, args: Any) -> tuple[dict, dict]:
    """Method -> percentages, and method -> pictures, of one seed."""
    first, second = (teach(pipe, digit, seed, args.steps) for digit in pair)
    names = [first.name, second.name]
    left = torch.zeros(SIZE, 2 * SIZE)
    left[:, :SIZE] = 1
    both, apart = dict.fromkeys(names, 1.0), {names[0]: left, names[1]: 1 - left}
    ways: dict[str, tuple[dict[str, float], dict[str, Any], tuple[int, int]]] = {
        "the first alone, everywhere": ({names[0]: 1.0}, {}, (pair[0],) * 2),
        "the second alone, everywhere": ({names[1]: 1.0}, {}, (pair[1],) * 2),
        "the first alone, left": ({names[0]: 1.0}, {names[0]: left}, pair),
        "mixed": (both, {}, pair),
        "mixed at 0.7": (dict.fromkeys(names, 0.7), {}, pair),
        "mixed at 0.5": (dict.fromkeys(names, 0.5), {}, pair),
        "masks": (both, apart, pair),
        "masks, the other way round": (both, {names[0]: 1 - left, names[1]: left}, pair[::-1]),
    }
    scores, pictures = {}, {}
    for name, (scales, masks, wanted) in ways.items():
        customize.set_adapters(pipe, scales, masks)
        pictures[name] = draw(pipe, 2, args.count, 1000 + seed)
        scores[name] = judge(classifier, pictures[name], *wanted)
    for which, handle, digit in zip(("first", "second"), (first, second), pair, strict=True):
        customize.set_adapters(pipe, {handle.name: 1.0}, {})
        drawn = classifier.predict(draw(pipe, 1, args.count, 1000 + seed))
        scores[f"a picture of the {which} alone"] = {"both": 100 * (drawn == digit).float().mean().item()}
    for handle in (first, second):
        handle.remove()
    return scores, pictures


def figure(pictures: dict[str, Tensor], pair: tuple[int, int], path: Path) -> None:
    """A row of pictures of every method, the same noise in every column."""
    drawing = new_figure(9, 0.8 + 0.55 * len(pictures))
    heading(
        drawing,
        f"Two concepts in one picture: an adapter for {pair[0]} and one for {pair[1]}",
        f"'{PROMPT}' on a canvas of two cells; a column has the same noise everywhere",
    )
    axes = drawing.subplots()
    axes.set_xlim(-4.2, SHOWN * 2.1)
    axes.set_ylim(len(pictures) * 1.1, 0)
    axes.axis("off")
    axes.set_aspect("equal")
    for y, (name, drawn) in enumerate(pictures.items()):
        axes.text(-0.15, 1.1 * y + 0.5, name, ha="right", va="center", fontsize=9, color=INK)
        for x, image in enumerate(drawn[:SHOWN]):
            extent = (2.1 * x, 2.1 * x + 2, 1.1 * y + 1, 1.1 * y)
            axes.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), extent=extent, interpolation="nearest")
    save(drawing, path)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--count", type=int, default=64, help="pictures of each method")
    parser.add_argument("--pair", type=int, nargs=2, default=[digits.LEFT_OUT, 7])
    parser.add_argument("--cache", type=Path, help="where the trained base is kept")
    parser.add_argument("--figure", type=Path, help="a PNG of the first seed's pictures, a row of every method")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe, classifier = digits_cache.load_or_train(args.cache), Classifier()
    runs: dict[str, list[dict]] = {}
    for seed in args.seeds:
        scores, pictures = run(pipe, classifier, tuple(args.pair), seed, args)
        for name, found in scores.items():
            runs.setdefault(name, []).append(found)
            print(f"seed {seed} {name:<32} {found}", flush=True)
        if args.figure and seed == args.seeds[0]:
            figure(pictures, tuple(args.pair), args.figure)
    common.write(
        args.json,
        {
            "pair": args.pair,
            "prompt": PROMPT,
            "steps": args.steps,
            "count": args.count,
            "seeds": args.seeds,
            "runs": runs,
        },
    )
    print(f"\n{'method':<32} {'left':>14} {'right':>14} {'both':>14} {'either order':>14}")
    for name, rows in runs.items():
        cells = [common.spread([r[key] for r in rows]) if key in rows[0] else "" for key in COLUMNS]
        print(f"{name:<32} " + " ".join(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()
