"""Narrow projections in an attention layer whose forward stays the host's own.

    x -- HeadProjection -- q', k', v' of widths r, then zeros -- the host's attention -- HeadOutput drops them -- out

Zero columns change no score and no value, so masks, windows, caches and attention back-ends go on as they are. Where
the host takes the width of a head from an attribute, it is told the narrower one, and the padding is only up to the
wider of queries and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import plain_linear


class HeadProjection(nn.Module):
    """A linear layer for the heads of one or several of query, key and value, each narrower than the host expects.

    Args:
        in_features: D; heads: how many heads each role has; narrow: widths that are computed; wide: widths that are put
            out, zeros behind.
        by_head: the output holds all roles of head 0, then all of head 1, and so on; else one role after the other.
        placed: for the first role(s), how many have rows (of all their heads) whose components go to places of their
            own (``places``, a buffer) instead of to the front; the others' are padded.
    """

    places: Tensor | None

    def __init__(
        self,
        in_features: int,
        heads: Sequence[int],
        narrow: Sequence[int],
        wide: Sequence[int],
        by_head: bool = False,
        bias: bool = True,
        placed: Sequence[bool] | None = None,
        pointwise: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.narrow, self.wide = tuple(heads), tuple(narrow), tuple(wide)
        self.by_head = by_head
        self.placed = tuple(placed or [False] * len(self.heads))
        rows = sum(h * r for h, r in zip(self.heads, self.narrow, strict=True))
        self.linear = plain_linear(in_features, rows, bias, pointwise, device, dtype)
        self.register_buffer("places", None)
        if any(self.placed):
            count = sum(h * r for h, r, p in zip(self.heads, self.narrow, self.placed, strict=True) if p)
            self.register_buffer("places", torch.zeros(count, dtype=torch.int64, device=device))

    @property
    def in_features(self) -> int:
        """Input width, as the host may ask."""
        return self.linear.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Output width, as the host may ask."""
        return sum(h * w for h, w in zip(self.heads, self.wide, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., sum of heads times wide); (B, D, H, W) for a 1x1 convolution."""
        rows = self.linear(x)
        if self.narrow == self.wide and self.places is None:
            return rows
        axis = 1 if isinstance(self.linear, nn.Conv2d) else -1
        if axis == 1:
            rows = rows.movedim(1, -1)
        if self.by_head:
            parts = rows.unflatten(-1, (self.heads[0], -1)).split(self.narrow, -1)
        else:
            sizes = [h * r for h, r in zip(self.heads, self.narrow, strict=True)]
            parts = tuple(p.unflatten(-1, (h, -1)) for p, h in zip(rows.split(sizes, -1), self.heads, strict=True))
        out = self._widened(parts)
        joined = torch.cat(out, -1).flatten(-2) if self.by_head else torch.cat([p.flatten(-2) for p in out], -1)
        return joined.movedim(-1, 1) if axis == 1 else joined

    def _widened(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """(..., heads, narrow) each, to (..., heads, wide)."""
        out, start = [], 0
        for part, heads, narrow, wide, placed in zip(
            parts, self.heads, self.narrow, self.wide, self.placed, strict=True
        ):
            if placed:
                assert self.places is not None
                index = self.places[start : start + heads * narrow].view(heads, narrow)
                start += heads * narrow
                zeros = part.new_zeros(*part.shape[:-1], wide)
                out.append(zeros.scatter(-1, index.expand_as(part), part))
            else:
                out.append(F.pad(part, (0, wide - narrow)) if wide > narrow else part)
        return out

    def extra_repr(self) -> str:
        return f"heads={self.heads}, narrow={self.narrow}, wide={self.wide}"


class HeadOutput(nn.Module):
    """The output projection behind heads of which only the first ``narrow`` components hold anything."""

    def __init__(self, linear: Any, heads: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.linear = linear
        self.heads, self.narrow, self.wide = heads, narrow, wide

    @property
    def in_features(self) -> int:
        """Input width, as the host may ask."""
        return self.heads * self.wide

    @property
    def out_features(self) -> int:
        """Output width, as the host may ask."""
        return int(self.linear.weight.shape[0])

    def forward(self, z: Tensor) -> Tensor:
        """(..., heads * wide) to (..., D_out); (B, heads * wide, H, W) for a 1x1 convolution."""
        if self.narrow == self.wide:
            return self.linear(z)
        if isinstance(self.linear, nn.Conv2d):
            return self.linear(z.unflatten(1, (self.heads, self.wide))[:, :, : self.narrow].flatten(1, 2))
        return self.linear(z.unflatten(-1, (self.heads, self.wide))[..., : self.narrow].flatten(-2))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, narrow={self.narrow}, wide={self.wide}"
