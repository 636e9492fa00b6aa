"""A run from its first step to its last, whatever is trained: steps, log, evaluations, checkpoints, interruption.

What is trained, and how a step, a line of the log and a checkpoint of it look, says a :class:`Task`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import TrainingError
from ..progress import Progress
from . import state
from .fresh_or_resumed import interrupted
from .log import METRICS, Log
from .older_layouts import current
from .process import on_main
from .state import Saved

if TYPE_CHECKING:
    from accelerate import Accelerator


class Task(ABC):
    """What one kind of training says of its own. Steps that are done count from 1.

    Attributes:
        accelerator: of the run.
        config: settings, with ``log_every``, ``checkpoint_every`` and ``keep_checkpoints``.
        total: steps in all; per_epoch: steps in an epoch.
        stage: the name of its progress; log_name: the file of its log.
    """

    stage: ClassVar[str] = "train"
    log_name: ClassVar[str] = METRICS
    accelerator: Accelerator
    config: Any
    total: int
    per_epoch: float

    @abstractmethod
    def steps(self, done: int) -> Iterator[None]:
        """Make one step at each turn, from index ``done`` to the end."""

    @abstractmethod
    def check(self, step: int, due: bool, kept: int | None) -> None:
        """Raise TrainingError if a loss is not finite.

        Args:
            due: a line, an evaluation or a checkpoint follows, so that it must be known now.
            kept: the step of the newest checkpoint.
        """

    @abstractmethod
    def line(self, step: int) -> dict[str, Any]:
        """What the log says, since its last line."""

    @abstractmethod
    def take(self, step: int, plain: dict[str, Any]) -> Saved:
        """A checkpoint, ``plain`` included."""

    @abstractmethod
    def restore(self, saved: Saved) -> None:
        """Put a checkpoint back, whose tensors only the main process holds; what does not fit raises anything."""

    def begin(self, run: Run) -> None:  # noqa: B027 - most have nothing to do
        """Before the first step of this call."""

    def logs(self, step: int, saves: bool) -> bool:
        """Whether a line is due; ``saves``: a checkpoint is."""
        return step == self.total or step % self.config.log_every == 0

    def evaluates(self, step: int) -> bool:
        return False

    def evaluate(self, step: int, log: Log) -> None:  # noqa: B027 - nor to evaluate
        """Evaluate, or draw samples."""


class Run:
    """One run of a task; all processes go through it together.

    Args:
        fixed: what a resumed run must share with this one, as plain data.
        out: directory for the log and checkpoints, or None.
        saved: the checkpoint to continue from.

    Attributes:
        step: finished steps; saved_step: that of the newest checkpoint.
    """

    def __init__(
        self,
        task: Task,
        fixed: dict[str, Any],
        out: Path | None,
        saved: Saved | None,
        progress: Progress | None,
        note: Callable[[str], None],
    ) -> None:
        self.task, self.fixed, self.out = task, fixed, out
        main = task.accelerator.is_main_process
        self.progress = progress if main else None
        self.step = 0
        self.saved_step: int | None = None
        if saved is not None:
            with state.restoring(saved):
                task.restore(current(saved))
            self.step = self.saved_step = saved.step
        self.log = Log(out if main else None, self.step, note, task.log_name)

    def go(self) -> None:
        """All steps that are left.

        Raises:
            TrainingError: the loss or the gradient is not finite.
            KeyboardInterrupt: as it came; it says how to go on.
        """
        try:
            self.task.begin(self)
            with closing(self.task.steps(self.step)) as steps:  # type: ignore[type-var]
                for _ in steps:
                    self.step += 1
                    self._after_step()
        except KeyboardInterrupt as interrupt:
            interrupt.args = (interrupted(self.out, self.saved_step),)
            raise
        finally:
            self.log.close()

    def _after_step(self) -> None:
        task, config = self.task, self.task.config
        save = self.out is not None and (self.step == task.total or self.step % config.checkpoint_every == 0)
        log, evaluate = task.logs(self.step, save), task.evaluates(self.step)
        task.check(self.step, log or save or evaluate, self.saved_step)
        if log:
            self.write_line()
        if evaluate:
            task.evaluate(self.step, self.log)
        if save:
            self._save()
        if self.progress:  # a step that is told is whole: what an interruption leaves includes it
            self.progress(task.stage, self.step, task.total)

    def write_line(self) -> None:
        self.log.write(self.step, self.step / self.task.per_epoch, self.task.line(self.step))

    def _save(self) -> None:
        assert self.out is not None
        out, config = self.out, self.task.config
        saved = self.task.take(self.step, {"config": config.to_dict(), "run": self.fixed})
        self.log.sync()
        on_main(self.task.accelerator, lambda: str(state.write(out, saved, config.keep_checkpoints)))
        self.saved_step = self.step


def not_finite(what: str, since: str, kept: str, remedy: str) -> TrainingError:
    """The error of a run whose numbers have become NaN or infinite."""
    return TrainingError(f"{what} is NaN or infinite {since}{kept}. Try {remedy}")
