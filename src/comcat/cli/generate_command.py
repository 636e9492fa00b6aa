"""``comcat generate``: images from a pipeline with adapters."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from ..wording import slug
from . import options as opt
from .console import Screen, command
from .customize_command import Base, Denoiser, Device, Variant
from .inputs import parse_device

MOST_SEEDS = 10_000


@command
def generate(
    base: Base,
    out: Annotated[Path, opt.Option(metavar="DIR", help="Directory for the images.")],
    prompt: Annotated[list[str] | None, opt.Option(metavar="TEXT", help="What to draw; repeatable.")] = None,
    prompts: Annotated[Path | None, opt.Option(metavar="FILE", help="A text file with a prompt on each line.")] = None,
    adapter: Annotated[
        list[str] | None,
        opt.Option(
            metavar="FILE[:S][@MASK][,token=WORD]",
            help="Adapter; its strength, an image that is white where it acts, and its learned word if not its own; "
            "repeatable.",
        ),
    ] = None,
    seeds: opt.Seeds = "0-3",
    steps: opt.Steps = None,
    guidance: opt.Guidance = None,
    negative_prompt: opt.NegativePrompt = None,
    height: opt.Pixels = None,
    width: opt.Pixels = None,
    without_token: Annotated[
        bool,
        opt.Option("--without-token", help="Allow prompts without the word that an adapter learned."),
    ] = False,
    batch_size: opt.BatchSize = 4,
    precision: Annotated[
        str | None,
        opt.Option(metavar="no|bf16|fp16", help="fp16 on a GPU, no elsewhere, unless given.", rich_help_panel=opt.RUN),
    ] = None,
    variant: Variant = None,
    denoiser: Denoiser = None,
    device: Device = "auto",
    overwrite: Annotated[
        bool, opt.Option("--overwrite", help="Replace images of the same names.", rich_help_panel=opt.RUN)
    ] = False,
    json_output: opt.Json = False,
) -> None:
    """Draw prompts with BASE and any number of adapters: one PNG per prompt and seed, and a grid of all.

    [dim]comcat generate BASE --adapter dog.safetensors:0.8 --prompt "a photo of V* dog on the beach" --out images[/dim]

    Two concepts side by side: --adapter dog.safetensors@left.png --adapter cat.safetensors@right.png
    """
    screen = Screen(json_output)
    numbers = parse_seeds(seeds)
    files = [parse_adapter(text) for text in adapter or []]
    with screen:
        from ..customize.adapter.masking import as_mask
        from ..customize.files.adapter_file import read_adapter
        from ..customize.generation import check_prompts
        from ..customize.generation import generate as draw
        from ..customize.pictures import grid, save_png
        from ..customize.pipelines import open_pipeline

        texts = read_prompts(prompt, prompts)
        for given in files:  # what is wrong with a file is said before the base is read
            read_adapter(given.path)
            if given.mask is not None:
                as_mask(given.mask)
        place = parse_device(device)
        precision = drawing_precision(precision, place.type)
        names = [f"{i:03d}-{slug(text)}" for i, text in enumerate(texts)]
        paths = [[out / f"{name}-seed{seed}.png" for seed in numbers] for name in names]
        check_outputs(out, [p for row in paths for p in row] + [out / "grid.png", out / "images.json"], overwrite)
        pipe = open_pipeline(base, precision, place, variant, screen.note, denoiser)
        handles = load_all(pipe, files)
        check_prompts(pipe, texts, without_token=without_token)
        rows = draw(
            pipe,
            texts,
            seeds=numbers,
            steps=steps,
            guidance_scale=guidance,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            batch_size=batch_size,
            progress=screen.progress,
        )
        for row, images in zip(paths, rows, strict=True):
            for path, image in zip(row, images, strict=True):
                save_png(image, path, overwrite)
        save_png(grid(rows), out / "grid.png", overwrite)
        document = {
            "base": base,
            "denoiser": None if denoiser is None else str(denoiser),
            "adapters": [
                {
                    "file": str(given.path),
                    "name": h.name,
                    "scale": h.scale,
                    "token": h.token.text if h.token else None,
                    "mask": str(given.mask) if given.mask else None,
                }
                for given, h in zip(files, handles, strict=True)
            ],
            "images": [
                {"file": p.name, "prompt": text, "seed": seed}
                for text, row in zip(texts, paths, strict=True)
                for p, seed in zip(row, numbers, strict=True)
            ],
            "settings": {
                "steps": steps,
                "guidance": guidance,
                "negative_prompt": negative_prompt,
                "precision": precision,
            },
        }
        from ..storage.atomic import atomic_file

        with atomic_file(out / "images.json", overwrite) as file:
            file.write((json.dumps(document, indent=1) + "\n").encode())
    screen.done(f"{sum(map(len, rows))} images in ", (out, "bold"), "; see ", (out / "grid.png", "bold"))
    screen.result(document)


def drawing_precision(given: str | None, device: str) -> str:
    """In which pictures are drawn: as given, or what suits the device."""
    from ..customize.pipelines import DTYPES

    precision = given or ("fp16" if device == "cuda" else "no")
    if precision not in DTYPES:
        raise typer.BadParameter(f"{precision!r} is not one of {', '.join(DTYPES)}", param_hint="--precision")
    return precision


class AdapterOption(NamedTuple):
    """What one ``--adapter`` says; None: as the adapter's file has it, and everywhere in the picture."""

    path: Path
    scale: float | None = None
    token: str | None = None
    mask: Path | None = None


