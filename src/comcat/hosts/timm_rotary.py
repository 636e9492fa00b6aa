"""timm's rotary attention (DINOv3, EVA02, Perception Encoder, rotary ViTs) on the pairs that are left.

    x -- q', k' of r pairs, v' -- turned by the tables' columns of these pairs -- one fused attention call -- out

The host turns heads of the full width, so that narrow ones would have to be spread to their places first, and its
products would be as wide as before. Here tables are narrowed instead, which are small: they know no images.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from ..layers.heads import is_identity
from ..nn.low_rank_attention import attend
from ..nn.projections import HeadOutput, HeadProjection


class NarrowRotary(nn.Module):
    """The forward of both classes, with projections of queries and keys that know their places."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(batch, tokens, D) to (batch, tokens, D_out).

        Args:
            rope: sines, then cosines of all tokens behind the prefix: (tokens, 2 d), or (..., 1 or heads, tokens, 2 d).
        """
        host: Any = self
        scores, v, at = self._rows(x)
        heads, groups = host.num_heads, len(at) - host.num_heads
        scores = scores.unflatten(-1, (heads + groups, -1)).transpose(1, 2)
        v = v.unflatten(-1, (groups, -1)).transpose(1, 2)
        if rope is not None:
            sin, cos = _narrow(rope, at).chunk(2, -1)  # (heads + groups, tokens, r)
            prefix = (0, 0, host.num_prefix_tokens, 0)
            sin, cos = F.pad(sin, prefix), F.pad(cos, prefix, value=1.0)
            first, second = scores.chunk(2, -1)
            scores = torch.cat([first * cos - second * sin, second * cos + first * sin], -1).type_as(v)
        q, k = scores.split([heads, groups], 1)
        if groups < heads:
            k, v = (shared.repeat_interleave(heads // groups, 1) for shared in (k, v))
        dropout = host.attn_drop.p if self.training else 0.0
        z = attend(q, k, v, host.head_dim**-0.5, attn_mask, dropout, is_causal).transpose(1, 2).flatten(2)
        out = host.proj
        return host.proj_drop(out.linear(z) if isinstance(out, HeadOutput) else out(z))

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of queries and keys, (..., (heads + groups) 2 r), and of values; first components of pairs (..., r)."""
        host: Any = self
        if host.qkv is not None:
            rows = host.qkv.linear(x)
            values = host.qkv.heads[2] * host.qkv.narrow[2]
            scores, v = rows.split([rows.shape[-1] - values, values], -1)
            at = torch.cat(host.qkv.kept()[:2])
        else:
            queries, keys, value = host.q_proj, host.k_proj, host.v_proj
            scores = torch.cat([queries.linear(x), keys.linear(x)], -1)
            v = value.linear(x) if isinstance(value, HeadProjection) else value(x)
            at = torch.cat([queries.kept()[0], keys.kept()[0]])
        return scores, v, at[:, : at.shape[-1] // 2]


def _narrow(rope: Tensor, at: Tensor) -> Tensor:
    """Sines, then cosines (..., heads, tokens, 2 r) of the components (heads, r)."""
    columns = torch.cat([at, at + rope.shape[-1] // 2], -1)
    if rope.dim() == 2:
        return rope.index_select(-1, columns.flatten()).unflatten(-1, columns.shape).transpose(0, 1)
    one = rope.shape[-3] == 1  # else angles of every head's own, of its queries as of its keys
    by_head = rope.expand(*rope.shape[:-3], len(columns), -1, -1) if one else torch.cat([rope, rope], -3)
    return by_head.gather(-1, columns[:, None].expand(*by_head.shape[:-1], -1))


class NarrowEvaAttention(NarrowRotary, EvaAttention):
    """timm's ``EvaAttention`` with fewer rotary pairs."""


class NarrowAttentionRope(NarrowRotary, AttentionRope):
    """timm's ``AttentionRope`` with fewer rotary pairs."""


_NARROW: dict[type, type] = {EvaAttention: NarrowEvaAttention, AttentionRope: NarrowAttentionRope}


def narrow_rotary(module: Any) -> type | None:
    """The class that runs ``module`` with fewer pairs, where what it does beside that is known."""
    cls = _NARROW.get(type(module))
    if cls is None or not module.fused_attn or module.gate is not None:
        return None
    return cls if all(is_identity(one) for one in (module.q_norm, module.k_norm, module.norm)) else None
