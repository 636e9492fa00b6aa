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


class _AroundNarrow(nn.Module):
    """A narrow linear layer in the place of a wide one."""

    linear: Any
    heads: Any
    narrow: Any
    wide: Any
    places: Tensor | None

    @property
    def weight(self) -> Tensor:
        """Nothing (0,), of the dtype and on the device that hosts ask a linear layer's weight for."""
        empty: Tensor = self.linear.weight.detach().new_empty(0)
        return empty

    def extra_repr(self) -> str:
        return f"heads={self.heads}, narrow={self.narrow}, wide={self.wide}"


class HeadProjection(_AroundNarrow):
    """A linear layer for the heads of one or several of query, key and value, each narrower than the host expects.

    Args:
        in_features: D; heads: how many heads each role has; narrow: widths that are computed; wide: widths that are put
            out, zeros behind.
        by_head: the output holds all roles of head 0, then all of head 1, and so on; else one role after the other.
        placed: the components go to places of their own instead of to the front of their head: ``places`` (a buffer)
            holds, for every output, the row that it shows, or the number of rows for zero.
        full: widths in the dense layer, where the host has been told narrower ones; as ``wide`` by default.
    """

    def __init__(
        self,
        in_features: int,
        heads: Sequence[int],
        narrow: Sequence[int],
        wide: Sequence[int],
        by_head: bool = False,
        bias: bool = True,
        placed: bool = False,
        pointwise: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        full: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.narrow, self.wide = tuple(heads), tuple(narrow), tuple(wide)
        self.full = tuple(full or wide)
        self.by_head = by_head
        rows = sum(h * r for h, r in zip(self.heads, self.narrow, strict=True))
        self.linear = plain_linear(in_features, rows, bias, pointwise, device, dtype)
        self.register_buffer("places", None)
        if placed:
            zeros = torch.zeros(self.out_features, dtype=torch.int64, device=device)
            self.register_buffer("places", zeros)

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
        axis = 1 if isinstance(self.linear, nn.Conv2d) else -1
        if self.places is not None:
            padding = (0, 1) if axis == -1 else (0, 0, 0, 0, 0, 1)
            return F.pad(rows, padding).index_select(axis, self.places)
        if self.narrow == self.wide:
            return rows
        if axis == 1:
            rows = rows.movedim(1, -1)
        parts = zip(self._by_role(rows, self.narrow), self.narrow, self.wide, strict=True)
        joined = self._joined([F.pad(p, (0, w - r)) if w > r else p for p, r, w in parts])
        return joined.movedim(-1, 1) if axis == 1 else joined

    def _by_role(self, rows: Tensor, widths: Sequence[int]) -> Sequence[Tensor]:
        """(..., sum of heads times widths) as one (..., heads, width) for every role."""
        if self.by_head:
            return rows.unflatten(-1, (self.heads[0], -1)).split(list(widths), -1)
        sizes = [h * w for h, w in zip(self.heads, widths, strict=True)]
        return [part.unflatten(-1, (h, -1)) for part, h in zip(rows.split(sizes, -1), self.heads, strict=True)]

    def _joined(self, roles: list[Tensor]) -> Tensor:
        """The inverse of :meth:`_by_role`."""
        return torch.cat(roles, -1).flatten(-2) if self.by_head else torch.cat([p.flatten(-2) for p in roles], -1)

    def place(self, components: Sequence[Tensor]) -> None:
        """Set ``places``: for every role the components (heads, narrow) of a wide head that the narrow ones are."""
        rows = sum(h * r for h, r in zip(self.heads, self.narrow, strict=True))
        shown = []
        by_role = self._by_role(torch.arange(rows, device=components[0].device), self.narrow)
        for own, at, heads, wide in zip(by_role, components, self.heads, self.wide, strict=True):
            empty = torch.full((heads, wide), rows, device=own.device)
            shown.append(empty.scatter(1, at, own))
        self.places = self._joined(shown)

    def kept(self) -> list[Tensor]:
        """For every role the components (heads, narrow) that were given to :meth:`place`."""
        assert self.places is not None
        shown = self._by_role(self.places, self.wide)
        return [rows.argsort(-1)[:, :r] for rows, r in zip(shown, self.narrow, strict=True)]  # zeros are the last row


class HeadOutput(_AroundNarrow):
    """The output projection behind heads of which only the first ``narrow`` components hold anything.

    Args:
        by_component: its input holds the first component of every head, then the second of every head, and so on.
        placed: it takes components of its own choice instead of the first ones: ``places`` (a buffer) holds, for every
            input of ``linear``, where it is found.
    """

    def __init__(
        self, linear: Any, heads: int, narrow: int, wide: int, by_component: bool = False, placed: bool = False
    ) -> None:
        super().__init__()
        self.linear = linear
        self.heads, self.narrow, self.wide = heads, narrow, wide
        self.by_component = by_component
        self.register_buffer("places", None)
        if placed:
            self.register_buffer("places", torch.zeros(heads * narrow, dtype=torch.int64, device=linear.weight.device))

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
        if self.places is not None:
            return self.linear(z.index_select(1 if isinstance(self.linear, nn.Conv2d) else -1, self.places))
        if self.narrow == self.wide:
            return self.linear(z)
        if self.by_component:
            return self.linear(z.narrow(1 if isinstance(self.linear, nn.Conv2d) else -1, 0, self.heads * self.narrow))
        if isinstance(self.linear, nn.Conv2d):
            return self.linear(z.unflatten(1, (self.heads, self.wide))[:, :, : self.narrow].flatten(1, 2))
        return self.linear(z.unflatten(-1, (self.heads, self.wide))[..., : self.narrow].flatten(-2))

    def place(self, components: Tensor) -> None:
        """Set ``places``: the components (heads, narrow) of a wide head that are taken."""
        at = torch.arange(self.heads, device=components.device)[:, None]
        at = (components * self.heads + at).mT if self.by_component else at * self.wide + components
        self.places = at.flatten()
