"""What surrounds a training run: the base comes out as it went in, and a lack of memory is explained."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...errors import ModelError, TrainingError
from ...models import modes
from ...models.running import out_of_memory
from ..adapter.components import denoiser


@contextlib.contextmanager
def frozen_pipeline(pipe: Any) -> Iterator[None]:
    """No weight of the base wants a gradient inside; modes, flags and gradient checkpointing come back as they were."""
    model: Any = denoiser(pipe)[1]
    checkpointing = bool(getattr(model, "is_gradient_checkpointing", False))
    with contextlib.ExitStack() as stack:
        for part in pipe.components.values():
            if isinstance(part, nn.Module):  # T5 and the VAE too
                stack.enter_context(modes.frozen(part))
        try:
            yield
        finally:
            if not checkpointing and getattr(model, "is_gradient_checkpointing", False):
                model.disable_gradient_checkpointing()


@contextlib.contextmanager
def placed_pipeline(pipe: Any, device: torch.device) -> Iterator[None]:
    """The pipeline on ``device``; every part is back where it was, and of the dtype it had, afterwards.

    Raises:
        ModelError: it cannot be moved, e.g. because it is offloaded.
    """
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    homes = {name: (p.device, p.dtype) for name, part in parts.items() for p in itertools.islice(part.parameters(), 1)}
    try:
        pipe.to(device)
    except (ValueError, NotImplementedError) as error:  # hooks of Accelerate, a device map, quantized weights
        raise ModelError(
            f"the pipeline cannot be moved to {device} for training: {error}. Open it without offloading, device map "
            "and quantization"
        ) from error
    try:
        yield
    finally:
        for name, (home, dtype) in homes.items():
            first = next(parts[name].parameters())
            if first.device != home:
                parts[name].to(home)
            if first.dtype != dtype:
                parts[name].to(dtype)


@contextlib.contextmanager
def explained_memory() -> Iterator[None]:
    """Say what helps where memory runs out.

    Raises:
        TrainingError: it has.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise TrainingError(
            "out of memory. Turn on --grad-checkpointing and --precision bf16, lower --resolution, or use a smaller "
            "--batch-size with --accumulate"
        ) from error
