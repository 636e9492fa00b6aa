"""A command of comcat as a job of the page: the same code, in a process of its own that can be stopped at any time."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import ComcatError
from .work import Job, Stopped

#: The exit code of a command that was told to end, and did so in its own way.
TERMINATED = 128 + signal.SIGTERM


class CommandJob(Job):
    """One or more commands, each after the last one has succeeded.

    Args:
        commands: their arguments, e.g. ["customize", "base/", ...]; ``result`` is that of the first.
        words: the command line's names -> those of the page, for messages.

    Attributes:
        before: called when its turn comes, to make room.
    """

    def __init__(self, title: str, *commands: Sequence[str], words: Callable[[str], str] = str) -> None:
        super().__init__(title)
        self.commands = commands
        self.before: Callable[[], None] = lambda: None
        self._words = words
        self._process: subprocess.Popen[str] | None = None
        self._halted = False

    @property
    def typed(self) -> str:
        """The first command as one would type it."""
        return shlex.join(["comcat", *self.commands[0]])

    def run(self) -> None:
        self.before()
        for arguments in self.commands:
            found = self._run(arguments)
            self.result = self.result or found

    def halt(self) -> None:
        self._halted = True
        if self._process is not None:  # not SIGINT, which what runs in the background may have been told to ignore
            self._process.terminate()

    def kill(self) -> None:
        self._halted = True
        if self._process is not None:
            self._process.kill()

    def _run(self, arguments: Sequence[str]) -> dict[str, Any]:
        if self._halted:
            raise Stopped("It had not begun.")
        result: dict[str, Any] = {}
        with subprocess.Popen(
            [sys.executable, "-m", "comcat.ui.child", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C in the terminal ends the page, which ends this
        ) as process:
            self._process = process
            if self._halted:
                self.halt()
            assert process.stdout is not None
            for line in process.stdout:
                result = self._heed(line) or result
        self._process = None
        if process.returncode == 0:
            return result
        said = self._words(str(result.get("error", "")))
        if self._halted:
            raise Stopped(said.partition("; ")[2] if process.returncode == TERMINATED else "It had only begun.")
        if not said:
            raise ComcatError(
                f"comcat {arguments[0]} ended unexpectedly (exit code {process.returncode}), perhaps for want of "
                "memory. The terminal in which comcat ui runs says more"
            )
        raise ComcatError(said)

    def _heed(self, line: str) -> dict[str, Any] | None:
        """One line of the command; its result where it is one."""
        event = json.loads(line)
        if "stage" in event:
            self.progress(event["stage"], event["done"], event["total"])
        elif "note" in event:
            self.notes.append(self._words(event["note"]))
        return event.get("result")
