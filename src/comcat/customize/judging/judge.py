"""Judge adapters: draw with each and with the base, look at the pictures with encoders, compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, DataError, ModelError
from ...progress import Progress
from ...storage.atomic import atomic_file, claimed_output
from ...storage.reader import digest
from ..adapter.attached import adapters as on_pipeline
from ..generation import Drawing, check_prompts
from ..pictures import save_png
from ..teaching.material import Note
from ..teaching.photos import find_photos
from . import metrics
from .album import Album
from .contestants import Contestant, Words
from .encoders import DualEncoder, ImageEncoder
from .judgement import KINDS, JudgedRow, Judgement, missing_scores
from .jury import Jury, open_encoders
from .prompt_lists import PLACE, default_prompts, default_retention, retained, templates
from .sheet import sheet

BASE = "base"
RESULT, SHEET = "judgement.json", "grid.png"
_SAMPLE = 64  # numbers of a tensor by which weights are known


def judge(
    pipe: Any,
    adapters: Sequence[str | Path | Contestant],
    images: str | Path,
    *,
    out: str | Path,
    dino: str | ImageEncoder | None = None,
    clip: str | DualEncoder | None = None,
    class_word: str | None = None,
    subject: str | None = None,
    prompts: Sequence[str] | None = None,
    retention_prompts: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3),
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 4,
    device: str | None = None,
    base_pictures: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Judgement:
    """Measure what adapters have learned of a subject, and what they have changed beside it.

    All draw the same prompts at the same seeds; ``out`` gets their pictures, ``judgement.json`` and ``grid.png``.
    Pictures that are there already are not drawn again. Scores: see :mod:`comcat.customize.judging.metrics`.

    Args:
        pipe: a text-to-image pipeline without adapters.
        adapters: files of comcat, LoRAs that diffusers reads, or :class:`Contestant`.
        images: folder of photos of the subject.
        dino: an image encoder, by whatever :func:`comcat.load_model` takes, for concept fidelity.
        clip: a model of images and text, as :meth:`comcat.ZeroShot.open` takes it, for fidelity to the prompts.
        class_word: what the subject is one of, e.g. "dog"; from the adapters' captions by default.
        subject: what adapters without a learned word call it, e.g. "sks dog".
        prompts: with {} for the subject; DreamBench's 25 by default.
        retention_prompts: without the subject, {} is its class; a list of the package by default.
        seeds: one picture per prompt for each.
        steps, guidance_scale, negative_prompt, height, width: as the pipeline takes them; its own by default.
        batch_size: pictures that are drawn at a time, and a quarter of those that encoders look at.
        device: where the encoders run; that of the pipeline by default.
        base_pictures: folder of the base's pictures, to share them among judgements; in ``out`` by default.
        overwrite: draw anew what was drawn with other settings.

    Raises:
        ModelError: no encoder, or one that cannot be used; the pipeline has adapters on it.
        DataError: photos or prompts that cannot be used; nothing says what the subject is.
        CheckpointError: an adapter cannot be read or does not fit; ``out`` holds pictures of other settings.
    """
    out = Path(out)
    if on_pipeline(pipe) or getattr(pipe, "get_list_adapters", dict)():
        raise ModelError("the pipeline has adapters on it, which would be taken for the base; take them off first")
    place = str(getattr(pipe, "device", "cpu")) if device is None else device
    encoders = open_encoders(dino, clip, place)
    contestants = named([one if isinstance(one, Contestant) else Contestant.read(one) for one in adapters])
    words = Words.of(contestants, class_word, subject)
    asked = default_prompts(words.class_word) if prompts is None else prompts
    asked = templates(asked, words.class_word, words.known)
    kept = default_retention() if retention_prompts is None else retention_prompts
    kept = retained(kept, words.class_word, words.known)
    numbers = tuple(dict.fromkeys(seeds))
    if not numbers:
        raise DataError("there is no seed; give at least one")
    photos = find_photos(Path(images), "the subject", note=note, option="--images")
    drawing = Drawing(steps, guidance_scale, negative_prompt, height, width)
    with_class = [prompt.replace(PLACE, words.class_word) for prompt in asked]
    jury = Jury(encoders, [photo.path for photo in photos], with_class, kept, 4 * batch_size)
    check_folder(out)
    with claimed_output(out):
        settings = pipeline_settings(pipe, drawing)
        shared = Path(base_pictures) if base_pictures is not None else out / BASE
        albums = {BASE: Album(shared, settings, overwrite)}
        for contestant in contestants:
            own = {**settings, **{f"adapter_{key}": value for key, value in contestant.identity.items()}}
            albums[contestant.name] = Album(out / folder_name(contestant.name), own, overwrite)
        subjects = {BASE: words.class_word, **words.subjects}
        texts = {name: [prompt.replace(PLACE, called) for prompt in asked] for name, called in subjects.items()}
        jobs = {name: [(prompt, seed) for prompt in (*own, *kept) for seed in numbers] for name, own in texts.items()}
        for one in contestants:  # what does not go together is said before the first picture
            if albums[one.name].missing(jobs[one.name]):
                with one.put_on(pipe):
                    check_prompts(pipe, texts[one.name])
        _draw(pipe, None, albums[BASE], jobs[BASE], drawing, batch_size, progress)
        for one in contestants:
            _draw(pipe, one, albums[one.name], jobs[one.name], drawing, batch_size, progress)
        judgement = _judged(jury, albums, texts, subjects, contestants, numbers, progress)
        judgement = replace(
            judgement,
            base=str(getattr(pipe, "name_or_path", None) or type(pipe).__name__),
            class_word=words.class_word,
            prompts=tuple(asked),
            retention_prompts=tuple(kept),
            drawing={key: value for key, value in asdict(drawing).items() if value is not None},
        )
        with atomic_file(out / RESULT) as file:
            file.write((json.dumps(judgement.to_dict(), indent=1) + "\n").encode())
        page = sheet(albums, texts, asked, kept, numbers[0], [photo.path for photo in photos])
        save_png(page, out / SHEET)
    return judgement


def _draw(
    pipe: Any,
    one: Contestant | None,
    album: Album,
    jobs: Sequence[tuple[str, int]],
    drawing: Drawing,
    batch_size: int,
    progress: Progress | None,
) -> None:
    if not album.missing(jobs):
        return
    name = BASE if one is None else one.name
    try:
        if one is None:
            album.draw(pipe, jobs, drawing, batch_size, progress, f"draw with {name}")
            return
        with one.put_on(pipe):
            album.draw(pipe, jobs, drawing, batch_size, progress, f"draw with {name}")
    except KeyboardInterrupt as interrupt:
        left = len(album.missing(jobs))
        interrupt.args = (
            f"{len(jobs) - left} of {len(jobs)} pictures of {name} are kept, and all before; the same command goes on",
        )
        raise


def _judged(
    jury: Jury,
    albums: Mapping[str, Album],
    texts: Mapping[str, list[str]],
    subjects: Mapping[str, str],
    contestants: Sequence[Contestant],
    seeds: tuple[int, ...],
    progress: Progress | None,
) -> Judgement:
    base = jury.see(albums[BASE], texts[BASE], seeds, progress, f"look at {BASE}")
    values: dict[str, dict[str, Tensor]] = {BASE: jury.values(base, None)}
    for one in contestants:
        seen = jury.see(albums[one.name], texts[one.name], seeds, progress, f"look at {one.name}")
        values[one.name] = jury.values(seen, base)
    leaders = _leaders({one.name: values[one.name] for one in contestants})
    by_name = {one.name: one for one in contestants}
    rows = []
    for name, found in values.items():
        cost, plain = albums[name].cost, albums[BASE].cost
        alike = (cost.device, cost.batch_size) == (plain.device, plain.batch_size)
        rows.append(
            JudgedRow(
                name=name,
                subject=subjects[name],
                scores={key: metrics.estimate(value) for key, value in found.items()},
                per_prompt={key: value.mean(1).tolist() for key, value in found.items()},
                cost=cost,
                best=tuple(leaders.get(name, ())),
                bytes=by_name[name].bytes if name in by_name else None,
                train_seconds=by_name[name].seconds if name in by_name else None,
                speed=_ratio(cost.per_picture, plain.per_picture) if alike and name != BASE else None,
            )
        )
    return Judgement(
        base="",
        class_word="",
        photos=len(next(iter(jury.photos.values()))),
        rows=tuple(rows),
        ceiling=jury.ceiling(),
        other_seeds=jury.other_seeds(base),
        missing=missing_scores(jury.encoders, len(seeds)),
        encoders={key: one.name for key, one in jury.encoders.items()},
        prompts=(),
        retention_prompts=(),
        seeds=seeds,
    )


def _leaders(values: Mapping[str, Mapping[str, Tensor]]) -> dict[str, list[str]]:
    """Contestant -> scores in which it is best, or cannot be told from the best; nothing for a single one."""
    found: dict[str, list[str]] = {name: [] for name in values}
    for key in (key for key, kind in KINDS.items() if kind.better and len(values) > 1):
        there = {name: KINDS[key].better * own[key] for name, own in values.items() if key in own}
        if there and next(iter(there.values())).numel() > 1:
            best = max(there.values(), key=lambda x: float(x.mean()))
            for name, own in there.items():
                if own is best or metrics.as_good(own, best):
                    found[name].append(key)
    return found


def _ratio(seconds: float | None, of: float | None) -> float | None:
    return seconds / of if seconds and of else None


def named(contestants: Sequence[Contestant]) -> list[Contestant]:
    """With names that differ, also as folders, and are not the base's.

    Raises:
        DataError: there is none.
    """
    if not contestants:
        raise DataError("there is no adapter to judge; give at least one")
    taken, made = {BASE}, []
    for one in contestants:
        name, number = one.name, 2
        while folder_name(name) in taken:
            name, number = f"{one.name}_{number}", number + 1
        taken.add(folder_name(name))
        made.append(replace(one, name=name))
    return made


def folder_name(name: str) -> str:
    """A contestant's name as that of a folder."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name).lstrip(".") or "adapter"


