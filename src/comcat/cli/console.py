"""What every command shares: output, progress bars, errors in one line, JSON for machines."""

from __future__ import annotations

import errno
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from ..errors import ComcatError

Command = TypeVar("Command", bound=Callable[..., None])


class Screen:
    """Where a command writes: results to stdout, everything else to stderr.

    With ``json_output`` stdout receives exactly one JSON document, from :meth:`result`. As a context manager
    it shows a progress bar for every stage that is reported through :meth:`progress`.
    """

    def __init__(self, json_output: bool = False) -> None:
        self.json_output = json_output
        self.out = Console(highlight=False, quiet=json_output)
        self.err = Console(stderr=True, highlight=False)
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.err,
            disable=not self.err.is_terminal,
        )
        self._stages: dict[str, tuple[Any, float]] = {}

    def __enter__(self) -> Screen:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def progress(self, stage: str, done: int, total: int | None) -> None:
        """The progress protocol of the library: ``done`` of ``total`` steps of a stage."""
        if stage not in self._stages:
            self._stages[stage] = (self._bars.add_task(stage, total=total), time.perf_counter())
        task, start = self._stages[stage]
        self._bars.update(task, completed=done, total=total)
        if total is not None and done >= total:
            del self._stages[stage]
            if not self.err.is_terminal and not self.json_output:
                # Without a terminal there are no bars: one line per stage that took a while.
                seconds = time.perf_counter() - start
                if seconds > 1:
                    self.err.print(f"{stage}: done in {seconds:.0f} s", style="dim")

    def stage(self, name: str) -> Callable[[str, int, int | None], None]:
        """A progress callable that shows its stages under ``name``."""
        return lambda _, done, total: self.progress(name, done, total)

    def note(self, text: str) -> None:
        """A remark on stderr that is no error, such as a default that was taken."""
        if not self.json_output:
            self.err.print(f"[dim]note: {escape(text)}[/dim]", soft_wrap=True)

    def warn(self, text: str) -> None:
        self.err.print(f"[yellow]warning:[/yellow] {escape(text)}", soft_wrap=True)

    def result(self, document: dict[str, Any]) -> None:
        """The JSON document, when it was asked for."""
        if self.json_output:
            sys.stdout.write(json.dumps(document, indent=2, default=str) + "\n")


def command(function: Command) -> Command:
    """Turn errors on purpose into one line and exit code 1, Ctrl-C into one line and exit code 130."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        json_output = bool(kwargs.get("json_output"))
        try:
            function(*args, **kwargs)
        except ComcatError as error:
            _fail(str(error), 1, json_output, error)
        except KeyboardInterrupt as error:
            kept = str(error) or "nothing was written"
            _fail(f"interrupted; {kept}", 130, json_output, error, prefix="")
        except BrokenPipeError as error:  # the reader of a pipe has had enough
            raise typer.Exit(1) from error
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            fix = "Free some space" if full else "Check the path and its permissions"
            _fail(f"{error.strerror or error}: {error.filename or 'a file'}. {fix}", 1, json_output, error)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "out of memory" not in str(error):
                raise
            _fail("out of memory. Use a smaller --batch-size, or --device cpu", 1, json_output, error)

    return run  # type: ignore[return-value]


def _fail(text: str, code: int, json_output: bool, cause: BaseException, prefix: str = "[red]error:[/red] ") -> None:
    screen = Screen(json_output)
    screen.err.print(f"{prefix}{escape(text)}", soft_wrap=True)
    screen.result({"error": text})
    raise typer.Exit(code) from cause


@contextmanager
def main_process_speaks(rank: int) -> Iterator[list[bool]]:
    """What goes wrong everywhere is said by the main process alone; later each process has its own troubles."""
    started: list[bool] = []
    try:
        yield started
    except ComcatError as error:
        if rank == 0:
            raise
        if started:
            typer.echo(f"process {rank}: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as interrupt:
        if rank == 0:
            raise
        raise typer.Exit(130) from interrupt
