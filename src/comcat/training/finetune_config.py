"""Everything that steers a fine-tuning run, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ..errors import TrainingError
from .option_texts import setting
from .settings import TrainingSettings

Distillation = Literal["soft", "hard", "none"]
Decay = Literal["cosine", "linear", "none"]
Precision = Literal["no", "bf16", "fp16"]
#: As :data:`comcat.evaluation.outputs.KINDS`, which takes PyTorch to import.
Kind = Literal["classes", "labels", "values", "features", "maps"]
#: Groups of options.
COURSE, LOSS, AUGMENT, SAVING, RUN = "Course", "Loss", "Augmentation", "Log and checkpoints", "Run"
#: Smoothing of class labels, unless said.
_SMOOTHING = 0.1


@dataclass(frozen=True)
class FinetuneConfig(TrainingSettings):
    """How :func:`comcat.finetune` trains. A step is one update of the weights; an epoch is one pass over the data.

    Attributes:
        epochs: passes over the training data, fractions allowed.
        max_steps: end after this many steps, if that is sooner; the schedules span the actual number of steps.
        lr, min_lr: learning rate after the warm-up and at the last step; cosine in between.
        warmup_epochs: linear warm-up.
        weight_decay: of AdamW; norms, biases, tokens and position tables are exempt.
        betas: of AdamW.
        layer_decay: factor on the learning rate per layer, counted from the output (BEiT); None: one rate for all.
        outputs: what student and teacher return (:mod:`comcat.evaluation.outputs`); None infers it from the student.
        distillation: ``soft``: divergence to the teacher, for logits at a temperature and times its square (Hinton et
            al., 2015); ``hard``: cross-entropy with the teacher's answer (DeiT), where there are answers; ``none``.
        distillation_weight: share w of the distillation, ``(1 - w) * CE(labels) + w * distillation``; features have no
            labels, and the distillation is all there is.
        distillation_temperature: of the soft form.
        feature_blocks: blocks whose outputs are pulled to the teacher's, from 0, or from the end when negative.
        feature_weight: factor on their mean squared error.
        feature_decay: how that factor falls to 0 over the run.
        label_smoothing: of the cross-entropy with the labels; None: 0.1 for classes, 0 for all else.
        mixup, cutmix: their alpha; 0 is off. Both need classes and an even batch size.
        mixup_prob: share of batches that are mixed at all; mixup_switch_prob: share of these cut, if both are on.
        clip_grad: largest norm of the gradient; None: not clipped.
        accumulate: batches per step.
        precision: autocast; the weights themselves stay as they are.
        grad_checkpointing: recompute activations instead of keeping them (less memory, a third more time).
        compile: run through ``torch.compile``.
        ema: decay of the running average of the weights, which is then what is evaluated and what results; it is
            min(ema, (1 + n) / (10 + n)) at step n, so that short runs average too. None: off.
        seed: of the order of the images, augmentation, Mixup and dropout.
        eval_every: epochs between evaluations; None: before and after only.
        checkpoint_every: steps between checkpoints; the last step has one always.
        keep_checkpoints: how many of the newest to keep.
        log_every: steps between lines in the log, which hold means over these steps.

    Raises:
        TrainingError: a value of the wrong type or out of range.
    """

    ranges: ClassVar = {
        "epochs": (0, math.inf),
        "max_steps": (1, math.inf),
        "lr": (0, math.inf),
        "min_lr": (0, math.inf),
        "warmup_epochs": (0, math.inf),
        "weight_decay": (0, math.inf),
        "betas": (0, 1 - 1e-12),
        "layer_decay": (1e-6, 1),
        "distillation_weight": (0, 1),
        "distillation_temperature": (1e-3, math.inf),
        "feature_weight": (0, math.inf),
        "label_smoothing": (0, 1 - 1e-12),
        "mixup": (0, math.inf),
        "cutmix": (0, math.inf),
        "mixup_prob": (0, 1),
        "mixup_switch_prob": (0, 1),
        "clip_grad": (1e-12, math.inf),
        "accumulate": (1, math.inf),
        "ema": (0, 1 - 1e-12),
        "seed": (0, 2**63 - 1),
        "eval_every": (1e-6, math.inf),
        "checkpoint_every": (1, math.inf),
        "keep_checkpoints": (1, math.inf),
        "log_every": (1, math.inf),
    }
    free: ClassVar = ("eval_every", "checkpoint_every", "keep_checkpoints", "log_every")

    epochs: float = setting(30.0, COURSE, "Passes over the training data.", "N")
    max_steps: int | None = setting(None, COURSE, "End after this many steps, if that is sooner.", "N")
    lr: float = setting(1e-4, COURSE, "Learning rate.", "X")
    min_lr: float = setting(1e-6, COURSE, "Learning rate of the last step.", "X")
    warmup_epochs: float = setting(1.0, COURSE, "Linear warm-up.", "N")
    weight_decay: float = setting(0.05, COURSE, "Of AdamW; none for norms and biases.", "X")
    betas: tuple[float, ...] = setting((0.9, 0.999), COURSE, "Of AdamW.", "X Y")
    layer_decay: float | None = setting(None, COURSE, "Learning rate decay per layer, e.g. 0.75.", "X")
    outputs: Kind | None = setting(
        None, LOSS, "What the model returns, where it cannot be told.", "classes|labels|values|features|maps"
    )
    distillation: Distillation = setting("soft", LOSS, "What the student learns from the teacher.", "soft|hard|none")
    distillation_weight: float = setting(0.5, LOSS, "Its share of the loss.", "X")
    distillation_temperature: float = setting(1.0, LOSS, "Of the soft form.", "X")
    feature_blocks: tuple[int, ...] = setting((), LOSS, "Blocks to align with the teacher's, e.g. 3,7,-1.", "N,N,...")
    feature_weight: float = setting(1.0, LOSS, "Factor on their mean squared error.", "X")
    feature_decay: Decay = setting("cosine", LOSS, "How it falls to 0.", "cosine|linear|none")
    label_smoothing: float | None = setting(None, LOSS, "Of the labels; 0.1 for classes.", "X")
    mixup: float = setting(0.0, AUGMENT, "Alpha of Mixup, e.g. 0.8; off.", "X")
    cutmix: float = setting(0.0, AUGMENT, "Alpha of CutMix, e.g. 1; off.", "X")
    mixup_prob: float = setting(1.0, AUGMENT, "Share of mixed batches.", "X")
    mixup_switch_prob: float = setting(0.5, AUGMENT, "Share of CutMix where both are on.", "X")
    clip_grad: float | None = setting(1.0, COURSE, "Largest norm of the gradient.", "X")
    accumulate: int = setting(1, COURSE, "Batches per step.", "N")
    precision: Precision = setting("no", COURSE, "Autocast.", "no|bf16|fp16")
    grad_checkpointing: bool = setting(False, COURSE, "Less memory, more time.")
    compile: bool = setting(False, COURSE, "Run through torch.compile.")
    ema: float | None = setting(None, COURSE, "Average the weights with this decay, e.g. 0.9998.", "X")
    seed: int = setting(0, RUN, "Of everything random.", "N")
    eval_every: float | None = setting(1.0, SAVING, "Epochs between evaluations.", "N")
    checkpoint_every: int = setting(1000, SAVING, "Steps between checkpoints.", "N")
    keep_checkpoints: int = setting(
        2, SAVING, "How many of the newest checkpoints to keep meanwhile.", "N", flag="--keep-last"
    )
    log_every: int = setting(50, SAVING, "Steps between lines of metrics.jsonl.", "N")

    def __post_init__(self) -> None:
        self.check()
        if len(self.betas) != 2:
            raise TrainingError(f"betas has {len(self.betas)} values; give two, e.g. [0.9, 0.999]")
        if self.epochs == 0 or self.lr == 0:
            raise TrainingError("epochs and lr must be above 0")
        if self.min_lr > self.lr:
            raise TrainingError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}; lower it or raise lr")

    def resolved(self, kind: str) -> FinetuneConfig:
        """These settings for outputs of one kind, with the defaults that depend on it.

        Raises:
            TrainingError: a setting that has no meaning for this kind.
        """
        smoothing = self.label_smoothing
        if smoothing is None:
            smoothing = _SMOOTHING if kind == "classes" else 0.0
        number = kind in ("values", "features")
        refused = {
            "mixup and cutmix": self.mixes and kind != "classes",
            "label_smoothing": smoothing > 0 and number,
            "distillation 'hard'": self.distillation == "hard" and number,
            "distillation_temperature": self.distillation_temperature != 1 and number,
            "distillation 'none'": kind == "features" and not self.distils,
        }
        why = {
            "mixup and cutmix": "mix class labels. Set both to 0",
            "label_smoothing": "is for logits. Set it to 0",
            "distillation 'hard'": "takes the answer of logits. Use 'soft'",
            "distillation_temperature": "divides logits. Set it to 1",
            "distillation 'none'": "leaves nothing to learn from: features have no labels. Use 'soft'",
        }
        for name, wrong in refused.items():
            if wrong:
                raise TrainingError(f"the outputs are {kind}, and {name} {why[name]}")
        return replace(self, label_smoothing=smoothing)

    @property
    def distils(self) -> bool:
        """Whether the loss compares outputs with the teacher's."""
        return self.distillation != "none" and self.distillation_weight > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether a term of the loss looks at the teacher."""
        return self.distils or self.needs_features

    @property
    def needs_features(self) -> bool:
        return bool(self.feature_blocks) and self.feature_weight > 0

    @property
    def mixes(self) -> bool:
        """Whether Mixup or CutMix is on."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mixup_prob > 0
