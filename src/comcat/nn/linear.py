"""A linear layer as two thin ones: ``y = (x A) B + b``."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """``nn.Linear(in_features, out_features)`` of rank ``rank``: ``y = up(down(x))``.

    Costs ``rank * (in_features + out_features)`` weights; it is smaller than the dense layer below the
    break-even rank ``in_features * out_features / (in_features + out_features)``.

    Args:
        pointwise: two 1x1 convolutions instead, for a layer that is one: (B, in_features, H, W).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        pointwise: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.down = plain_linear(in_features, rank, False, pointwise, device, dtype)
        self.up = plain_linear(rank, out_features, bias, pointwise, device, dtype)

    @property
    def weight(self) -> Tensor:
        """Nothing (0,), of the dtype and on the device that hosts ask a linear layer's weight for."""
        return self.down.weight.detach().new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return self.up(self.down(x))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def plain_linear(
    in_features: int,
    out_features: int,
    bias: bool,
    pointwise: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Linear | nn.Conv2d:
    """A linear layer, or a 1x1 convolution."""
    if pointwise:
        return nn.Conv2d(in_features, out_features, 1, bias=bias, device=device, dtype=dtype)
    return nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
