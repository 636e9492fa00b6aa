"""What a run learns from: photos of the concept, images of its class, and the word for it. All checks come first."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import DataError
from ...progress import Progress
from ...storage.atomic import atomic_file
from ...storage.manifest import Manifest
from ...wording import some
from ..adapter.words import has_token, placeholders
from ..generation import FLAGGED, generate
from ..pictures import as_png, is_black
from .customize_config import CustomizeConfig
from .families import Family
from .photos import METADATA, Bucket, Photo, buckets, check_sizes, find_photos

_DRAWN = 4  # class images at a time
_TRIES = 5  # to draw one that is not black
_RECIPE = ".recipe.json"  # how they were drawn

Note = Callable[[str], None]


def find_token(captions: Sequence[str]) -> str | None:
    """The placeholder that the captions share, e.g. ``V*``.

    Raises:
        DataError: they hold different ones.
    """
    found = list(dict.fromkeys(word for caption in captions for word in placeholders(caption)))
    if len(found) > 1:
        raise DataError(
            f"the captions hold several new words, {' and '.join(found[:3])}; say which to learn with --token"
        )
    return found[0] if found else None


def check_token(photos: Sequence[Photo], token: str, class_prompt: str | None = None) -> None:
    """Raise DataError for photos whose caption does not have the word that they are to teach, or a class that has."""
    lacking = [photo for photo in photos if not has_token(photo.caption, token)]
    if lacking:
        raise DataError(
            f"the caption of '{lacking[0].path.name}', {lacking[0].caption!r}, does not have {token!r}, the word to be "
            f"learned ({len(lacking)} of {len(photos)} photos); write it into the caption, or into --prompt"
        )
    if class_prompt is not None and has_token(class_prompt, token):
        raise DataError(
            f"the class prompt {class_prompt!r} has {token!r}, the word to be learned; say what the concept is one of "
            "without it"
        )


def shapes_for(family: Family, config: CustomizeConfig) -> tuple[int, list[Bucket]]:
    """(resolution, buckets) of a run."""
    resolution = config.resolution or family.resolution
    return resolution, buckets(resolution, family.multiple, max_ratio=config.buckets)


def concept_photos(
    folder: Path,
    prompt: str | None,
    family: Family,
    config: CustomizeConfig,
    *,
    allow_upscale: bool,
    skip_bad: bool,
    note: Note,
) -> list[Photo]:
    """The photos of the concept, every one readable, captioned and large enough."""
    photos = find_photos(folder, prompt, skip_bad=skip_bad, note=note)
    resolution, _ = shapes_for(family, config)
    check_sizes(photos, resolution, multiple=family.multiple, max_ratio=config.buckets, allow_upscale=allow_upscale)
    return photos


def class_photos(
    family: Family,
    config: CustomizeConfig,
    prompt: str | None,
    given: Path | None,
    folder: Path | None,
    base: str = "",
    *,
    keep: bool = False,
    allow_upscale: bool,
    note: Note,
    progress: Progress | None,
) -> list[Photo]:
    """Images of the class that the concept belongs to, for prior preservation: given ones, or the model's own.

    Args:
        given: folder with images; folder: where to keep generated ones, so that a resumed run has the same.
        base: which model draws them; keep: those that are there belong to this run, whatever the settings are now.

    Raises:
        DataError: there is no place to keep generated images, or given ones cannot be used.
    """
    resolution, _ = shapes_for(family, config)
    if given is None:
        if prompt is None:
            return []
        if folder is None:
            raise DataError(
                "generated class images need a directory for the run; give out, or a folder of class images"
            )
        if not keep:
            recipe = [prompt, config.num_class_images, config.seed, config.validation_steps, resolution, base]
            _drop_others(folder, recipe)
        _generate_class(family, config, prompt, folder, resolution, progress, note)
    elif config.num_class_images != CustomizeConfig.num_class_images:
        note("num_class_images is how many to draw; the class images that are given are used as they are")
    place = given if given is not None else folder
    assert place is not None
    found = _without_black(find_photos(place, prompt, note=note, option="--class-prompt"), place, note)
    check_sizes(found, resolution, multiple=family.multiple, max_ratio=config.buckets, allow_upscale=allow_upscale)
    return found


def _drop_others(folder: Path, recipe: list[Any]) -> None:
    """Drop images that an earlier run has drawn in another way.

    Raises:
        DataError: others are there.
    """
    text, path = json.dumps(recipe), folder / _RECIPE
    if path.is_file() and path.read_text() == text:
        return
    manifest = Manifest(folder)
    drawn = [image.name for image in sorted(folder.glob("[0-9]*.png"))]
    for name in (*drawn, METADATA):
        if not manifest.knows(name):
            raise DataError(
                f"'{folder / name}' was not drawn by comcat, or was changed since, and class images would replace it; "
                "move it away, choose another directory for the run, or give the folder with --class-images"
            )
    for name in drawn:
        manifest.remove(name)
    with atomic_file(path) as file:
        file.write(text.encode())


def _generate_class(
    family: Family,
    config: CustomizeConfig,
    prompt: str,
    folder: Path,
    resolution: int,
    progress: Progress | None,
    note: Note,
) -> None:
    """Draw the images that are not there yet, in fixed batches of fixed seeds: an interrupted start goes on alike."""
    paths = [folder / f"{i:04d}.png" for i in range(config.num_class_images)]
    batches = [range(start, min(start + _DRAWN, len(paths))) for start in range(0, len(paths), _DRAWN)]
    manifest = Manifest(folder)
    missing = [batch for batch in batches if not all(_is_drawn(paths[i]) for i in batch)]
    for done, batch in enumerate(missing, 1):
        wanted = list(batch)
        for attempt in range(_TRIES):
            images = generate(
                family.pipe,
                [prompt],
                seeds=[_class_seed(config.seed, i, attempt) for i in wanted],
                steps=config.validation_steps,
                height=resolution,
                width=resolution,
                batch_size=_DRAWN,
            )[0]
            usable = [not (image.info.get(FLAGGED) or is_black(image)) for image in images]
            for i, image, good in zip(wanted, images, usable, strict=True):
                if good:
                    manifest.write(paths[i].name, as_png(image))
            wanted = [i for i, good in zip(wanted, usable, strict=True) if not good]
            if not wanted:
                break
        if done == 1 and len(wanted) == len(batch):  # all others would take as long and end as badly
            raise DataError(
                f"the class images of {prompt!r} come out black, or flagged by the pipeline's safety checker, with "
                f"{_TRIES} seeds each. Use another --class-prompt, give --class-images, or leave the class out; where "
                "all images are black, the VAE needs --precision bf16 or no"
            )
        if progress:
            progress("draw class images", done, len(missing))
    drawn = [path for path in paths if path.exists()]
    if len(drawn) < len(paths):
        note(
            f"{len(paths) - len(drawn)} of {len(paths)} class images came out black, or flagged by the safety checker, "
            f"with {_TRIES} seeds each, and are left out"
        )
    lines = "".join(json.dumps({"file_name": path.name, "text": prompt}) + "\n" for path in drawn)
    if not (folder / METADATA).is_file() or (folder / METADATA).read_bytes() != lines.encode():
        manifest.write(METADATA, lines.encode())


def _is_drawn(path: Path) -> bool:
    """Whether an image is there and is one to learn from; earlier versions kept black ones."""
    if not path.exists():
        return False
    with contextlib.suppress(OSError), Image.open(path) as image:
        return not is_black(image)
    return False


def _without_black(photos: list[Photo], place: Path, note: Note) -> list[Photo]:
    """Images without those that a safety checker has blackened."""
    black = []
    for photo in photos:
        with Image.open(photo.path) as image:
            if is_black(image):
                black.append(photo)
    if len(black) == len(photos):
        raise DataError(f"all class images in {place} are black, as a safety checker leaves them. Give others")
    if black:
        note(f"left out, as black as a safety checker leaves them: {some(repr(photo.path.name) for photo in black)}")
    return [photo for photo in photos if photo not in black]


def _class_seed(seed: int, index: int, attempt: int = 0) -> int:
    more = f" {attempt}" if attempt else ""
    return int.from_bytes(hashlib.sha256(f"class {seed} {index}{more}".encode()).digest()[:6], "big")


def identity(photos: Sequence[Photo]) -> dict[str, str]:
    """What a resumed run must find again: name -> caption and content of its photos."""
    return {p.path.name: f"{p.caption} ({hashlib.sha256(p.path.read_bytes()).hexdigest()[:16]})" for p in photos}
