"""Fine-tuning as a task of the engine: a student's steps, evaluations and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..evaluation.measure import evaluate
from ..evaluation.metric import Metric
from ..evaluation.results import Evaluation
from ..progress import Progress
from .engine import Run, Task, not_finite
from .loaders import Batches
from .log import Log
from .loop import StudentTrainer
from .randomness import EPOCH, isolated
from .state import Saved
from .validation import evaluate_together


@dataclass(frozen=True)
class Milestone:
    """An evaluation on the way.

    Attributes:
        step, epoch: finished steps and epochs.
    """

    step: int
    epoch: float
    evaluation: Evaluation

    def to_dict(self) -> dict[str, Any]:
        return {"step": self.step, "epoch": self.epoch, "evaluation": self.evaluation.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Milestone:
        return cls(data["step"], data["epoch"], Evaluation.from_dict(data["evaluation"]))


class FinetuneTask(Task):
    """A student that learns from its batches and its teacher.

    Args:
        student: receives the weights of every evaluation and the result; on the device of this process.
        metric: the user's own, in place of the scores of the outputs' kind.

    Attributes:
        history: evaluations so far.
    """

    def __init__(
        self,
        trainer: StudentTrainer,
        batches: Batches,
        student: nn.Module,
        eval_loader: Iterable[Any] | None,
        out: Path | None,
        progress: Progress | None,
        metric: Metric | None = None,
    ) -> None:
        self.trainer, self.batches, self.student, self.eval_loader = trainer, batches, student, eval_loader
        self.accelerator, self.config, self.out, self.metric = trainer.accelerator, trainer.config, out, metric
        self.total, self.per_epoch = trainer.steps.total, trainer.steps.per_epoch
        self.progress = progress if self.accelerator.is_main_process else None
        self.history: list[Milestone] = []
        self._due = trainer.steps.evaluations(self.config.eval_every)
        self._clock, self._clock_step = time.perf_counter(), 0

    def begin(self, run: Run) -> None:
        if not self.history:
            self.evaluate(run.step, run.log)
        self._clock, self._clock_step = time.perf_counter(), run.step

    def steps(self, done: int) -> Iterator[None]:
        steps = self.trainer.steps
        with closing(self.batches.onward(*steps.position(done))) as stream:  # type: ignore[type-var]
            for index in range(done, self.total):
                self.trainer.step(index, stream, steps.window(steps.position(index)[1]))
                yield
        self._load_student()

    def check(self, step: int, due: bool, kept: int | None) -> None:
        bad = self.trainer.first_bad_step() if due else None
        if bad is not None:
            found = f"; the checkpoint of step {kept} in '{self.out}' is good and kept"
            found = "; there is no checkpoint before it" if kept is None else found
            remedy = "a new run with a lower lr, or with precision bf16 or no"
            raise not_finite("the loss or its gradient", f"since step {bad}", found, remedy)

    def line(self, step: int) -> dict[str, Any]:
        means, now = self.trainer.means(), time.perf_counter()
        images = (step - self._clock_step) * self.config.accumulate
        images *= self.batches.batch_size * self.accelerator.num_processes
        rate = self.trainer.optimizer.param_groups[0]
        speed = images / max(now - self._clock, 1e-9)
        self._clock, self._clock_step = now, step
        return {**means, "lr": rate["lr"] / rate.get("lr_scale", 1.0), "images_per_second": speed}

    def evaluates(self, step: int) -> bool:
        return step in self._due

    def evaluate(self, step: int, log: Log) -> None:
        if self.eval_loader is None:
            return
        begin, epoch = time.perf_counter(), step / self.per_epoch
        self._load_student()
        with isolated(EPOCH, self.config.seed, step):
            result = self._measured(self.eval_loader)
        self.history.append(Milestone(step, epoch, result))
        log.write(step, epoch, {"evaluation": result.to_dict()})
        self._clock += time.perf_counter() - begin  # the speed is that of training

    def _measured(self, loader: Iterable[Any]) -> Evaluation:
        if self.metric is not None:  # every process has all of it
            return evaluate(self.student, loader, progress=self.progress, evaluate=self.metric)
        kind, teacher = self.trainer.answers.kind, self.trainer.teacher
        return evaluate_together(self.student, loader, self.accelerator, self.progress, kind, teacher)

    def take(self, step: int, plain: dict[str, Any]) -> Saved:
        history = [entry.to_dict() for entry in self.history]
        return self.trainer.snapshot.take(step, {**plain, "meter": self.trainer.meter(), "history": history})

    def restore(self, saved: Saved) -> None:
        self.trainer.snapshot.restore(saved)
        self.trainer.restore_meter(saved.plain["meter"])
        self.history = [Milestone.from_dict(entry) for entry in saved.plain["history"]]

    def _load_student(self) -> None:
        self.student.load_state_dict(self.trainer.trained.weights())
