"""The most memory that is used at a time while something runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """``bytes`` is None until the end, and where it cannot be told."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: Any) -> Iterator[Peak]:
    """What PyTorch has allocated on a CUDA ``device``; elsewhere the resident memory of this process, on Linux."""
    device = torch.device(device)
    found = Peak()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    known = on_gpu or _reset()
    try:
        yield found
    finally:
        if known:
            found.bytes = torch.cuda.max_memory_allocated(device) if on_gpu else _high_water()


def _reset() -> bool:
    """Let the kernel count anew; whether it does."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> int | None:
    match = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else None