def parse_adapter(text: str) -> AdapterOption:
    """``dog.safetensors:0.8@left.png,token=V2*``: a file, and what stands behind it in any order.

    What is there under this name is taken as it is. BadParameter for a strength, a mask or a word that is none.
    """
    scale = token = mask = None
    rest = text
    while not os.path.exists(rest):
        head, _, tail = rest.rpartition(":")
        front, found, word = rest.rpartition(",token=")
        file, picture = _split_mask(rest)
        if head and scale is None and (number := _number(tail)) is not None:
            rest, scale = head, number
        elif file and mask is None and not (found and len(file) < len(front)):
            rest, mask = file, Path(picture)
        elif found and token is None:
            rest, token = front, word
        else:
            break
    typo = None if os.path.exists(rest) else re.search(r"(?i)(?<=\.safetensors)[:,@].*", rest)
    if typo or token == "":
        raise typer.BadParameter(
            f"{typo[0] if typo else ',token='!r} of {text!r} cannot be read; write FILE, FILE:0.8, FILE@MASK or "
            "FILE:0.8@MASK,token=WORD",
            param_hint="--adapter",
        )
    return AdapterOption(Path(rest), scale, token, mask)


def _split_mask(text: str) -> tuple[str, str]:
    """``dog.safetensors@left.png`` -> ("dog.safetensors", "left.png"); ("", "") without a mask."""
    splits = [(text[:i], text[i + 1 :]) for i, letter in enumerate(text) if letter == "@"]
    there = [split for split in splits if os.path.exists(split[1])]
    named = [split for split in splits if Path(split[1]).suffix not in ("", ".safetensors")]
    return (there or named[::-1] or [("", "")])[0]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_seeds(text: str) -> list[int]:
    """``0-3,7`` -> [0, 1, 2, 3, 7]."""
    found: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", item)
        if match is None or not int(match[1]) <= int(match[2] or match[1]) < 2**63:
            raise typer.BadParameter(f"{item!r} is no seed; write them like 0-3,7", param_hint="--seeds")
        first, last = int(match[1]), int(match[2] or match[1])
        if len(found) + last - first >= MOST_SEEDS:
            raise typer.BadParameter(f"{text!r} is more than {MOST_SEEDS:,} seeds", param_hint="--seeds")
        found += range(first, last + 1)
    return list(dict.fromkeys(found))


def read_prompts(given: Sequence[str] | None, file: Path | None) -> list[str]:
    """Prompts of the options and of the file, in this order.

    Raises:
        DataError: there is none, or the file cannot be read.
    """
    from ..errors import DataError

    texts = list(given or [])
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"the prompts in '{file}' cannot be read: {getattr(error, 'strerror', 'not UTF-8')}"
            ) from error
        texts += [line.strip() for line in lines if line.strip()]
    if not texts:
        raise DataError("there is no prompt; give --prompt or --prompts")
    return texts


def check_outputs(out: Path, paths: Sequence[Path], overwrite: bool) -> None:
    from ..errors import CheckpointError

    if out.exists() and not out.is_dir():
        raise CheckpointError(f"'{out}' is a file; choose a directory with --out")
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        raise CheckpointError(f"'{there[0]}' exists already; choose another --out or give --overwrite")


def load_all(pipe: Any, files: Sequence[AdapterOption]) -> list[Any]:
    """Load adapters; of two with the same name the later one is called by a number."""
    from ..customize.adapter.attached import adapters
    from ..customize.files.adapter_file import load_adapter, read_adapter

    handles = []
    for path, scale, token, mask in files:
        name = read_adapter(path)[0].name
        taken = adapters(pipe)
        unique = next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)
        handles.append(load_adapter(pipe, path, scale=scale, name=unique, token=token))
        if mask is not None:
            handles[-1].mask = mask
    return handles
