"""PyTorch's multi-head attention with linear layers that are called, and with heads of any width.

``nn.MultiheadAttention`` hands its weights to one function; nothing in it can be replaced or looked at. This computes
the same, with the same call, through ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError


class SeparateMultihead(nn.Module):
    """A stand-in for ``nn.MultiheadAttention``; its parameters are slices of the original's.

    PyTorch's fast paths, which read the weights of an ``nn.MultiheadAttention``, are off for it: ``in_proj_bias`` is
    None and ``_qkv_same_embed_dim`` False, the two facts by which ``nn.TransformerEncoderLayer`` decides.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = original.embed_dim, original.num_heads
        self.kdim, self.vdim = original.kdim, original.vdim
        self.head_dim = original.head_dim
        self.scale = self.head_dim**-0.5
        self.dropout, self.batch_first = original.dropout, original.batch_first
        names = ("q_proj", "k_proj", "v_proj")
        if original.in_proj_weight is not None:
            weights = original.in_proj_weight.detach().chunk(3)
        else:
            weights = tuple(getattr(original, f"{name}_weight").detach() for name in names)
        biases: Any = (None,) * 3
        if original.in_proj_bias is not None:
            biases = original.in_proj_bias.detach().chunk(3)
        trained = original.out_proj.weight.requires_grad
        for name, weight, bias in zip(names, weights, biases, strict=True):
            self.add_module(name, _linear(weight, bias, trained))
        self.out_proj = _linear(original.out_proj.weight, original.out_proj.bias, trained)
        self.train(original.training)

    @property
    def in_proj_weight(self) -> Tensor:
        """What ``nn.TransformerEncoder`` asks for to pack padded sequences.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "nn.TransformerEncoder packs padded sequences into nested tensors, for which it reads the weights of its "
            "first layer; that is reduced and has others: set encoder.use_nested_tensor = False"
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(tokens, batch, E), (batch, tokens, E) with ``batch_first``, or (tokens, E); masks as PyTorch's.

        Returns:
            The output, and the weights (batch, tokens, keys), by head where they are not averaged, or None.

        Raises:
            RuntimeError: ``is_causal`` without a mask, as PyTorch's raises.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        axis = 0 if self.batch_first else 1
        if not batched:
            query, key, value = (x.unsqueeze(axis) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if not self.batch_first:  # what is recorded of the projections is one sequence after the other
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        projected = [self.q_proj(query), self.k_proj(key), self.v_proj(value)]
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected)
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.scale) @ k.mT
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            z = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale)
        out = self.out_proj(z.transpose(1, 2).flatten(2))
        if not self.batch_first:
            out = out.transpose(0, 1)
        if not batched:
            out = out.squeeze(axis)
            weights = None if weights is None else weights.squeeze(0)
        return out, weights

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
        """Both masks as one that is added to scores (batch, heads, tokens, keys); True means out, as in PyTorch's."""
        masks = []
        if attn_mask is not None:
            mask = _additive(attn_mask, like)
            masks.append(mask.unflatten(0, (-1, self.num_heads)) if mask.dim() == 3 else mask)
        if padding is not None:
            masks.append(_additive(padding, like)[:, None, None])
        return sum(masks[1:], masks[0]) if masks else None

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _linear(weight: Tensor, bias: Tensor | None, trained: bool) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach(), trained)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), trained)
    return made
