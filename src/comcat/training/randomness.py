"""Random numbers that depend on what they are for, not on what was drawn before.

What reads the data draws from generators seeded by (seed, epoch, index) and the like, inside :func:`isolated`; what the
model draws (dropout, stochastic depth) comes from the process's own generators, whose state a checkpoint holds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What a seed is for comes first in its key, so that no two uses share a stream.
SAMPLE, EPOCH, MIXUP, PROCESS = range(4)


def seed_all(*key: int) -> None:
    """Seed Python's, NumPy's and PyTorch's CPU generator from a key of non-negative integers."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words)  # noqa: NPY002 - timm draws from the global generator
    # Not torch.manual_seed: before CUDA is initialized that queues a seed for it at every call.
    torch.default_generator.manual_seed(int(words[2]) << 32 | int(words[3]))


@contextmanager
def isolated(*key: int) -> Iterator[None]:
    """Everything random inside depends on ``key`` alone, and nothing outside notices."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    pytorch = torch.default_generator.get_state()
    seed_all(*key)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.default_generator.set_state(pytorch)


def get_state(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of this process's generators, as tensors and as plain data."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor(np.asarray(keys, dtype=np.int64)),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return tensors, {"python": [version, gauss], "numpy": [str(name), int(position), int(has_gauss), float(cached)]}


def set_state(tensors: dict[str, Tensor], plain: dict[str, Any], device: torch.device) -> None:
    """Put back what :func:`get_state` returned."""
    version, gauss = plain["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    name, position, has_gauss, cached = plain["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
