"""The per-head normal form of an attention layer.

    scores_h = scale * (x W_q,h + b_q,h)(x W_k,h + b_k,h)^T
    out      = sum_h softmax(scores_h)(x W_v,h + b_v,h) W_o,h + b_o

Weights are kept transposed as ``nn.Linear`` has them, one slice per head, so that reducing a head is one batched
product and no D x D matrix is ever formed. Source: COMCAT (arXiv 2305.17235), Eq. 1-3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.running import double, wide


@dataclass(frozen=True)
class HeadWeights:
    """Views on the weights of one self-attention layer with H heads of width d, input D, output D_out."""

    query: Tensor  # (H, d, D)
    key: Tensor  # (H, d, D)
    value: Tensor  # (H, d, D)
    query_bias: Tensor | None  # (H, d)
    value_bias: Tensor | None  # (H, d)
    output: Tensor  # (H, d, D_out)
    output_bias: Tensor | None  # (D_out,)

    @classmethod
    def from_fused(cls, qkv: nn.Linear, proj: nn.Linear, num_heads: int) -> HeadWeights:
        """From one input projection whose rows are [query, key, value], each ordered by head."""
        query, key, value = qkv.weight.detach().unflatten(0, (3, num_heads, -1))
        bias = None if qkv.bias is None else qkv.bias.detach().unflatten(0, (3, num_heads, -1))
        return cls(
            query=query,
            key=key,
            value=value,
            query_bias=None if bias is None else bias[0],
            value_bias=None if bias is None else bias[2],
            output=proj.weight.detach().mT.unflatten(0, (num_heads, -1)),
            output_bias=None if proj.bias is None else proj.bias.detach(),
        )

    def free_moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Moments of queries, keys and values for white inputs: (H, d, d) each, the data-free stand-ins.

        With them, the factors are the truncated SVDs of ``W_q W_k^T`` and ``W_v W_o``.
        """
        return gram(self.query), gram(self.key), gram(self.value)


def gram(weight: Tensor) -> Tensor:
    """``W W^T`` (..., d, d) in float64."""
    weight = double(weight)
    return weight @ weight.mT


def flatten_heads(weight: Tensor) -> Tensor:
    """(H, r, D) to (H r, D): rows ordered by head, as ``nn.Linear`` stores them."""
    return weight.flatten(0, 1)


def is_identity(module: nn.Module | None) -> bool:
    """Whether a module between projection and product does nothing."""
    return module is None or type(module) is nn.Identity


def as_parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter with the dtype and device of ``like``, and with the strides that a file gives back.

    ``contiguous`` keeps any stride of an axis of length 1, and kernels round by strides.
    """
    value = value.to(dtype=like.dtype, device=like.device)
    return nn.Parameter(value.clone(memory_format=torch.contiguous_format), like.requires_grad)


def zeros_like_bias(bias: Tensor | None, size: int, like: Tensor) -> Tensor:
    """``bias`` in float64, or zeros where the layer has none."""
    return torch.zeros(size, dtype=torch.float64, device=wide(like.device)) if bias is None else double(bias)
