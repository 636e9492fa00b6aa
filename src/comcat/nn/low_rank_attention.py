"""Multi-head attention whose heads are narrow: queries and keys of width r_qk, values of width r_vo.

    x ── qkv ──┬─ q' (H, r_qk) ─┐
               ├─ k' (H, r_qk) ─┴─ softmax(scale q' k'^T) ─┐
               └─ v' (H, r_vo) ────────────────────────────┴─ z' (H, r_vo) ── proj ── out

One fused input projection, one fused attention call, one output projection. ``scale`` is that of the ORIGINAL
head width: the scores are approximated, so their temperature must stay. Source: COMCAT (arXiv 2305.17235), Eq. 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

_padded = ContextVar("padded", default=True)


@contextmanager
def unpadded() -> Iterator[None]:
    """Inside, :func:`attend` leaves queries and values of different widths as they are, for graphs that others run.

    ONNX Runtime and OpenVINO take any widths, and are 7 to 20 % faster without the zeros; PyTorch's kernels are not.
    """
    token = _padded.set(False)
    try:
        yield
    finally:
        _padded.reset(token)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """Fused attention for values of another width than the queries.

    Args:
        q, k: (batch, heads, tokens, r_qk); v: (batch, heads, tokens, r_vo).

    Returns:
        (batch, heads, tokens, r_vo). The narrower side is padded with zeros, which changes nothing: the fused
        kernels want one width and fall back to an unfused path, several times slower, without it.
    """
    r_qk, r_vo = q.shape[-1], v.shape[-1]
    # Only newer versions of torch.compile read context variables.
    if not torch.compiler.is_dynamo_compiling() and not _padded.get():
        r_qk = r_vo
    if r_qk < r_vo:
        q, k = F.pad(q, (0, r_vo - r_qk)), F.pad(k, (0, r_vo - r_qk))
    elif r_vo < r_qk:
        v = F.pad(v, (0, r_qk - r_vo))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale
    )
    return out[..., :r_vo] if r_vo < r_qk else out


def masked(scores: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Scores (batch, heads, tokens, tokens) under a boolean or additive mask, as fused attention takes it."""
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(future, float("-inf"))
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, float("-inf"))
    return scores + attn_mask


# Both look at what they are given (widths, masks), which a symbolic trace does not know: one node each in its graph.
torch.fx.wrap("attend")
torch.fx.wrap("masked")


class LowRankAttention(nn.Module):
    """Self-attention with per-head ranks, a stand-in for timm's ``Attention`` with the same call.

    With ``fused_attn = False`` the attention map exists, as in timm: it comes from ``softmax`` and passes the module
    ``attn_drop``, whose hooks see it.

    Args:
        dim: input width D.
        num_heads: heads H, as in the original layer.
        head_dim: head width d of the ORIGINAL layer; ``qk_rank`` and ``vo_rank`` are at most d.
        qk_rank: width of the reduced queries and keys of one head.
        vo_rank: width of the reduced values of one head.
        scale: softmax scale of the original layer, usually ``head_dim ** -0.5``.
        dim_out: output width, default ``dim``.
        q_norm, k_norm: normalization of queries and keys; only with ``qk_rank == head_dim``.
        norm, gate: normalization and gating between attention and output; only with ``vo_rank == head_dim``.
        attn_drop, proj_drop: dropout rates, or the modules of the original layer, which then keep their hooks.
        fused_attn: one fused call, or the attention map by itself.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        qk_rank: int,
        vo_rank: int,
        scale: float,
        dim_out: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float | nn.Module = 0.0,
        proj_drop: float | nn.Module = 0.0,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        norm: nn.Module | None = None,
        gate: nn.Module | None = None,
        fused_attn: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # explicit: a host may mix this class with its own attention class
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.qk_rank = qk_rank
        self.vo_rank = vo_rank
        self.scale = scale
        width = num_heads * (2 * qk_rank + vo_rank)
        self.qkv = nn.Linear(dim, width, bias=qkv_bias, device=device, dtype=dtype)
        self.q_norm = nn.Identity() if q_norm is None else q_norm
        self.k_norm = nn.Identity() if k_norm is None else k_norm
        self.attn_drop = attn_drop if isinstance(attn_drop, nn.Module) else nn.Dropout(attn_drop)
        self.norm = nn.Identity() if norm is None else norm
        self.gate = gate
        self.proj = nn.Linear(num_heads * vo_rank, dim_out or dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = proj_drop if isinstance(proj_drop, nn.Module) else nn.Dropout(proj_drop)
        self.fused_attn = fused_attn

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(batch, tokens, D) to (batch, tokens, D_out); ``attn_mask`` boolean or additive, as timm passes it."""
        q, k, v = self.qkv(x).split(
            [self.num_heads * self.qk_rank, self.num_heads * self.qk_rank, self.num_heads * self.vo_rank], -1
        )
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            dropout: Any = self.attn_drop.p if self.training else 0.0
            z = attend(q, k, v, self.scale, attn_mask, dropout, is_causal)
        else:
            attn = masked((q * self.scale) @ k.transpose(-2, -1), attn_mask, is_causal)
            z = self.attn_drop(self._softmax(attn)) @ v
        z = self.norm(z.transpose(1, 2).flatten(2))
        if self.gate is not None:
            z = z * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(z))

    def _softmax(self, attn: Tensor) -> Tensor:
        return attn.softmax(dim=-1)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, qk_rank={self.qk_rank}, vo_rank={self.vo_rank}"
