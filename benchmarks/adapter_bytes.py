"""Adapters by their bytes: components chosen by worth against one rank for all, and what 16, 8 and 4 bits cost.

The digits pipeline learns the digit that it does not know from five photos, as in ``comcat demo customize``. Beside the
classifier's scores, which saturate: the denoising loss on scans of that digit that nothing was taught with, and on
those of the other digits under their own prompts, both on the same noise for all.

    python benchmarks/adapter_bytes.py --seeds 0 1 2 --json benchmarks/results/adapter_bytes.json
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import common
from comcat import customize
from comcat.customize.files.adapter_file import load_adapter, write_adapter
from comcat.customize.files.encoding import products_error
from comcat.customize.files.layer_factors import PARTS, by_layer, set_side, sides
from comcat.customize.files.numbers import decode_rows, encode_rows
from comcat.customize.files.restoring import restore_adapter
from comcat.customize.lora.denoiser_probe import difference
from comcat.customize.shrinking import shrink
from comcat.customize.teaching import byte_budget
from comcat.customize.teaching.families import family_of
from comcat.customize.teaching.objective import Objective
from comcat_demos import digits, digits_cache
from comcat_demos.contest import PROMPT, Contest


class Bench:
    """One base and one seed: photos, noise, factors and scored images all change with it."""

    def __init__(self, pipe: Any, folder: Path, digit: int, seed: int, steps: int) -> None:
        self.pipe, self.folder, self.digit, self.seed = pipe, folder, digit, seed
        self.contest = Contest(pipe, folder, digit, seed, steps)
        self.contest.prepare()
        self._held_out = {}
        images, labels = digits.real_images("test")
        family = family_of(pipe)
        for kind, chosen in (("concept_loss", labels == digit), ("other_loss", labels != digit)):
            mean, std = family.encode_images(images[chosen] * 2 - 1)
            captions = [PROMPT if d == digit else digits.prompt(d) for d in labels[chosen].tolist()]
            self._held_out[kind] = (mean, std, captions)

    def learn(self, file: Path, rank: int, **options: Any) -> None:
        """Train, save, and leave the pipeline as it was."""
        config = replace(self.contest.config, lr=1e-2, rank=rank)
        folder = self.folder / "class-images"
        handle = customize.train(
            self.pipe,
            self.folder / "photos",
            PROMPT,
            config,
            name="concept",
            class_images=folder,
            class_prompt="a photo of a digit",
            cpu=True,
            **options,
        )
        # Alike for all, so that bytes differ by what is kept, and by nothing else.
        handle.info["training"] = {"steps": config.steps, "max_bytes": options.get("max_bytes", 99_999)}
        write_adapter(handle, file, options.get("storage", "float16"))
        handle.remove()

    def measure(self, file: Path, scores: bool = True) -> dict[str, float]:
        """Losses and scores with an adapter from a file."""
        handle = load_adapter(self.pipe, file, dtype=torch.float32)
        try:
            found: dict[str, float] = {"bytes": file.stat().st_size}
            found |= {kind: self._loss(*held) for kind, held in self._held_out.items()}
            if scores:
                score = self.contest.score()
                found |= {"concept": score.concept, "retention": score.retention}
            return found
        finally:
            handle.remove()

    @torch.no_grad()
    def _loss(self, mean: torch.Tensor, std: torch.Tensor, captions: list[str], draws: int = 4) -> float:
        family, objective = family_of(self.pipe), Objective(self.pipe.scheduler)
        generator = torch.Generator().manual_seed(1234)
        texts = {caption: family.encode_text([caption])["embeds"] for caption in dict.fromkeys(captions)}
        total = 0.0
        for _ in range(draws):
            noisy = objective(mean + std * torch.randn(std.shape, generator=generator), generator)
            text = torch.cat([texts[caption] for caption in captions])
            out = family.predict(noisy.sample, noisy.timesteps, {"embeds": text}, torch.zeros(0))
            total += float((out - noisy.target).square().mean())
        return total / draws


def arms(bench: Bench, folder: Path, base_rank: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Every budget is the bytes of one rank for all; against it, components chosen by worth.

    Between them, to tell what the choice does from what a higher rank in the first half of the run does: the same run
    that keeps the first components of every head.
    """
    for rank in (1, 2, base_rank):
        file, chosen = folder / f"rank-{rank}.safetensors", folder / "chosen.safetensors"
        bench.learn(file, rank)
        yield f"rank {rank} everywhere", bench.measure(file)
        if rank == base_rank:
            return
        budget = file.stat().st_size
        with mock.patch.object(byte_budget, "choose", _first(rank)):
            bench.learn(chosen, base_rank, max_bytes=budget, storage="float16")
        yield f"rank {base_rank}, then {rank} everywhere", bench.measure(chosen)
        bench.learn(chosen, base_rank, max_bytes=budget, storage="float16")
        assert chosen.stat().st_size <= budget
        yield f"by worth, bytes of rank {rank}", bench.measure(chosen)
        if rank == 1:
            bench.learn(chosen, 2 * base_rank, max_bytes=budget, storage="nf4")
            assert chosen.stat().st_size <= budget
            yield f"by worth in nf4, bytes of rank {rank}", bench.measure(chosen)


