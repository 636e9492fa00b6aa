"""The training loop: one step, and what happens between steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from ..errors import TrainingError
from ..evaluation.outputs import Outputs
from ..models.running import explained
from .answers import Answers
from .average import Average
from .block_outputs import Features, block_names
from .finetune_config import FinetuneConfig
from .losses import Loss, Terms, feature_loss, terms
from .randomness import MIXUP, isolated
from .schedule import Steps, fall, learning_rate
from .snapshot import Snapshot, Trained

if TYPE_CHECKING:
    from accelerate import Accelerator

#: Kinds of outputs of which distilled models have a second classifier.
DISTILLED = ("classes", "labels")
TERMS = (*Terms._fields, "grad_norm")


class StudentTrainer:
    """A student in training: everything that a step needs and changes.

    Args:
        model: the student to train, a copy that may be wrapped; teacher: in evaluation mode, on this device.
        answers: of both; loss: of their kind.

    Raises:
        TrainingError: nothing to train, or a block that does not exist.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        teacher: nn.Module | None,
        config: FinetuneConfig,
        steps: Steps,
        answers: Answers,
        loss: Loss,
    ) -> None:
        self.answers, self.loss = answers, loss
        self.accelerator, self.config, self.steps = accelerator, config, steps
        parameter = next((p for p in model.parameters() if p.requires_grad), None)
        if parameter is None:
            raise TrainingError("no parameter of the student requires a gradient; unfreeze some")
        self._dtype = parameter.dtype
        self._hooks: list[Features] = []
        if config.needs_features and teacher is not None:
            names = block_names(teacher, config.feature_blocks)
            self._hooks = [Features(model, names), Features(teacher, names)]
        optimizer = create_optimizer_v2(
            model,
            "adamw",
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            betas=tuple(config.betas),
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.average = Average(self.model, config.ema) if config.ema is not None else None
        self.trained = Trained(accelerator, self.model, self.optimizer, self.average)
        self.snapshot = Snapshot(accelerator, self.trained)
        self.teacher = teacher
        self._teacher: Any = teacher
        self._run: Any = self.model
        if config.compile:
            self._run = torch.compile(self.model)
            self._teacher = torch.compile(teacher) if teacher is not None else None
        self._mixup = _mixup(config, answers.classes) if config.mixes else None
        device = accelerator.device
        # Sums since the last line of the log and the first bad step stay on the device: reading them would wait for it.
        self._sums = torch.zeros(len(TERMS), device=device)
        self._count = 0
        self._bad = torch.full((), -1, dtype=torch.int64, device=device)

    def close(self) -> None:
        """Leave no hooks behind in the teacher."""
        for features in self._hooks:
            features.remove()

    def step(self, index: int, batches: Iterator[tuple[Tensor, Tensor | None]], count: int) -> None:
        """One update from the next ``count`` batches; ``index`` is the number of the step, from 0."""
        accelerator, config = self.accelerator, self.config
        rate = learning_rate(index, self.steps, config.lr, config.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.model.train()
        sums = torch.zeros_like(self._sums)
        for micro in range(count):
            batch = next(batches)
            last = micro == count - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                loss = self._losses(index, micro, *batch)
                accelerator.backward(loss.loss / count)
            sums[:-1] += torch.stack([term.detach() for term in loss]).to(sums) / count
        norm = accelerator.clip_grad_norm_(self.model.parameters(), config.clip_grad or float("inf"))
        sums[-1] = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).detach()  # sharded under FSDP
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(index)
        # The gradient scaler of fp16 skips steps with infinite gradients; without one they ruin the weights.
        good = sums[0].isfinite() & (sums[-1].isfinite() | (accelerator.scaler is not None))
        self._bad = torch.where((self._bad < 0) & ~good, index + 1, self._bad)
        self._sums += sums
        self._count += 1

    def _losses(self, index: int, micro: int, images: Tensor, labels: Tensor | None) -> Terms:
        device, config = self.accelerator.device, self.config
        images = images.to(device, self._dtype, non_blocking=True)
        labels = None if labels is None else labels.to(device, non_blocking=True)
        if self._mixup is not None:
            with isolated(MIXUP, config.seed, index, micro, self.accelerator.process_index):
                images, labels = self._mixup(images.clone(), labels)
        theirs = None
        with explained(images):
            if self._teacher is not None:
                with torch.no_grad(), self.accelerator.autocast():
                    theirs = self._answers(self._teacher, self._teacher(images), len(images))
            outputs = self._answers(self.model, self._run(images), len(images))
        features = None
        if self._hooks:
            features = feature_loss(self._hooks[0].take(), self._hooks[1].take())
        left = fall(index / max(1, self.steps.total - 1), config.feature_decay)
        return terms(config, outputs, labels, theirs, features, left, self.loss)

    def _answers(self, model: nn.Module, raw: Any, count: int) -> Any:
        """The outputs: a tensor, a list of features, or the pair of a distilled model's two classifiers."""
        kind = self.answers.kind
        pair = isinstance(raw, tuple) and len(raw) == 2 and not isinstance(raw[1], tuple)
        if (kind == "classes" and isinstance(raw, Tensor)) or (kind in DISTILLED and pair):
            return raw
        found = Outputs(model, kind)(raw, count)
        return found if kind == "features" else found[0]

    def first_bad_step(self) -> int | None:
        """The first step (from 1) at which a loss or a gradient was not finite on any process; waits for the device."""
        steps = [step for step in self._everywhere(self._bad).tolist() if step >= 0]
        return min(steps, default=None)

    def means(self) -> dict[str, float]:
        """The terms of the loss and the gradient norm, means over the steps since the last call and all processes."""
        sums = self.accelerator.reduce(self._sums, "mean") if self.accelerator.num_processes > 1 else self._sums
        means = (sums / max(1, self._count)).tolist()
        self._sums, self._count = torch.zeros_like(self._sums), 0
        return dict(zip(TERMS, means, strict=True))

    def meter(self) -> list[Any]:
        """What :meth:`means` has gathered so far on every process, for a checkpoint."""
        sums = self._everywhere(self._sums).view(-1, len(TERMS))
        return [self._count, sums.tolist()]

    def restore_meter(self, meter: list[Any]) -> None:
        count, sums = meter[0], torch.tensor(meter[1][self.accelerator.process_index])
        if type(count) is not int or count < 0 or sums.shape != self._sums.shape:
            raise ValueError("its sums of losses are of another kind")
        self._count, self._sums = count, sums.to(self._sums)

    def _everywhere(self, tensor: Tensor) -> Tensor:
        gathered: Tensor = self.accelerator.gather(tensor[None])
        return gathered


def _mixup(config: FinetuneConfig, num_classes: int) -> Mixup:
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        label_smoothing=config.label_smoothing,
        num_classes=num_classes,
    )


def trainable_copy(student: nn.Module, config: FinetuneConfig, kind: str = "classes") -> nn.Module:
    """A copy of the student, set up as it is trained: wrappers and hooks of training never touch the student itself.

    Raises:
        TrainingError: gradient checkpointing that the model does not offer.
    """
    model: Any = copy.deepcopy(student)
    if hasattr(model, "set_distilled_training"):
        # The second classifier learns from the teacher; without one both are averaged, as in evaluation.
        model.set_distilled_training(config.distils and kind in DISTILLED)
    if config.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise TrainingError(f"{type(student).__name__} has no gradient checkpointing; train without it")
        model.set_grad_checkpointing(True)
    return model
