"""What ``comcat judge`` tells apart on the digits: methods and strengths of training, beside a classifier's verdict.

The encoder is the vision transformer of ``comcat demo``, trained on the scans; the classifier is a support vector
machine on pixels, which knows nothing of it.

    python benchmarks/judge_digits.py --seeds 0 1 --json benchmarks/results/judge_digits.json
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import comcat
import common
from comcat import customize
from comcat.cli.inputs import Reading
from comcat.customize import Contestant
from comcat.customize.judging.encoders import ImageEncoder
from comcat.data import loader
from comcat_demos import digits, digits_cache, vit
from comcat_demos.contest import PROMPT, Contest, Method

#: Method, and steps of its training.
ROWS = (
    (Method("comcat, rank 2, 20 steps", "comcat", 2, 1e-2), 20),
    (Method("comcat, rank 2, 60 steps", "comcat", 2, 1e-2), 60),
    (Method("comcat, rank 2", "comcat", 2, 1e-2), 200),
    (Method("LoRA, rank 4, 60 steps", "lora", 4, 1e-2), 60),
    (Method("LoRA, rank 4", "lora", 4, 1e-2), 200),
    (Method("full fine-tuning", "full", 0, 3e-4), 200),
)
SCORES = ("dino", "kept_dino", "diversity")


class Kept(Contest):
    """A contest that keeps what each method has made of the UNet."""

    made: Any = None

    def score(self, prompt: str | None = PROMPT) -> Any:
        self.made = copy.deepcopy(self.pipe.unet)
        return super().score(prompt)


def encoder(folder: Path) -> ImageEncoder:
    """The demo's classifier, trained on the real scans."""
    vit.write_digits(folder / "digits")
    model = vit.build()
    reading = Reading(str(folder / "digits"))
    data: Any = reading.open("train", "evaluation", reading.configure(model), 10)
    images, labels = (torch.cat(column) for column in zip(*loader(data), strict=True))
    vit.train(model, images, labels)
    comcat.save(model, folder / "encoder")
    return ImageEncoder.open(str(folder / "encoder"))


def contestant(contest: Kept, method: Method, file: Path) -> Contestant:
    """The adapter, or for other methods the UNet that they have changed, with the word from the file."""
    if method.kind == "comcat":
        return Contestant.read(file, name=method.name)
    made, read = contest.made, Contestant.read(file, name=method.name)

    @contextmanager
    def put_on(pipe: Any) -> Iterator[None]:
        original, pipe.unet = pipe.unet, made
        try:
            with read.put_on(pipe):
                yield
        finally:
            pipe.unet = original

    return replace(read, put_on=put_on)


def judged(pipe: Any, encoder: ImageEncoder, folder: Path, seed: int) -> list[dict[str, Any]]:
    contestants, verdicts = [], {}
    for number, (method, steps) in enumerate(ROWS):
        contest = Kept(pipe, folder / "contest", digits.LEFT_OUT, seed, steps)
        if not number:
            contest.prepare()
        file = folder / f"{number}.safetensors"
        outcome = contest.run(method, file)
        contestants.append(replace(contestant(contest, method, file), bytes=outcome.bytes, seconds=outcome.seconds))
        verdicts[method.name] = outcome
    found = customize.judge(
        pipe,
        contestants,
        folder / "contest" / "photos",
        out=folder / "judged",
        dino=encoder,
        class_word="a digit",
        prompts=["a photo of {}"],
        retention_prompts=[digits.prompt(d) for d in range(10) if d != digits.LEFT_OUT],
        seeds=range(24),
        steps=10,
        guidance_scale=4.0,
        batch_size=24,
    )
    rows = []
    for row in found.rows:
        outcome = verdicts.get(row.name)
        scores = {key: row.scores[key].mean for key in SCORES if key in row.scores}
        margins = {f"{key} margin": row.scores[key].margin for key in SCORES if key in row.scores}
        said = {} if outcome is None else {"concept": outcome.concept, "retention": outcome.retention}
        rows.append({"name": row.name, "seed": seed, **scores, **margins, **said, "bytes": row.bytes,
                     "ceiling": found.ceiling["dino"], "best": list(row.best)})  # fmt: skip
        print(row.name, {k: round(v, 3) for k, v in {**scores, **said}.items()}, row.best, flush=True)
    return rows


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--keep", type=Path, help="directory for the pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)  # layers this small gain nothing from a second thread
    pipe = digits_cache.load_or_train()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        looks = encoder(Path(temporary))
        for seed in args.seeds:
            rows += judged(pipe, looks, (args.keep or Path(temporary)) / str(seed), seed)
    common.write(args.json, {"seeds": args.seeds, "rows": rows})


if __name__ == "__main__":
    main()
