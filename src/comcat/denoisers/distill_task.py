"""Distillation as a task of the training engine: its batches, steps and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..evaluation.outputs import Outputs, squared_error
from ..models.batches import Batch
from ..training.average import Average
from ..training.engine import Task, not_finite
from ..training.schedule import fall
from ..training.snapshot import Snapshot, Trained
from ..training.state import Saved
from .distill_config import DistillConfig
from .recorded_calls import Recording

if TYPE_CHECKING:
    from accelerate import Accelerator


class Examples:
    """The batches of a run: which examples each has depends on the seed and its number alone.

    Every pass goes through all examples in an order of its own; those of differing lengths never meet in a batch.
    """

    def __init__(self, recording: Recording, config: DistillConfig) -> None:
        self.recording, self.config = recording, config
        self._groups = recording.groups()
        self._passes: dict[int, list[list[int]]] = {}

    @property
    def per_pass(self) -> int:
        return sum(math.ceil(len(group) / self.config.batch_size) for group in self._groups)

    def batch(self, number: int) -> Batch:
        turn, place = divmod(number, self.per_pass)
        if turn not in self._passes:
            self._passes = {turn: self._shuffled(turn)}
        return self.recording.batch(self._passes[turn][place])

    def _shuffled(self, turn: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.config.seed + 1_000_003 * turn)
        chunks: list[list[int]] = []
        for group in self._groups:
            order = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
            chunks += [order[i : i + self.config.batch_size] for i in range(0, len(order), self.config.batch_size)]
        return [chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()]


class Distillation(Task):
    """A student that learns its teacher's predictions.

    Args:
        model: the student to train, a copy; teacher: frozen, on the run's device.
        spreads: of the teacher's predictions.
    """

    stage = "distill"

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        teacher: nn.Module,
        examples: Examples,
        spreads: Sequence[Tensor],
        config: DistillConfig,
    ) -> None:
        self.accelerator, self.config, self.examples = accelerator, config, examples
        self.total, self.per_epoch = config.steps, examples.per_pass / accelerator.num_processes
        self.teacher, self.spreads = teacher, list(spreads)
        self._dtype = next(model.parameters()).dtype
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.99)
        )
        self.model, self.optimizer = accelerator.prepare(model.eval(), optimizer)  # as it will draw: without dropout
        self.average = Average(self.model, config.ema) if config.ema is not None else None
        self.trained = Trained(accelerator, self.model, self.optimizer, self.average)
        self.snapshot = Snapshot(accelerator, self.trained)
        self.losses: list[float] = []

    def steps(self, done: int) -> Iterator[None]:
        for index in range(done, self.total):
            self.losses.append(self._step(index))
            yield

    def _step(self, index: int) -> float:
        config, accelerator = self.config, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * self._rate(index)
        batch = self.examples.batch(index * accelerator.num_processes + accelerator.process_index)
        batch = batch.to(accelerator.device, self._dtype)
        with accelerator.autocast():
            with torch.no_grad():
                theirs = self._predicted(self.teacher, batch)
            ours = self._predicted(self.model, batch)
            spreads = [spread.to(one.device, one.dtype) for spread, one in zip(self.spreads, ours, strict=True)]
            # Per entry: examples of other sizes than those whose spread was measured count alike.
            loss = squared_error("features", theirs, ours, spreads)
        accelerator.backward(loss)
        if config.clip_grad is not None:
            accelerator.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(index)
        return float(accelerator.reduce(loss.detach(), "mean"))

    def _predicted(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        return Outputs(model, "features")(batch.run(model), len(batch))

    def _rate(self, index: int) -> float:
        warmup = round(self.config.warmup * self.total)
        if index < warmup:
            return (index + 1) / warmup
        return fall((index - warmup) / max(1, self.total - warmup), "cosine")

    def check(self, step: int, due: bool, kept: int | None) -> None:
        if not math.isfinite(self.losses[-1]):
            found = f"; the checkpoint of step {kept} is good and kept" if kept else ""
            raise not_finite("the loss", f"at step {step}", found, "a lower lr, or precision bf16 or no")

    def line(self, step: int) -> dict[str, Any]:
        recent = self.losses[-self.config.log_every :]
        return {"loss": sum(recent) / len(recent), "lr": self.optimizer.param_groups[0]["lr"]}

    def take(self, step: int, plain: dict[str, Any]) -> Saved:
        return self.snapshot.take(step, {**plain, "losses": [*self.losses]})

    def restore(self, saved: Saved) -> None:
        losses = saved.plain["losses"]
        if len(losses) != saved.step:
            raise TrainingError(f"the checkpoint of step {saved.step} has {len(losses)} losses; start again")
        self.snapshot.restore(saved)
        self.losses = list(losses)
