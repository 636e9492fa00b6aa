"""The pipelines of digits, trained once and kept: read from a cache whose every byte is checked, or made anew."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from comcat.customize.pipelines import quiet_loading
from comcat.errors import CheckpointError
from comcat.progress import Progress
from comcat.storage import temporary
from comcat.storage.atomic import atomic_directory
from comcat.storage.owned import strangers
from comcat.storage.reader import read_json

from . import digits, scenes
from .layouts import DIGITS_CACHE

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

# Parts of the names in the cache: count up whenever the weights would come out differently.
_RECIPE = 1
_SCENES_RECIPE = 1
_MANIFEST = "digits.json"


def load_or_train(
    cache: str | Path | None = None,
    left_out: int = digits.LEFT_OUT,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    vae_steps: int = 400,
    steps: int = 1000,
) -> StableDiffusionPipeline:
    """The trained pipeline of :mod:`.digits`: read from ``cache``, or trained and written there.

    Args:
        cache: the folder of all recipes and seeds; by default ``comcat`` in $XDG_CACHE_HOME or ~/.cache.
        progress: as :func:`digits.train` calls it.

    Raises:
        ComcatError: a package is missing, or the cache cannot be written; the latter before the training.
    """

    def make() -> StableDiffusionPipeline:
        pipe = digits.build(seed)
        digits.train(pipe, left_out, vae_steps=vae_steps, steps=steps, seed=seed, progress=progress)
        return pipe

    return _kept(cache, f"digits-{_RECIPE}-without-{left_out}-seed-{seed}-steps-{vae_steps}-{steps}", make)


def load_or_train_scenes(
    cache: str | Path | None = None,
    left_out: Sequence[int] = scenes.LEFT_OUT,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    vae_steps: int = 450,
    steps: int = 1400,
) -> StableDiffusionPipeline:
    """The same for the pipeline of :mod:`.scenes`."""
    out = sorted(set(left_out))

    def make() -> StableDiffusionPipeline:
        pipe = scenes.build_scenes(seed)
        scenes.train_scenes(pipe, out, vae_steps=vae_steps, steps=steps, seed=seed, progress=progress)
        return pipe

    names = "-".join(map(str, out))
    return _kept(cache, f"scenes-{_SCENES_RECIPE}-without-{names}-seed-{seed}-steps-{vae_steps}-{steps}", make)


def _kept(cache: str | Path | None, name: str, make: Callable[[], StableDiffusionPipeline]) -> StableDiffusionPipeline:
    folder = _cache_home(cache) / name
    try:
        from diffusers import StableDiffusionPipeline
    except ImportError as e:
        raise digits.missing_packages() from e
    with quiet_loading():
        if not _is_intact(folder):
            if folder.is_dir() and not strangers(folder, DIGITS_CACHE):
                temporary.remove(folder)  # another version's, or damaged
            with atomic_directory(folder) as new:
                make().save_pretrained(new)
                (new / _MANIFEST).write_text(json.dumps(_checksums(new), indent=1))
        # Read back also what was just trained, so that the first run gives what all others do.
        pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _cache_home(cache: str | Path | None) -> Path:
    if cache is not None:
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "comcat"


def _checksums(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file but the manifest."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != _MANIFEST)
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def _is_intact(folder: Path) -> bool:
    try:
        return bool(read_json(folder / _MANIFEST) == _checksums(folder))
    except (CheckpointError, OSError):
        return False
