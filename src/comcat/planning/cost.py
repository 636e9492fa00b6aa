"""Parameters and multiply-accumulates of a site at a choice of widths.

Convention: one MAC is one multiply-add of a matrix product or convolution, for one image; the two products
inside attention are counted, at the width at which they run. Biases count as parameters, not as MACs.
Latency, the third unit, is measured (``latency.py``), in nanoseconds.
All functions take integers or integer arrays and broadcast.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..layers.sites import AttentionSite, Choice, FFNSite, Site


class Shape(NamedTuple):
    """How much data one image brings to a site."""

    tokens: int  # rows that pass the layer, all windows together
    sequence: int  # keys that one query sees


class Cost(NamedTuple):
    params: Any
    macs: Any

    def __add__(self, other: Any) -> Cost:
        return Cost(self.params + other.params, self.macs + other.macs)

    def __sub__(self, other: Any) -> Cost:
        return Cost(self.params - other.params, self.macs - other.macs)


def attention_cost(site: AttentionSite, qk: Any, vo: Any, shape: Shape) -> Cost:
    """Attention with ranks ``qk`` and ``vo``; at ``head_dim`` both it is the dense layer."""
    H, d = site.num_heads, site.head_dim
    D, D_out = site.qkv.in_features, site.proj.out_features
    inner = H * (2 * qk + vo)
    params = D * inner + H * vo * D_out
    params = params + (inner if site.qkv.bias is not None else 0)
    params = params + (D_out if site.proj.bias is not None else np.where(vo < d, D_out, 0))
    products = 2 * np.maximum(qk, vo) if site.fused else qk + vo
    macs = shape.tokens * (D * inner + H * vo * D_out + shape.sequence * H * products)
    return Cost(params, macs)


def linear_cost(in_features: int, out_features: int, bias: bool, tokens: int) -> Cost:
    """A dense linear layer."""
    weight = in_features * out_features
    return Cost(weight + (out_features if bias else 0), tokens * weight)


def low_rank_cost(in_features: int, out_features: int, rank: Any, tokens: int) -> Cost:
    """A :class:`~comcat.nn.linear.LowRankLinear`, which always has a bias."""
    weight = rank * (in_features + out_features)
    return Cost(weight + out_features, tokens * weight)


def neurons_cost(site: FFNSite, neurons: Any, tokens: int) -> Cost:
    """An FFN with fewer hidden units; its second bias holds the mean of the dropped ones."""
    D, D_out = site.fc1.in_features, site.fc2.out_features
    params = neurons * (D + D_out + (site.fc1.bias is not None)) + D_out
    return Cost(params, tokens * neurons * (D + D_out))


def shown(cost: int, unit: str) -> str:
    """A cost with its unit, for people; latency is in nanoseconds."""
    return f"{cost / 1e6:,.3f} ms" if unit == "latency" else f"{cost:,} {unit}"


def break_even(in_features: int, out_features: int) -> int:
    """Smallest rank at which a low-rank layer is no longer smaller than the dense one."""
    return -(-in_features * out_features // (in_features + out_features))


def site_cost(site: Site, choice: Choice, shape: Shape) -> Cost:
    """What the site's linear layers cost at ``choice``; a norm or gate that it carries along is not counted."""
    if isinstance(site, AttentionSite):
        d = site.head_dim
        cost = attention_cost(site, choice.get("qk", d), choice.get("vo", d), shape)
        return Cost(int(cost.params), int(cost.macs))
    if isinstance(site, FFNSite) and "neurons" in choice:
        total, width = neurons_cost(site, choice["neurons"], shape.tokens), choice["neurons"]
        sizes = {
            "fc1": (site.fc1.in_features, width, site.fc1.bias is not None),
            "fc2": (width, site.fc2.out_features, True),
        }
        for fc, (inner, outer, bias) in sizes.items():
            if fc in choice:
                low = low_rank_cost(inner, outer, choice[fc], shape.tokens)
                total = total + low - linear_cost(inner, outer, bias, shape.tokens)
        return total
    total = Cost(0, 0)
    for part, linear in site.linears.items():
        rank = choice.get("rank" if part == "linear" else part)
        shape_args = (linear.in_features, linear.out_features)
        total += (
            linear_cost(*shape_args, linear.bias is not None, shape.tokens)
            if rank is None
            else low_rank_cost(*shape_args, rank, shape.tokens)
        )
    return total


def parts_cost(site: Site, parts: tuple[str, ...], shape: Shape) -> Cost:
    """What the selected parts of a dense site cost."""
    if not isinstance(site, AttentionSite):
        return site_cost(site, {}, shape)
    d = site.head_dim
    whole = attention_cost(site, d, d, shape)
    rest = attention_cost(site, 0 if "qk" in parts else d, 0 if "vo" in parts else d, shape)
    # A reduced output has a bias even where the dense one has none; that one is no part of the dense cost.
    added = site.proj.out_features if site.proj.bias is None and "vo" in parts else 0
    return Cost(int(whole.params - rest.params) + added, int(whole.macs - rest.macs))
