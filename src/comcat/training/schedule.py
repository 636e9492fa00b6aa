"""How many steps there are, and what changes along them: pure functions of the step, so nothing needs saving."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .finetune_config import FinetuneConfig


@dataclass(frozen=True)
class Steps:
    """The course of a run.

    Attributes:
        batches: batches of one process in an epoch.
        accumulate: batches per step; the last step of an epoch takes what is left.
        total: steps in all.
        warmup: steps of the warm-up.
    """

    batches: int
    accumulate: int
    total: int
    warmup: int

    @classmethod
    def of(cls, config: FinetuneConfig, batches: int) -> Steps:
        """The course for a loader of ``batches`` batches."""
        per_epoch = -(-batches // config.accumulate)
        total = max(1, math.ceil(config.epochs * per_epoch - 1e-9))
        if config.max_steps is not None:
            total = min(total, config.max_steps)
        warmup = min(round(config.warmup_epochs * per_epoch), total - 1)
        return cls(batches, config.accumulate, total, warmup)

    @property
    def per_epoch(self) -> int:
        return -(-self.batches // self.accumulate)

    def position(self, step: int) -> tuple[int, int]:
        """Epoch and batch at which the step with this index (from 0) begins."""
        epoch, index = divmod(step, self.per_epoch)
        return epoch, index * self.accumulate

    def window(self, batch: int) -> int:
        """How many batches the step that begins at ``batch`` takes."""
        return min(self.accumulate, self.batches - batch)

    def evaluations(self, every: float | None) -> set[int]:
        """The numbers of finished steps after which to evaluate; the last step always."""
        due = {self.total}
        if every is not None:
            count = math.ceil(self.total / (every * self.per_epoch))
            due |= {round(k * every * self.per_epoch) for k in range(1, count)}
        return {step for step in due if 1 <= step <= self.total}


def learning_rate(step: int, steps: Steps, lr: float, min_lr: float) -> float:
    """Linear from ``lr / warmup`` to ``lr``, then a cosine that reaches ``min_lr`` at the last step.

    Args:
        step: index of the step, from 0.
    """
    if step < steps.warmup:
        return lr * (step + 1) / steps.warmup
    return min_lr + (lr - min_lr) * fall((step - steps.warmup) / max(1, steps.total - 1 - steps.warmup), "cosine")


def fall(progress: float, form: str) -> float:
    """From 1 at ``progress`` 0 to 0 at 1: ``cosine`` or ``linear``; ``none`` stays 1."""
    if form == "none":
        return 1.0
    return 1 - progress if form == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
