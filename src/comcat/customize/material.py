"""What a run learns from: photos of the concept, images of its class, and the word for it. All checks come first."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import atomic_file
from ..progress import Progress
from .config import CustomizeConfig
from .families import Family
from .generate import generate, has_token
from .photos import METADATA, Bucket, Photo, buckets, check_sizes, find_photos
from .pictures import save_png

#: A word that stands for something new: V*, <dog>.
_PLACEHOLDER = re.compile(r"(?<!\S)(?:[\w-]+\*|<[\w-]+>)(?!\w)")

_DRAWN = 4  # class images at a time
_RECIPE = ".recipe.json"  # how they were drawn

Note = Callable[[str], None]


def find_token(captions: Sequence[str]) -> str | None:
    """The placeholder that the captions share, e.g. ``V*``.

    Raises:
        DataError: they hold different ones.
    """
    found = list(dict.fromkeys(word for caption in captions for word in _PLACEHOLDER.findall(caption)))
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
        _generate_class(family, config, prompt, folder, resolution, progress)
    place = given if given is not None else folder
    assert place is not None
    found = find_photos(place, prompt, note=note)
    check_sizes(found, resolution, multiple=family.multiple, max_ratio=config.buckets, allow_upscale=allow_upscale)
    return found


def _drop_others(folder: Path, recipe: list[Any]) -> None:
    """Drop images that an earlier run has drawn in another way."""
    text, path = json.dumps(recipe), folder / _RECIPE
    if path.is_file() and path.read_text() == text:
        return
    for image in folder.glob("[0-9]*.png"):
        image.unlink()
    with atomic_file(path) as file:
        file.write(text.encode())


def _generate_class(
    family: Family, config: CustomizeConfig, prompt: str, folder: Path, resolution: int, progress: Progress | None
) -> None:
    """Draw the images that are not there yet, in fixed batches of fixed seeds: an interrupted start goes on alike."""
    paths = [folder / f"{i:04d}.png" for i in range(config.num_class_images)]
    batches = [range(start, min(start + _DRAWN, len(paths))) for start in range(0, len(paths), _DRAWN)]
    missing = [batch for batch in batches if not all(paths[i].exists() for i in batch)]
    for done, batch in enumerate(missing, 1):
        images = generate(
            family.pipe,
            [prompt],
            seeds=[_class_seed(config.seed, i) for i in batch],
            steps=config.validation_steps,
            height=resolution,
            width=resolution,
            batch_size=_DRAWN,
        )[0]
        for i, image in zip(batch, images, strict=True):
            save_png(image, paths[i])
        if progress:
            progress("draw class images", done, len(missing))
    lines = "".join(json.dumps({"file_name": path.name, "text": prompt}) + "\n" for path in paths)
    with atomic_file(folder / METADATA) as file:
        file.write(lines.encode())


def _class_seed(seed: int, index: int) -> int:
    return int.from_bytes(hashlib.sha256(f"class {seed} {index}".encode()).digest()[:6], "big")


def identity(photos: Sequence[Photo]) -> dict[str, str]:
    """What a resumed run must find again: name -> caption and content of its photos."""
    return {p.path.name: f"{p.caption} ({hashlib.sha256(p.path.read_bytes()).hexdigest()[:16]})" for p in photos}
