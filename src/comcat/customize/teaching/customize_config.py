"""Everything that steers a customization run, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...errors import TrainingError
from ...training.option_texts import setting
from ...training.settings import TrainingSettings

if TYPE_CHECKING:
    from ..adapter.targets import Ranks

Precision = Literal["no", "bf16", "fp16"]
#: Groups of options.
PRODUCTS, TOKEN, COURSE, PHOTOS, RUN = "Products", "Token", "Course", "Photos", "Run"
PRIOR, SAVING = "Prior preservation", "Log, samples and checkpoints"


@dataclass(frozen=True)
class CustomizeConfig(TrainingSettings):
    """How :func:`comcat.customize.train` teaches a concept. A step is one update of the adapter.

    Attributes:
        rank: of every head's products; layer_ranks: exceptions, "pattern=rank", the first that matches.
        targets: which attention layers, as for ``add_adapter``; none given: all.
        text_encoder_rank: rank in the CLIP text encoders; 0 leaves them alone.
        token: the new word to learn; token_vectors: how many vectors it has; token_init: words that they start from.
        scale: strength at which the adapter is trained and stored.
        steps: updates. lr: of the products; token_lr: of the token, in units of the table's spread per step.
        schedule: of both after warmup_steps; weight_decay: of AdamW, on the products alone.
        optimizer: ``adamw8bit`` needs bitsandbytes.
        batch_size: photos per batch and process; accumulate: batches per step.
        resolution: pixels a side of the square bucket; None: the model's own.
        buckets: keep aspect ratios up to this; 1 crops everything to a square.
        flip: probability of mirroring a photo (off: text and asymmetric things must not be mirrored).
        random_crop: another crop every time, which rules out cached latents.
        cache_latents: encode every photo once.
        caption_dropout: share of examples that learn without their caption.
        prior_weight: of the loss on class images; 0 is off.
        num_class_images: how many to generate where none are given.
        snr_gamma: min-SNR weighting (Hang et al., 2023), usually 5; None: off. Not for flow matching.
        precision: autocast; the products stay float32.
        grad_checkpointing: recompute activations (less memory, a third more time).
        validate_every: steps between validation images, 0: none; validation_images: per prompt;
            validation_steps: of their sampler.
        seed: of the products, the order of the photos, noise and time steps.
    """

    ranges: ClassVar = {
        "rank": (1, math.inf),
        "text_encoder_rank": (0, math.inf),
        "token_vectors": (1, 64),
        "scale": (-math.inf, math.inf),
        "steps": (1, math.inf),
        "lr": (1e-12, math.inf),
        "token_lr": (0, math.inf),
        "warmup_steps": (0, math.inf),
        "weight_decay": (0, math.inf),
        "betas": (0, 1 - 1e-12),
        "clip_grad": (1e-12, math.inf),
        "batch_size": (1, math.inf),
        "accumulate": (1, math.inf),
        "resolution": (8, math.inf),
        "buckets": (1, 8),
        "flip": (0, 1),
        "caption_dropout": (0, 1),
        "prior_weight": (0, math.inf),
        "num_class_images": (1, math.inf),
        "snr_gamma": (1e-6, math.inf),
        "validate_every": (0, math.inf),
        "validation_images": (1, 64),
        "validation_steps": (1, 1000),
        "checkpoint_every": (1, math.inf),
        "keep_checkpoints": (1, math.inf),
        "log_every": (1, math.inf),
        "seed": (0, 2**63 - 1),
    }
    free: ClassVar = (
        "validate_every",
        "validation_images",
        "validation_steps",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
    )

    rank: int = setting(2, PRODUCTS, "Rank of every head's products.", "R")
    layer_ranks: tuple[str, ...] = setting(
        (), PRODUCTS, "Rank of some layers, e.g. attn2=4; repeatable.", "NAME=R", flag="--layer-rank"
    )
    targets: tuple[str, ...] = setting(
        (),
        PRODUCTS,
        "Which attention: self, cross, joint, a part of names (attn2), a glob; repeatable; all.",
        "NAME",
        flag="--target",
    )
    text_encoder_rank: int = setting(0, PRODUCTS, "Rank in the CLIP text encoders; none.", "R", shown=False)
    token: str | None = setting(None, TOKEN, "The word to learn, where it does not look like one.", "WORD")
    token_vectors: int = setting(1, TOKEN, "Its vectors.", "N")
    token_init: str | None = setting(None, TOKEN, "Words that they start from, e.g. dog.", "WORDS")
    scale: float = setting(1.0, PRODUCTS, "Strength.", "S")
    steps: int = setting(500, COURSE, "Updates.", "N")
    lr: float = setting(3e-4, COURSE, "Learning rate of the products.", "X", shown="3e-4")
    token_lr: float = setting(0.02, TOKEN, "Learning rate, in units of their size.", "X")
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "cosine", COURSE, "Of the learning rate.", "constant|linear|cosine", shown=False
    )
    warmup_steps: int = setting(0, COURSE, "Linear warm-up; none.", "N", shown=False)
    weight_decay: float = setting(0.01, COURSE, "Of AdamW.", "X")
    betas: tuple[float, ...] = (0.9, 0.999)
    clip_grad: float | None = setting(1.0, COURSE, "Largest norm of the gradient.", "X")
    optimizer: Literal["adamw", "adamw8bit"] = setting(
        "adamw", COURSE, "adamw8bit needs bitsandbytes.", "adamw|adamw8bit", shown=False
    )
    snr_gamma: float | None = setting(None, COURSE, "Min-SNR weighting, e.g. 5; off.", "X")
    batch_size: int = setting(1, COURSE, "Photos per batch.", "N")
    accumulate: int = setting(1, COURSE, "Batches per step.", "N")
    resolution: int | None = setting(None, PHOTOS, "Pixels; the model's own.", "N")
    buckets: float = setting(2.0, PHOTOS, "Keep aspect ratios up to this; 1 crops to squares.", "X")
    flip: float = setting(0.0, PHOTOS, "Probability of mirroring; off.", "X", shown=False)
    random_crop: bool = setting(False, PHOTOS, "Crop elsewhere every time; needs --no-cache-latents.")
    cache_latents: bool = setting(True, PHOTOS, "Encode photos once.")
    caption_dropout: float = setting(0.0, PHOTOS, "Share of examples without caption; 0.", "X", shown=False)
    num_class_images: int = setting(100, PRIOR, "How many to draw.", "N")
    prior_weight: float = setting(1.0, PRIOR, "Of their loss.", "X")
    precision: Precision = setting(
        "no", COURSE, "Of the base model and of autocast; the products stay float32.", "no|bf16|fp16", shown=False
    )
    grad_checkpointing: bool = setting(False, COURSE, "Less memory, more time.")
    validate_every: int = setting(0, SAVING, "Steps between sample images; none.", "N", shown=False)
    validation_images: int = setting(4, SAVING, "Per prompt.", "N")
    validation_steps: int = setting(25, SAVING, "Sampling steps, also of class images.", "N")
    checkpoint_every: int = setting(100, SAVING, "Steps between checkpoints.", "N")
    keep_checkpoints: int = 2
    log_every: int = setting(10, SAVING, "Steps between lines of the log.", "N")
    seed: int = setting(0, RUN, "Of everything random.", "N")

    def __post_init__(self) -> None:
        self.check()
        if len(self.betas) != 2:
            raise TrainingError(f"betas has {len(self.betas)} values; give two, e.g. [0.9, 0.999]")
        if self.scale == 0:
            raise TrainingError("scale is 0, at which no product learns anything; train at 1, and load it at 0")
        if self.random_crop and self.cache_latents:
            raise TrainingError(
                "random_crop needs another encoding every time; set cache_latents to false, or crop alike"
            )
        _ = self.ranks  # a malformed layer rank is refused here

    @property
    def ranks(self) -> Ranks:
        """``rank`` and ``layer_ranks`` as ``add_adapter`` takes them."""
        if not self.layer_ranks:
            return self.rank
        table: dict[str, int] = {}
        for item in self.layer_ranks:
            pattern, equals, rank = item.rpartition("=")
            if not equals or not pattern or not rank.isdecimal() or int(rank) < 1:
                raise TrainingError(f"{item!r} is no rank of layers; write it like attn2=4")
            table[pattern] = int(rank)
        return {**table, "*": self.rank}
