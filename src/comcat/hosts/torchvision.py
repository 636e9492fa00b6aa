"""torchvision's windowed attention with linear layers that are called, and with heads of any width.

torchvision hands the weights of Swin's attention to one function; this computes the same through ``qkv`` and ``proj``.
"""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2


class CalledWindowAttention(ShiftedWindowAttention):
    """Swin v1: (B, H, W, D) to the same."""

    head_dim: int
    #: Of scores that are products; cosines are scaled by ``logit_scale``.
    cosine = False

    @classmethod
    def of(cls, original: Any) -> CalledWindowAttention:
        """With everything of the original, which keeps its own linear layers."""
        made: Any = cls.__new__(cls)
        vars(made).update(copy.copy(vars(original)))
        made._modules = dict(original._modules)
        made._parameters, made._buffers = dict(original._parameters), dict(original._buffers)
        made.head_dim = original.qkv.out_features // (3 * original.num_heads)
        made.scale = made.head_dim**-0.5
        return cast(CalledWindowAttention, made)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, D = x.shape
        h, w = self.window_size
        x = F.pad(x, (0, 0, 0, -W % w, 0, -H % h))
        size = x.shape[1:3]
        shift = [0 if n >= whole else s for n, whole, s in zip((h, w), size, self.shift_size, strict=True)]
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        windows = x.unflatten(2, (-1, w)).unflatten(1, (-1, h)).transpose(2, 3)  # (B, rows, columns, h, w, D)
        grid = windows.shape[1:3]
        z = self._attend(self.qkv(windows.reshape(-1, h * w, D)), self._bias(size, shift))
        out = F.dropout(self.proj(z), self.dropout, self.training)
        out = out.view(B, *grid, h, w, -1).transpose(2, 3).reshape(B, *size, -1)
        if any(shift):
            out = out.roll((shift[0], shift[1]), (1, 2))
        return out[:, :H, :W].contiguous()

    def _attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """(windows of all images, tokens, 3 heads width) to (..., heads width)."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        scale: Any = self.scale
        if self.cosine:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            q, scale = q * self.logit_scale.clamp(max=math.log(100.0)).exp(), 1.0
        bias = bias.expand(qkv.shape[0] // bias.shape[0], *bias.shape).flatten(0, 1)
        dropout = self.attention_dropout if self.training else 0.0
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
        return z.transpose(1, 2).flatten(2)

    def _bias(self, size: Any, shift: list[int]) -> Tensor:
        """Relative positions, and what keeps apart what was rolled together: (1 or windows, heads, tokens, tokens)."""
        bias: Tensor = self.get_relative_position_bias()
        if not any(shift):
            return bias
        h, w = self.window_size
        region = bias.new_zeros(tuple(size))
        rows = ((0, -h), (-h, -shift[0]), (-shift[0], None))
        columns = ((0, -w), (-w, -shift[1]), (-shift[1], None))
        for i, (top, bottom) in enumerate(rows):
            for j, (left, right) in enumerate(columns):
                region[top:bottom, left:right] = 3 * i + j
        region = region.unflatten(1, (-1, w)).unflatten(0, (-1, h)).transpose(1, 2).reshape(-1, h * w)
        apart = region[:, None] != region[:, :, None]  # (windows, tokens, tokens)
        return bias + torch.zeros_like(apart, dtype=bias.dtype).masked_fill(apart, -100.0)[:, None]


class CalledWindowAttentionV2(CalledWindowAttention, ShiftedWindowAttentionV2):
    """Swin v2: cosines in place of products, and keys without a bias."""

    cosine = True

    @classmethod
    def of(cls, original: Any) -> CalledWindowAttention:
        made: Any = super().of(original)
        if original.qkv.bias is not None:
            bias = original.qkv.bias.detach().clone()
            third = len(bias) // 3
            bias[third : 2 * third] = 0
            qkv = nn.Linear(original.qkv.in_features, len(bias), device="meta")
            qkv.weight, qkv.bias = original.qkv.weight, nn.Parameter(bias, original.qkv.bias.requires_grad)
            made.qkv = qkv.train(original.qkv.training)
        return cast(CalledWindowAttention, made)


def lifted_window(module: nn.Module) -> CalledWindowAttention | None:
    """One of torchvision's two classes in a form whose linear layers are called."""
    if type(module) is ShiftedWindowAttentionV2:
        return CalledWindowAttentionV2.of(module)
    return CalledWindowAttention.of(module) if type(module) is ShiftedWindowAttention else None
