"""Everything that steers a distillation, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..training.finetune_config import Precision
from ..training.option_texts import setting
from ..training.settings import TrainingSettings

#: The group of options.
DISTILL = "Distillation (with --component)"


@dataclass(frozen=True)
class DistillConfig(TrainingSettings):
    """How :func:`comcat.denoisers.distill` trains. A step is one update from one batch of recorded examples.

    Attributes:
        steps: updates; batch_size: recorded examples of each.
        lr: learning rate at its highest, after ``warmup`` of the steps; a cosine to zero follows.
        weight_decay, betas: of AdamW; clip_grad: largest norm of the gradient.
        ema: decay of the average of the weights that is kept; None: the last weights are.
        precision: autocast; the weights stay as they are.
        log_every, checkpoint_every, keep_checkpoints: steps between lines of the log and between checkpoints, and how
            many of these to keep.
    """

    ranges: ClassVar = {
        "steps": (1, math.inf),
        "batch_size": (1, math.inf),
        "lr": (1e-12, math.inf),
        "warmup": (0, 1),
        "weight_decay": (0, math.inf),
        "clip_grad": (1e-12, math.inf),
        "ema": (0, 1 - 1e-12),
        "seed": (0, 2**31 - 1),
        "log_every": (1, math.inf),
        "checkpoint_every": (1, math.inf),
        "keep_checkpoints": (1, math.inf),
    }
    free: ClassVar = ("log_every", "checkpoint_every", "keep_checkpoints")

    steps: int = setting(500, DISTILL, "Updates; none without.", "N", flag="--distill-steps", shown=False)
    batch_size: int = setting(32, DISTILL, "Recorded examples of each.", "N", flag="--distill-batch")
    lr: float = setting(3e-4, DISTILL, "Learning rate.", "X", flag="--distill-lr", shown="3e-4")
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip_grad: float | None = 1.0
    ema: float | None = None
    precision: Precision = "no"
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 200
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        self.check()
