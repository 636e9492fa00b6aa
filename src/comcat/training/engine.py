"""A run from its first step to its last: steps, log, evaluations and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import TrainingError
from ..evaluation.measure import Evaluation, evaluate
from ..evaluation.metric import Metric
from ..progress import Progress
from . import state
from .loaders import Batches
from .log import Log
from .loop import Trainer
from .process import on_main
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


class Run:
    """One run.

    Args:
        student: receives the weights of every evaluation; on the device of this process.
        fixed: what a resumed run must share with this one, as plain data.
        out: directory for checkpoints, or None.
        metric: the user's own, in place of the scores of the outputs' kind.

    Attributes:
        step: finished steps.
        history: evaluations so far.
    """

    def __init__(
        self,
        trainer: Trainer,
        batches: Batches,
        student: nn.Module,
        eval_loader: Iterable[Any] | None,
        fixed: dict[str, Any],
        out: Path | None,
        log: Log,
        progress: Progress | None,
        metric: Metric | None = None,
    ) -> None:
        self.trainer, self.batches, self.student, self.eval_loader = trainer, batches, student, eval_loader
        self.fixed, self.out, self.log, self.metric = fixed, out, log, metric
        self.progress = progress if trainer.accelerator.is_main_process else None
        self.step = 0
        self.history: list[Milestone] = []
        self.saved_step: int | None = None
        self._clock, self._clock_step = time.perf_counter(), 0

    @property
    def epoch(self) -> float:
        return self.step / self.trainer.steps.per_epoch

    def restore(self, saved: Saved) -> None:
        """Continue from a checkpoint."""
        with state.restoring(saved):
            self.trainer.snapshot.restore(saved)
            self.trainer.restore_meter(saved.plain["meter"])
            self.history = [Milestone.from_dict(entry) for entry in saved.plain["history"]]
        self.step = self.saved_step = self._clock_step = saved.step

    def go(self) -> None:
        """All steps that are left; afterwards the student holds the result.

        Raises:
            TrainingError: the loss or the gradient is not finite.
        """
        steps = self.trainer.steps
        if not self.history:
            self._evaluate()
        self._clock = time.perf_counter()
        due = steps.evaluations(self.trainer.config.eval_every)
        while self.step < steps.total:
            epoch, batch = steps.position(self.step)
            with closing(self.batches.epoch(epoch, batch)) as stream:  # type: ignore[type-var]
                while self.step < steps.total and steps.position(self.step)[0] == epoch:
                    self.trainer.step(self.step, stream, steps.window(steps.position(self.step)[1]))
                    self.step += 1
                    self._after_step(due)
        self._load_student()

    def _after_step(self, due: set[int]) -> None:
        config, last = self.trainer.config, self.step == self.trainer.steps.total
        log = last or self.step % config.log_every == 0
        save = self.out is not None and (last or self.step % config.checkpoint_every == 0)
        evaluate = self.step in due
        if log or save or evaluate:
            self._check()
        if log:
            self._log()
        if evaluate:
            self._evaluate()
        if save:
            self._save()
        if self.progress:
            self.progress("train", self.step, self.trainer.steps.total)

    def _check(self) -> None:
        bad = self.trainer.first_bad_step()
        if bad is None:
            return
        kept = f"the checkpoint of step {self.saved_step} in '{self.out}' is good and kept"
        if self.saved_step is None:
            kept = "there is no checkpoint before it"
        raise TrainingError(
            f"the loss or its gradient is NaN or infinite since step {bad}; {kept}. Try a new run with a lower lr, or "
            "with precision bf16 or no"
        )

    def _log(self) -> None:
        means = self.trainer.means()
        now = time.perf_counter()
        images = (self.step - self._clock_step) * self.trainer.config.accumulate
        images *= self.batches.batch_size * self.trainer.accelerator.num_processes
        rate = self.trainer.optimizer.param_groups[0]
        values = {
            **means,
            "lr": rate["lr"] / rate.get("lr_scale", 1.0),
            "images_per_second": images / max(now - self._clock, 1e-9),
        }
        self.log.write(self.step, self.epoch, values)
        self._clock, self._clock_step = now, self.step

    def _evaluate(self) -> None:
        if self.eval_loader is None:
            return
        begin = time.perf_counter()
        self._load_student()
        with isolated(EPOCH, self.trainer.config.seed, self.step):
            result = self._measured(self.eval_loader)
        self.history.append(Milestone(self.step, self.epoch, result))
        self.log.write(self.step, self.epoch, {"evaluation": result.to_dict()})
        self._clock += time.perf_counter() - begin  # the speed is that of training

    def _measured(self, loader: Iterable[Any]) -> Evaluation:
        trainer = self.trainer
        if self.metric is not None:  # every process has all of it
            return evaluate(self.student, loader, progress=self.progress, evaluate=self.metric)
        kind, teacher = trainer.answers.kind, trainer.teacher
        return evaluate_together(self.student, loader, trainer.accelerator, self.progress, kind, teacher)

    def _save(self) -> None:
        assert self.out is not None
        out, config = self.out, self.trainer.config
        plain = {
            "config": config.to_dict(),
            "run": self.fixed,
            "meter": self.trainer.meter(),
            "history": [entry.to_dict() for entry in self.history],
        }
        saved = self.trainer.snapshot.take(self.step, plain)
        self.log.sync()
        on_main(self.trainer.accelerator, lambda: str(state.write(out, saved, config.keep_checkpoints)))
        self.saved_step = self.step

    def _load_student(self) -> None:
        self.student.load_state_dict(self.trainer.snapshot.weights())
