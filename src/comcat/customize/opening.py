"""Opening a text-to-image pipeline by its directory or name on the Hub."""

from __future__ import annotations

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
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ModelError("customization needs another package. Install it: pip install 'comcat[customize]'") from error
    path = Path(base)
    if path.is_file():
        raise ModelError(f"'{base}' is a single file; give a directory in diffusers' layout or a name on the Hub")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ModelError(f"'{base}' is no pipeline: it has no model_index.json. Give a directory in diffusers' layout")
    if not path.is_dir() and (base.startswith((".", "/", "~")) or base.count("/") != 1):
        raise ModelError(f"there is no directory '{base}'; give a pipeline's directory or a name on the Hub, user/name")
    try:
        pipe: Any = DiffusionPipeline.from_pretrained(
            base,
            torch_dtype=DTYPES[precision],
            use_safetensors=True,
            local_files_only=path.is_dir(),
            variant=variant,
        )
    except Exception as error:  # what the libraries raise differs by what is missing
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"the pipeline '{base}' cannot be opened: {cause}") from error
    pipe.to(device)
    return pipe
