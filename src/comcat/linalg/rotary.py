"""Rotary position embedding: which pairs of components of queries and keys matter.

Between projection and product the components of a query pair up and each pair is turned by an angle that grows with the
token's position (RoFormer, arXiv 2104.09864). With pairs as complex numbers the score of a query at s and a key at t is

    sum_p Re( q_p conj(k_p) e^{i theta_p (s - t)} )

a sum over pairs: any of them can be left out, and none can be mixed with one of another frequency. Over positions that
spread over the turn, pairs are uncorrelated, and leaving p out costs ``E|q_p|^2 E|k_p|^2 / 2``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..models.running import double

#: How components pair up: i with i + d / 2, or 2 i with 2 i + 1.
LAYOUTS = ("half", "next")


class PairOrder(NamedTuple):
    """Pairs of each group of heads, most worth keeping first."""

    order: Tensor  # (groups, d / 2) int64
    gains: Tensor  # (groups, d / 2): the expected squared error of the scores that each saves


def order_pairs(query_moment: Tensor, key_moment: Tensor, layout: str) -> PairOrder:
    """Pairs in the order of what they are worth.

    Args:
        query_moment, key_moment: (groups, d, d), before the rotation, which keeps the length of every pair.
        layout: one of :data:`LAYOUTS`.
    """
    lengths = []
    for moment in (query_moment, key_moment):
        squares = double(moment).diagonal(dim1=-2, dim2=-1).clamp_min(0)
        lengths.append(squares.gather(-1, pair_places(_every(squares), squares.shape[-1], layout)))
    pairs = [length.unflatten(-1, (2, -1)).sum(-2) for length in lengths]
    gains, order = (pairs[0] * pairs[1] / 2).sort(dim=-1, descending=True, stable=True)
    return PairOrder(order, gains)


def _every(squares: Tensor) -> Tensor:
    half = squares.shape[-1] // 2
    return torch.arange(half, device=squares.device).expand(*squares.shape[:-1], half)


def pair_places(pairs: Tensor, width: int, layout: str) -> Tensor:
    """(groups, r) pairs to the (groups, 2 r) components they are: first all first ones, then all second ones."""
    if layout == "half":
        return torch.cat([pairs, pairs + width // 2], -1)
    return torch.cat([2 * pairs, 2 * pairs + 1], -1)
