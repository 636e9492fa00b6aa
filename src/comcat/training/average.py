"""A running average of the weights (Polyak averaging)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """Exponential average of a model's parameters, on its device, in its dtype, sharded as it is sharded.

    Args:
        model: as it is trained, wrapped or not.
        decay: share of the old value; min(decay, (1 + n) / (10 + n)) at step n.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = list(model.parameters())
        self._values = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current: list[Tensor] = [p.detach() for p in self._parameters]
        get_ema_multi_avg_fn(decay)(self._values, current, None)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model holds the average inside, and its own weights again afterwards.

        Values loaded into the model inside become the average.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, value in zip(self._parameters, self._values, strict=True):
            own = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(own)
