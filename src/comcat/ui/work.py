"""Long work, one piece at a time: what is asked for meanwhile waits in line, whichever browser window asked."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from typing import Any, ClassVar

from ..errors import ComcatError

#: States of a job.
WAITING, RUNNING, STOPPING, DONE, STOPPED, FAILED = "waiting", "running", "stopping", "done", "stopped", "failed"
ENDED = (DONE, STOPPED, FAILED)


class Stopped(KeyboardInterrupt):
    """A job ends early because it was told to; the text says what is kept."""


class Job(ABC):
    """One piece of long work.

    Attributes:
        kind: the tab that it belongs to; title: what it does, e.g. "Training dog".
        state: one of the states above.
        stage, done, total: progress; since: when the stage began (``time.monotonic``).
        notes: remarks on the way; result: what came of it; message: why it ended early.
    """

    kind: ClassVar[str]

    def __init__(self, title: str) -> None:
        self.title = title
        self.state = WAITING
        self.stage, self.done, self.total = "", 0, None  # type: str, int, int | None
        self.started = self.ended = self.since = 0.0
        self.notes: list[str] = []
        self.result: dict[str, Any] = {}
        self.message = ""

    @abstractmethod
    def run(self) -> None:
        """Do it.

        Raises:
            ComcatError: it cannot be done. Stopped: after :meth:`halt`.
        """

    @abstractmethod
    def halt(self) -> None:
        """End :meth:`run` soon; called from another thread, perhaps more than once."""

    def kill(self) -> None:  # noqa: B027 - most end when they are told to
        """End :meth:`run` at once, where :meth:`halt` has not."""

    def progress(self, stage: str, done: int, total: int | None) -> None:
        """The progress protocol of the library."""
        if stage != self.stage or done < self.done:
            self.stage, self.since = stage, time.monotonic()
        self.done, self.total = done, total

    @property
    def over(self) -> bool:
        return self.state in ENDED


class Line:
    """The jobs of all windows: one runs, in a thread of its own; the others wait in the order in which they came."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._latest: dict[str, Job] = {}
        self._closed = False
        self.current: Job | None = None
        self._thread = threading.Thread(target=self._work, name="comcat-ui-work", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> None:
        """Run a job when its turn comes.

        Raises:
            ComcatError: one of its kind is on or waits already; the page is closing.
        """
        with self._lock:
            before = self._latest.get(job.kind)
            if self._closed:
                raise ComcatError("the page is closing; start it again: comcat ui")
            if before is not None and not before.over:
                raise ComcatError(
                    f"“{before.title}” is {before.state} already, perhaps from another window. Wait for it, or stop it"
                )
            self._latest[job.kind] = job
            self._waiting.append(job)
            self._lock.notify()

    def latest(self, kind: str) -> Job | None:
        """The newest job of a tab, over or not."""
        return self._latest.get(kind)

    def waiting(self) -> list[Job]:
        with self._lock:
            return list(self._waiting)

    def stop(self, job: Job) -> None:
        """Take a job out of the line, or end it if it runs."""
        with self._lock:
            if job in self._waiting:
                self._waiting.remove(job)
                job.state, job.message = STOPPED, "It had not begun."
                return
            if job is not self.current or job.over:
                return
            job.state = STOPPING
        job.halt()

    def close(self, patience: float = 20.0) -> None:
        """Stop everything; return when it has ended, or after ``patience`` seconds."""
        with self._lock:
            self._closed = True
            jobs = [*self._waiting, *([self.current] if self.current else [])]
            self._lock.notify()
        for job in jobs:
            self.stop(job)
        self._thread.join(patience)
        if self._thread.is_alive():
            for job in jobs:
                job.kill()
            self._thread.join(patience)

    def _work(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                job = self.current = self._waiting.popleft()
                job.state = RUNNING
            job.started = job.since = time.monotonic()
            state, message = _outcome(job)
            with self._lock:
                job.ended = time.monotonic()
                job.message, job.state = message, state
                self.current = None


def _outcome(job: Job) -> tuple[str, str]:
    """Run it; how it ended, and why. The line must go on whatever happens in a job."""
    try:
        job.run()
    except Stopped as error:
        return STOPPED, str(error)
    except ComcatError as error:
        return FAILED, str(error)
    except Exception as error:  # a defect: its text on the page, all of it in the terminal
        import traceback

        from ..models.running import out_of_memory

        if isinstance(error, (MemoryError, RuntimeError)) and out_of_memory(error):
            return FAILED, "out of memory. Draw fewer or smaller pictures, or start the page with --device cpu"
        traceback.print_exc()
        return FAILED, f"{type(error).__name__}: {error}. The terminal in which comcat ui runs says more"
    return DONE, ""
