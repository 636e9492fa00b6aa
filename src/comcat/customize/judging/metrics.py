"""What is measured, on normalized embeddings: cosines between pictures, photos and texts, and their uncertainty.

    concept fidelity   mean cosine of a picture to every photo                DINO, CLIP-I of DreamBooth (2208.12242)
    ceiling            the same of every photo to all others                  what the subject itself reaches
    prompt fidelity    cosine of a picture to its prompt                      CLIP-T of DreamBooth
    retention          cosine of a picture to the base's, same prompt, seed   1: nothing else has changed
    diversity          1 - mean cosine among the pictures of one prompt       0: always the same picture

Pictures are (P, N, D): prompts, seeds, numbers of the embedding. Values are kept per picture, so that two adapters are
compared picture by picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_RESAMPLES = 2000
_NUMBERS = 1_000_000  # of resamples in memory
_LEVEL = 95  # percent


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; ``low`` and ``high`` are None where there is only one value."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def margin(self) -> float | None:
        """Half of the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def to_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "low": self.low, "high": self.high}


def to_photos(pictures: Tensor, photos: Tensor) -> Tensor:
    """(P, N): mean cosine of every picture to the (M, D) photos."""
    return (pictures @ photos.mT).mean(-1)


def among_photos(photos: Tensor) -> float | None:
    """Mean cosine of every photo to all others; None for fewer than two."""
    return _others(photos).item() if len(photos) > 1 else None


def to_texts(pictures: Tensor, texts: Tensor) -> Tensor:
    """(P, N): cosine of every picture to the text of its prompt, (P, D)."""
    return torch.einsum("pnd,pd->pn", pictures, texts)


def to_pictures(pictures: Tensor, others: Tensor) -> Tensor:
    """(P, N): cosine of every picture to the one of the same prompt and seed."""
    return (pictures * others).sum(-1)


def diversity(pictures: Tensor) -> Tensor | None:
    """(P, 1): 1 - mean cosine among the pictures of every prompt; None for one picture a prompt."""
    return 1 - _others(pictures)[:, None] if pictures.shape[1] > 1 else None


def _others(x: Tensor) -> Tensor:
    """(...,): mean cosine of (..., N, D) to each other, every one to itself left out."""
    count = x.shape[-2]
    products = x @ x.mT
    own = products.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (products.sum((-2, -1)) - own) / (count * (count - 1))


def estimate(values: Tensor, seed: int = 0) -> Estimate:
    """The mean of (P, N) values, with the interval of a bootstrap over prompts, and over seeds within each."""
    table = values.double().numpy()
    rows, columns = table.shape
    if table.size == 1:
        return Estimate(float(table[0, 0]))
    random = np.random.default_rng(seed)
    means = []
    at_once = max(1, _NUMBERS // table.size)
    for start in range(0, _RESAMPLES, at_once):
        count = min(at_once, _RESAMPLES - start)
        picked = random.integers(rows, size=(count, rows, 1))
        means.append(table[picked, random.integers(columns, size=(count, rows, columns))].mean((1, 2)))
    low, high = np.percentile(np.concatenate(means), [50 - _LEVEL / 2, 50 + _LEVEL / 2])
    return Estimate(float(table.mean()), float(low), float(high))


def as_good(values: Tensor, best: Tensor, seed: int = 0) -> bool:
    """Whether (P, N) values cannot be told from the ``best`` of the same pictures: 0 is within their difference."""
    found = estimate(values - best, seed)
    return found.low is None or found.high is None or found.low <= 0 <= found.high
