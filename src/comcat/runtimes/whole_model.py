"""A whole model in a runtime, as a user would bring it there; and what it is called with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..exporting.exporter import export
from ..exporting.formats import file_format
from ..models.example import example_for
from ..models.profile import default_input_size
from .registry import FORMATS, held_precision, session
from .sessions import Session


def whole_session(
    model: nn.Module, runtime: str, precision: str, threads: int | None, folder: Path, name: str = "model"
) -> Session:
    """A session of a model, through a file as :func:`comcat.export` writes it where the runtime reads files.

    Args:
        folder: for that file; name: of it, without its ending.

    Raises:
        ExportError: the model cannot be written for this runtime.
        ComcatError: as for :func:`comcat.runtimes.session`.
    """
    if runtime not in FORMATS:
        return session(model, runtime, precision, threads)
    to = FORMATS[runtime]
    path = folder / f"{name}{file_format(to).suffix}"
    held = held_precision(runtime, precision)
    how: dict[str, Any] = {}
    if held == "int8":  # for its time alone: all layers that can be, on any images
        pixels = torch.randn(8, *default_input_size(model), generator=torch.Generator().manual_seed(0))
        how = {"images": pixels, "tolerance": math.inf, "int8_tolerance": math.inf}
    export(model, path, to=to, precision=held, overwrite=True, **how)
    return session(path, runtime, precision, threads)


def random_inputs(model: nn.Module, size: Sequence[int], batch_size: int) -> list[np.ndarray]:
    """A batch of random images of a size (C, H, W), and what else the model takes, in the order of its call."""
    example = example_for(model, size, batch_size, seed=0)
    values: list[Any] = [*example.args, *example.kwargs.values()]
    return [value.float().cpu().numpy() if value.is_floating_point() else value.cpu().numpy()
            for value in values if isinstance(value, Tensor)]  # fmt: skip
