"""Images per second."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

from ..models.modes import exclusive
from ..models.running import explained
from .inference import inference, now
from .outputs import Forward


def throughput(
    models: Sequence[nn.Module],
    images: torch.Tensor,
    seconds: float = 2.0,
    forwards: Sequence[Forward | None] | None = None,
) -> list[float]:
    """Images per second of each model, measured in turns, so that a busy machine slows all of them alike.

    Args:
        models: all on one device.
        images: one batch, (B, C, H, W).
        seconds: time to spend on all models together, after one pass each to warm up; at least three turns.
        forwards: how each is called, where ``model(images)`` is not what is wanted.

    Returns:
        The speed at the median time per batch, for each model.
    """
    calls = [None] * len(models) if forwards is None else forwards
    times: list[list[float]] = [[] for _ in models]
    with exclusive(*models), contextlib.ExitStack() as stack:
        places = [stack.enter_context(inference(model, None)) for model in models]
        begin = time.perf_counter()
        while len(times[0]) < 4 or time.perf_counter() - begin < seconds:
            for model, call, (device, dtype), spent in zip(models, calls, places, times, strict=True):
                batch = images.to(device, dtype)
                start = now(device)
                with explained(batch):
                    model(batch) if call is None else call(model, batch)
                spent.append(now(device) - start)
    return [len(images) / max(statistics.median(spent[1:]), 1e-9) for spent in times]
