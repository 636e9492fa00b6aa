"""Everything that steers a rank search, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import TrainingError
from ..training.finetune_config import Kind, Precision
from ..training.option_texts import setting
from ..training.settings import TrainingSettings

Objective = Literal["two-sided", "one-sided", "exact"]
#: The group of options; the rest is given in a file.
SEARCH = "Learned ranks (--method search)"
FFNForm = Literal["auto", "low-rank", "neurons"]


@dataclass(frozen=True)
class SearchConfig(TrainingSettings):
    """How :func:`comcat.search` learns. A step is one batch; every second one trains the ranks, the others the weights.

    Attributes:
        outputs: what the model returns (:mod:`comcat.evaluation.outputs`); None: as in the calibration, or inferred.
        epochs: passes over the training data, fractions allowed.
        max_steps: end after this many batches, if that is sooner.
        candidates: widths per part, evenly spaced up to the dense one; the smallest width that there is comes on top.
        objective: ``two-sided`` (the paper), ``one-sided`` (its reference code) or ``exact``; see
            :func:`comcat.search`.
        beta: exponent of the cost in the first two.
        temperature: of the Gumbel-softmax, at the first and the last step; geometric in between.
        spread: standard deviation of the distribution at the start, in candidates.
        lr, weight_decay: of the logits (AdamW).
        weight_lr: of the weights (AdamW).
        ffn: ``auto`` takes the form that the starting plan has in each layer; or ``low-rank``, ``neurons`` for all.
        precision: autocast of the forward pass.
        seed: of the order of the images and the Gumbel noise.
        log_every: steps between lines of the log.
        checkpoint_every, keep_checkpoints: steps between checkpoints, and how many of the newest to keep.

    Raises:
        TrainingError: a value of the wrong type or out of range.
    """

    ranges: ClassVar = {
        "epochs": (0, math.inf),
        "max_steps": (2, math.inf),
        "candidates": (2, 256),
        "beta": (0, math.inf),
        "temperature": (1e-3, math.inf),
        "spread": (1e-3, math.inf),
        "lr": (0, math.inf),
        "weight_decay": (0, math.inf),
        "weight_lr": (0, math.inf),
        "seed": (0, 2**31 - 1),
        "log_every": (1, math.inf),
        "checkpoint_every": (1, math.inf),
        "keep_checkpoints": (1, math.inf),
    }
    free: ClassVar = ("log_every", "checkpoint_every", "keep_checkpoints")

    outputs: Kind | None = None
    epochs: float = setting(
        1.0, SEARCH, "Passes over the training images; 1.", "N", flag="--search-epochs", shown=False
    )
    max_steps: int | None = setting(None, SEARCH, "End after N batches, if that is sooner.", "N", flag="--search-steps")
    candidates: int = 16
    objective: Objective = "exact"
    beta: float = 1.5
    temperature: tuple[float, ...] = (1.0, 1.0)
    spread: float = 1.5
    lr: float = 3e-2
    weight_decay: float = 5e-4
    weight_lr: float = 1e-4
    ffn: FFNForm = "auto"
    precision: Precision = "no"
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        self.check()
        if len(self.temperature) != 2:
            raise TrainingError(f"temperature has {len(self.temperature)} values; give the first and the last")
        if self.epochs == 0:
            raise TrainingError("epochs must be above 0")