def check_folder(out: Path) -> None:
    """Raise CheckpointError where a judgement would be put among other things."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"'{out}' is a file; choose a directory with --out")
    if out.is_dir() and any(out.iterdir()) and not any(out.glob("*/album.json")):
        raise CheckpointError(f"'{out}' holds something else than a judgement; choose another --out")


def pipeline_settings(pipe: Any, drawing: Drawing) -> dict[str, Any]:
    """What decides how the base draws, beside prompt and seed, as plain data."""
    scheduler = getattr(pipe, "scheduler", None)
    config = json.loads(json.dumps(dict(getattr(scheduler, "config", {})), default=str))
    return {
        "pipeline": type(pipe).__name__,
        "weights": _sampled(pipe),
        "scheduler": f"{type(scheduler).__name__} {digest(config)[:16]}",
        "precision": str(getattr(pipe, "dtype", "")).removeprefix("torch."),
        **asdict(drawing),
    }


def _sampled(pipe: Any) -> str:
    """A digest of every tensor's name and shape and of some of its numbers: another base is noticed at once."""
    sha = hashlib.sha256()
    for part, module in sorted(pipe.components.items()):
        if not isinstance(module, nn.Module):
            continue
        for name, tensor in sorted(module.state_dict().items()):
            sha.update(f"{part}.{name} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().flatten()
            picked = flat[:: max(1, flat.numel() // _SAMPLE)]
            sha.update(picked.to("cpu", torch.float32).numpy().tobytes())
    return sha.hexdigest()[:16]
