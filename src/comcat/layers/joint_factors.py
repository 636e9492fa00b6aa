"""The factors of attention over two streams of tokens: maps that both share, outputs that are refitted one by one."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..linalg import factorize
from ..models.running import double
from .attention_factors import AttentionFactors
from .base import Choice
from .factors import Moments
from .heads import HeadWeights, grouped

if TYPE_CHECKING:
    from .joint import JointAttention


class JointFactors(AttentionFactors):
    """Moments: those of :class:`AttentionFactors`, queries and keys over both streams, and ``z_context`` with its mean.

    Optional besides: ``out_grad_context``.
    """

    def __init__(self, layer: JointAttention, moments: Moments | None = None) -> None:
        super().__init__(layer, moments)
        self._joint = layer
        self.context: HeadWeights = layer.weights_of(layer.context)

    def _free_moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """White inputs of both streams: the matrices stand below each other."""
        own, other = self.heads.free_moments(), self.context.free_moments()
        return own[0] + other[0], own[1] + other[1], own[2] + other[2]

    @property
    def _weighted_output(self) -> Tensor:
        """Output weights of both streams side by side."""
        target = double(self.context.output)
        if "out_grad_context" in self.moments:
            target = target @ factorize.whitening(self.moments["out_grad_context"]).mT
        return torch.cat([super()._weighted_output, target], -1)

    @cached_property
    def value_moments(self) -> Tensor:
        if not self.moments or "z_context" not in self.moments:
            return super().value_moments
        h = self.layer.heads
        both = (self.moments["z"] + self.moments["z_context"]) / 2
        blocks = both.view(h.num, h.value_width, h.num, -1)
        return grouped(torch.stack([blocks[i, :, i] for i in range(h.num)]), h.groups)

    def _build(self, choice: Choice) -> dict[str, nn.Module]:
        new = super()._build(choice)
        for small in new.values():
            self._joint.fill_context(small, self._reduced(choice, self.context, "z_context")[0])
        return new
