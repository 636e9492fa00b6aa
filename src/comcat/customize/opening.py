"""Opening a text-to-image pipeline by its directory or name on the Hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_pipeline(
    base: str, precision: str = "no", device: torch.device | str = "cpu", variant: str | None = None
) -> Any:
    """A diffusers pipeline in evaluation mode, weights in the dtype of ``precision``.

    A directory is read without the network. Pickled weights are never read.

    Raises:
        ModelError: there is no such pipeline, or it has no safetensors weights.
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
            f"the pipeline '{base}' cannot be opened: {cause.rstrip('.')}. Give a whole one with safetensors weights; "
            "pickled ones are never read"
        ) from error
    pipe.to(device)
    return pipe


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars and remarks of diffusers and transformers over the loading of a pipeline."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: list[Any] = [diffusers_logging, transformers_logging]
    before = [(library, library.is_progress_bar_enabled(), library.get_verbosity()) for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, bars, verbosity in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