def cuts(bench: Bench, folder: Path, base_rank: int) -> Iterator[tuple[str, dict[str, float]]]:
    """An adapter that is there, without any more training: components chosen by worth, or the first of every head."""
    whole = folder / "whole.safetensors"
    bench.learn(whole, base_rank)
    yield f"rank {base_rank}", bench.measure(whole, scores=False)
    for rank in (1, 2):
        out, budget = folder / "cut.safetensors", None
        for how in ("first components", "by worth"):
            handle = load_adapter(bench.pipe, whole, dtype=torch.float32)
            choose = _first(rank) if budget is None else shrink.choose
            with mock.patch.object(shrink, "choose", choose):
                customize.shrink_adapter(bench.pipe, budget or 99_999, prompts=[PROMPT])
            write_adapter(handle, out, "float16")
            handle.remove()
            budget = budget or out.stat().st_size
            row = {"output_error": difference(bench.pipe, whole, out, PROMPT)}
            yield f"cut to rank {rank}, {how}", {**bench.measure(out, scores=False), **row}


def _first(rank: int) -> Any:
    """In the place of the choice by worth: the first components of every head."""

    def choose(worths: Any, sizes: Any, max_bytes: int) -> Any:
        return {key: (torch.arange(w.worth.shape[1]) < rank).expand_as(w.worth).clone() for key, w in worths.items()}

    return choose


def storages(bench: Bench, file: Path, scores: bool = True) -> Iterator[tuple[str, dict[str, float]]]:
    """The same adapter in every storage."""
    about, exact = customize.read_adapter(file)
    for storage in ("float16", "int8", "nf4"):
        path = file.with_name(f"{file.stem}-{storage}.safetensors")
        row = {"products_error": restore_adapter(file, path, storage)}
        row["products_error_as_trained"] = products_error(about, exact, _rounded(about, exact, storage))
        row["output_error"] = difference(bench.pipe, file, path)
        yield f"{file.stem.replace('-', ' ')}, {storage}", {**bench.measure(path, scores), **row}


def _rounded(about: Any, exact: dict[str, torch.Tensor], storage: Any) -> dict[str, torch.Tensor]:
    """The factors rounded as they were trained, without looking for better ones of the same products."""
    new = dict(exact)
    for component, part in about.components.items():
        for layer, entry in part.layers.items():
            own = {name: t.float() for name, t in by_layer(exact, component, layer).items()}
            for kinds, matrices in ((kinds, sides(own, p, entry.rank)) for p, kinds in PARTS.items()):
                for kind, matrix in zip(kinds, matrices, strict=True):
                    rows = matrix.mT.flatten(0, 1)
                    rounded = decode_rows(encode_rows(rows, storage), rows.shape[1], storage)
                    set_side(own, kind, rounded.unflatten(0, (-1, entry.rank)).mT, entry.rank)
            new |= {f"{component}.{layer}.{name}": t for name, t in own.items()}
    return new


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=4, help="that runs under a budget begin with")
    parser.add_argument("--digit", type=int, default=digits.LEFT_OUT)
    parser.add_argument("--cache", type=Path, help="where the trained base is kept")
    args = parser.parse_args()
    torch.set_num_threads(1)  # layers this small gain nothing from a second thread
    pipe = digits_cache.load_or_train(args.cache, args.digit)
    runs: dict[str, dict[str, list[dict[str, float]]]] = {"budgets": {}, "cuts": {}, "storages": {}}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            bench = Bench(pipe, folder, args.digit, seed, args.steps)
            for kind, rows in (
                ("budgets", arms(bench, folder, args.rank)),
                ("cuts", cuts(bench, folder, args.rank)),
                ("storages", storages(bench, folder / "rank-2.safetensors")),
                ("storages", storages(bench, folder / f"rank-{args.rank}.safetensors", scores=False)),
            ):
                for name, row in rows:
                    runs[kind].setdefault(name, []).append(row)
                    print(f"seed {seed} {name:<34}", {k: round(v, 5) for k, v in row.items()}, flush=True)
        about = {"digit": args.digit, "steps": args.steps, "rank": args.rank, "seeds": args.seeds}
        common.write(args.json, {**about, **runs})
    _show(runs)


def _show(runs: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    for kind, rows in runs.items():
        print(f"\n{kind}")
        for name, values in rows.items():
            cells = [f"{key} {common.spread([v[key] for v in values])}" for key in values[0]]
            print(f"{name:<34} {'  '.join(cells)}")


if __name__ == "__main__":
    main()
