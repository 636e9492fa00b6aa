"""Rows of numbers as bytes: floats, eight bits and four, and back.

    int8   one scale of float16 for a row, then one byte for every number
    nf4    one scale of float16 for at most 128 numbers, then half a byte for every number

NF4 (QLoRA, arXiv 2305.14314, appendix E): the sixteen quantiles of a normal distribution. Its scale is not the largest
number but the one, of a few, with the smallest squared error.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Storage = Literal["float32", "float16", "bfloat16", "int8", "nf4"]

#: Numbers that share a scale. A trained row of a few hundred hardly gains by more of them; an outlier is held in place.
GROUP = 128
_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
#: Shares of the largest number that are tried as a scale; below zero too, for the levels are no mirror image.
_SCALES = tuple(sign * x / 20 for x in range(12, 22) for sign in (1, -1))


def row_bytes(width: int, storage: Storage) -> int:
    """Bytes of a row of ``width`` numbers."""
    if storage == "nf4":
        return 2 * -(-width // GROUP) + -(-width // 2)
    if storage == "int8":
        return 2 + width
    return width * getattr(torch, storage).itemsize


def encode_rows(rows: Tensor, storage: Storage) -> Tensor:
    """(n, D) to (n, bytes) of uint8."""
    if storage == "nf4":
        return _encode_nf4(rows.to(torch.float32))
    if storage == "int8":
        rows = rows.to(torch.float32)
        # The scale is rounded up, so that no number lies beyond 127 of it.
        scale = (rows.abs().amax(1, keepdim=True) / 127 * (1 + 2.0**-10)).to(torch.float16)
        numbers = (rows / _divisor(scale)).round().clamp(-127, 127).to(torch.int8)
        return torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], 1)
    return rows.to(getattr(torch, storage)).contiguous().view(torch.uint8)


def decode_rows(content: Tensor, width: int, storage: Storage) -> Tensor:
    """(n, bytes) of uint8 to (n, D): float32 for int8 and nf4, otherwise as stored."""
    if storage == "nf4":
        return _decode_nf4(content, width)
    if storage == "int8":
        return _viewed(content[:, 2:], torch.int8).float() * _viewed(content[:, :2], torch.float16).float()
    return _viewed(content, getattr(torch, storage))


def _viewed(content: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers, wherever they lie and however few they are."""
    return content.flatten().clone().view(dtype).view(len(content), content.shape[1] // dtype.itemsize)


def _encode_nf4(rows: Tensor) -> Tensor:
    width = rows.shape[1]
    groups = _grouped(rows)  # (n, G, g)
    largest = groups.abs().amax(-1, keepdim=True)
    levels = torch.tensor(_LEVELS)
    edges = (levels[1:] + levels[:-1]) / 2
    best = (torch.full_like(largest, torch.inf), largest.half(), groups.new_zeros(groups.shape, dtype=torch.uint8))
    for share in _SCALES:
        scale = (largest * share).to(torch.float16)
        codes = torch.bucketize(groups / _divisor(scale), edges)
        error = (levels[codes] * scale.float() - groups).square().sum(-1, keepdim=True)
        wins = error < best[0]  # False where the scale is beyond float16: the first one stays, and is noticed
        new = (error, scale, codes.to(torch.uint8))
        best = tuple(torch.where(wins, a, b) for a, b in zip(new, best, strict=True))  # type: ignore[assignment]
    codes = best[2].flatten(1)[:, :width]
    codes = torch.nn.functional.pad(codes, (0, width % 2)).unflatten(1, (-1, 2))
    return torch.cat([best[1].flatten(1).contiguous().view(torch.uint8), codes[..., 0] | codes[..., 1] << 4], 1)


def _decode_nf4(content: Tensor, width: int) -> Tensor:
    count = -(-width // GROUP)
    scales = _viewed(content[:, : 2 * count], torch.float16).float()
    codes = content[:, 2 * count :]
    codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, :width]
    numbers = torch.tensor(_LEVELS)[codes.long()]
    return (_grouped(numbers) * scales[..., None]).flatten(1)[:, :width]


def _grouped(rows: Tensor) -> Tensor:
    """(n, D) to (n, G, at most 128), zeros at the end."""
    width = rows.shape[1]
    size = min(width, GROUP)
    return torch.nn.functional.pad(rows, (0, -width % size)).unflatten(1, (-1, size))


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale.float())
