"""Parameters and multiply-accumulates of linear layers, for one image.

Convention: one MAC is one multiply-add of a matrix product or convolution; biases count as parameters, not as MACs.
All functions take integers or integer arrays and broadcast.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Shape(NamedTuple):
    """How much data one image brings to a layer."""

    tokens: int  # rows that pass the layer, all windows together
    sequence: int  # keys that one query sees
    keys: int | None = None  # rows that keys and values are made of, where these are others than the queries'


class Cost(NamedTuple):
    """Parameters and MACs, each an integer or an integer array."""

    params: Any
    macs: Any

    def __add__(self, other: Any) -> Cost:
        return Cost(self.params + other.params, self.macs + other.macs)

    def __sub__(self, other: Any) -> Cost:
        return Cost(self.params - other.params, self.macs - other.macs)


def linear_cost(in_features: Any, out_features: Any, bias: bool, tokens: int) -> Cost:
    """A dense linear layer."""
    weight = in_features * out_features
    return Cost(weight + (out_features if bias else 0), tokens * weight)


def low_rank_cost(in_features: Any, out_features: Any, rank: Any, tokens: int) -> Cost:
    """A :class:`~comcat.nn.linear.LowRankLinear`, which always has a bias."""
    weight = rank * (in_features + out_features)
    return Cost(weight + out_features, tokens * weight)


def either_cost(in_features: Any, out_features: Any, bias: bool, rank: Any, tokens: int) -> Cost:
    """Low rank where ``rank`` is not negative, dense where it is -1."""
    low = low_rank_cost(in_features, out_features, rank, tokens)
    dense = linear_cost(in_features, out_features, bias, tokens)
    return Cost(*(np.where(np.asarray(rank) < 0, d, s) for s, d in zip(low, dense, strict=True)))


def break_even(in_features: int, out_features: int) -> int:
    """Smallest rank at which a low-rank layer is no longer smaller than the dense one."""
    return -(-in_features * out_features // (in_features + out_features))
