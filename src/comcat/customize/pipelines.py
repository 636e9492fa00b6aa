"""Opening a text-to-image pipeline by its directory or name on the Hub."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


#: A file of weights, whole or one of several; one of the groups is its variant.
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?\.safetensors")


def open_pipeline(
    base: str,
    precision: str = "no",
    device: torch.device | str = "cpu",
    variant: str | None = None,
    note: Callable[[str], None] | None = None,
    denoiser: str | Path | None = None,
) -> Any:
    """A diffusers pipeline in evaluation mode, weights in the dtype of ``precision``.

    A directory is read without the network. Pickled weights are never read.

    Args:
        variant: of the weights, e.g. fp16. Where a directory holds one variant only, that is taken, and ``note`` (or a
            warning) says so.
        denoiser: directory of a compressed one, from ``comcat compress --component``, in place of the pipeline's own.

    Raises:
        ModelError: there is no such pipeline, it has no safetensors weights, or the denoiser is not of it.
        CheckpointError: the directory of the denoiser is damaged.
    """
    try:
        import diffusers
        from packaging.version import Version
    except ImportError as error:
        raise ModelError("customization needs another package. Install it: pip install 'comcat[customize]'") from error
    path = Path(base)
    if path.is_file():
        raise ModelError(f"'{base}' is a single file; give a directory in diffusers' layout or a name on the Hub")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ModelError(f"'{base}' is no pipeline: it has no model_index.json. Give a directory in diffusers' layout")
    if not path.is_dir() and (base.startswith((".", "/", "~")) or base.count("/") != 1):
        raise ModelError(f"there is no directory '{base}'; give a pipeline's directory or a name on the Hub, user/name")
    found = variants(path)
    if variant is not None and found and variant not in found:
        there = f"there is {' and '.join(sorted(v for v in found if v)) or 'none'}"
        raise ModelError(
            f"'{base}' has no variant {variant!r} of its weights ({there}); leave --variant out or name another"
        )
    if variant is None and len(found) == 1 and None not in found:
        (variant,) = found
        (note or _warn)(f"'{base}' holds the variant {variant} of the weights only, which is taken")
    renamed = Version(diffusers.__version__) >= Version("0.42")
    dtype: dict[str, Any] = {"dtype" if renamed else "torch_dtype": DTYPES[precision]}
    try:
        with quiet_loading():
            pipe: Any = diffusers.DiffusionPipeline.from_pretrained(
                base, use_safetensors=True, local_files_only=path.is_dir(), variant=variant, **dtype
            )
    except Exception as error:  # what the libraries raise differs by what is missing
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the pipeline '{base}' cannot be opened: {cause.rstrip('.')}. Give a whole one with safetensors weights "
            f"({_advice(variant, found)}pickled ones are never read)"
        ) from error
    if denoiser is not None:
        from ..denoisers.pipeline_parts import put

        put(pipe, denoiser)
    pipe.to(device)
    return pipe


def variants(path: Path) -> set[str | None]:
    """Those variants that a pipeline's directory holds of every component with weights; None: the plain ones.

    Empty for what is no directory, or where no variant has all.
    """
    parts: list[set[str | None]] = []
    for folder in sorted(path.iterdir()) if path.is_dir() else ():
        names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        own = {match[1] or match[2] for name in names if (match := _WEIGHTS.fullmatch(name))}
        if own:
            parts.append(own)
    plain: set[str | None] = {None}
    named = set[str | None]().union(*parts) - plain
    # A variant may be that of some components; the others are taken as they are.
    found = {v for v in named if all(v in own or None in own for own in parts)}
    return found | (plain if parts and all(None in own for own in parts) else set())


def _advice(variant: str | None, found: set[str | None]) -> str:
    if variant is not None:
        return "leave --variant out if there is none; "
    named = sorted(v for v in found if v)
    return (
        f"of variants there is {', '.join(named)}: choose with --variant; " if named else "a variant: --variant fp16; "
    )


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars and remarks of diffusers and transformers over the loading of a pipeline."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: list[Any] = [diffusers_logging, transformers_logging]
    before = [(library, library.is_progress_bar_enabled(), library.get_verbosity()) for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity(logging.CRITICAL)  # what fails is said in the error
    try:
        yield
    finally:
        for library, bars, verbosity in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
