"""The rotation that a host hands to its attention: tables of cosines and sines by token and component."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..linalg.rotary import pair_places


class Tables(NamedTuple):
    """Cosines and sines of the angles, (..., tokens, d / 2), one for each pair."""

    cos: Tensor
    sin: Tensor


def find_tables(values: Iterable[Any], width: int, layout: str) -> Tables | None:
    """The tables among what a layer is called with: (cos, sin) of width d each, or one tensor with sin, then cos.

    They are known by their numbers: both components of a pair have one angle, and the squares add up to one.
    """
    for value in values:
        if _is_table(value, 2 * width):
            sin, cos = value.detach().chunk(2, -1)
        elif isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_table(one, width) for one in value):
            if value[0].shape != value[1].shape:
                continue
            cos, sin = (one.detach() for one in value)
        else:
            continue
        first, second = pair_places(torch.arange(width // 2, device=cos.device), width, layout).chunk(2)
        tables = Tables(cos[..., first], sin[..., first])
        same = all(torch.equal(whole[..., second], half) for whole, half in zip((cos, sin), tables, strict=True))
        length = tables.cos.float().square() + tables.sin.float().square()
        if same and torch.allclose(length, torch.ones_like(length), atol=0.02):
            return tables
    return None


def _is_table(value: Any, width: int) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 2 and value.shape[-1] == width


def turn_rows(tables: Tables, tokens: int, heads: int) -> Tensor:
    """Rows (heads or 1, tokens, d) of cosines and sines; tokens beyond those of the tables are not turned.

    Tables may have one set of angles for every head, before the tokens' axis; what else comes before is flattened.
    """
    rows = torch.cat(tables, -1)
    still = rows.new_zeros(rows.shape[-1])
    still[: rows.shape[-1] // 2] = 1
    missing = max(0, tokens - rows.shape[-2])
    rows = torch.cat([still.expand(*rows.shape[:-2], missing, -1), rows], -2)
    if rows.dim() >= 3 and rows.shape[-3] == heads > 1:
        return rows.movedim(-3, 0).flatten(1, -2)
    return rows.flatten(0, -2)[None]
