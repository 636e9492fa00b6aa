"""What every command shares: output, progress bars, errors in one line, JSON for machines."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from ..errors import CheckpointError, ComcatError
from ..report.format import duration
from ..report.text import one_line, printable
from ..wording import some

Command = TypeVar("Command", bound=Callable[..., None])

#: What speaks of torchao where that is installed, when transformers or diffusers are imported: nobody asked for it.
#: And of CUDA, when torch.compile looks for a compiler on a machine without.
_CHATTER = (
    "torch.utils._pytree",
    "torch.utils.cpp_extension",
    "diffusers.quantizers.torchao.torchao_quantizer",
)
#: Seconds after which a long stage says how far it is, where there is no terminal to draw bars on.
_SILENCE = 30.0
_given: list[str] = []
#: Who else is told what a command tells its user: progress, notes, warnings and the result, as plain data.
listeners: list[Callable[[dict[str, Any]], None]] = []


def _tell(event: dict[str, Any]) -> None:
    for listener in listeners:
        listener(event)


def remember_command(arguments: Iterable[str]) -> None:
    """Keep what was typed behind ``comcat``."""
    _given[:] = ["comcat", *arguments]


def given_command() -> str | None:
    """The command that runs, as a shell takes it; None outside the command line."""
    return shlex.join(_given) or None


class PlainConsole(Console):
    """A console on which text is text: square brackets are no markup, and nothing acts on the terminal.

    All that is printed passes here, tables and progress bars included; styles are given apart from the text.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class Screen:
    """Where a command writes: results to stdout, everything else to stderr.

    With ``json_output`` stdout receives exactly one JSON document, from :meth:`result`. As a context manager
    it shows a progress bar for every stage that is reported through :meth:`progress`.
    """

    def __init__(self, json_output: bool = False) -> None:
        self.json_output = json_output
        self.out = PlainConsole(quiet=json_output)
        self.err = PlainConsole(stderr=True)
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.err,
            disable=not self.err.is_terminal,
        )
        self._stages: dict[str, tuple[Any, float]] = {}
        self._said = time.perf_counter()

    def __enter__(self) -> Screen:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def progress(self, stage: str, done: int, total: int | None) -> None:
        """The progress protocol of the library: ``done`` of ``total`` steps of a stage."""
        _tell({"stage": stage, "done": done, "total": total})
        if stage not in self._stages:
            self._stages[stage] = (self._bars.add_task(stage, total=total), time.perf_counter())
        task, start = self._stages[stage]
        self._bars.update(task, completed=done, total=total)
        over = total is not None and done >= total
        if over:
            del self._stages[stage]
        if self.err.is_terminal or self.json_output:
            return
        # Without a terminal there are no bars: a line for a stage that took a while, some within a long one.
        now = time.perf_counter()
        seconds = now - start
        if over and seconds > 1:
            self._line(f"{stage}: done in {duration(seconds)}")
        elif not over and min(seconds, now - self._said) > _SILENCE:
            left = f", about {duration(seconds * (total - done) / done)} left" if total and done else ""
            self._line(f"{stage}: {done}{f' of {total}' if total else ''}{left}")

    def _line(self, text: str) -> None:
        self.err.print(text, style="dim", soft_wrap=True)
        self._said = time.perf_counter()

    def stage(self, name: str) -> Callable[[str, int, int | None], None]:
        """A progress callable that shows its stages under ``name``."""
        return lambda _, done, total: self.progress(name, done, total)

    def note(self, text: str) -> None:
        """A remark on stderr that is no error, such as a default that was taken."""
        _tell({"note": text})
        if not self.json_output:
            self.err.print(f"note: {one_line(text)}", style="dim", soft_wrap=True)

    def warn(self, text: str) -> None:
        _tell({"note": f"warning: {text}"})
        self.err.print(Text.assemble(("warning:", "yellow"), f" {one_line(text)}"), soft_wrap=True)

    def say(self, *parts: str | tuple[object, str]) -> None:
        """A line of the result: text, and (text, style) pairs such as ``(path, "bold")``."""
        pieces = [part if isinstance(part, str) else (one_line(str(part[0])), part[1]) for part in parts]
        self.out.print(Text.assemble(*pieces), soft_wrap=True)

    def done(self, *parts: str | tuple[object, str]) -> None:
        """:meth:`say`, of something that has succeeded."""
        self.say(("✓", "green"), " ", *parts)

    def result(self, document: dict[str, Any]) -> None:
        """The JSON document, when it was asked for.

        Raises:
            CheckpointError: nobody can write there; a reader that has gone is a BrokenPipeError.
        """
        _tell({"result": document})
        if not self.json_output:
            return
        try:
            if sys.stdout is None:  # closed by whoever started this
                raise OSError(errno.EBADF, "stdout is closed")
            sys.stdout.write(json.dumps(document, indent=2, default=str) + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise CheckpointError(
                f"the JSON document cannot be written to stdout: {error.strerror or error}. Send it elsewhere; what "
                "the command has written otherwise is complete"
            ) from error


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which end a command as Ctrl-C does: what is half-written goes, checkpoints stay."""

    number = signal.SIGTERM


class HungUp(Terminated):
    number = getattr(signal, "SIGHUP", signal.SIGTERM)


def exit_code(error: BaseException) -> int:
    """Of an interrupted command: 130, 143 or 129, as a shell has it."""
    return 128 + (error.number if isinstance(error, Terminated) else signal.SIGINT)


@contextmanager
def ending_well() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise in the main thread. A signal that is ignored (nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()
    before = {}
    for kind in {Terminated.number: Terminated, HungUp.number: HungUp}.values():

        def end(number: int, _: Any, kind: type[Terminated] = kind) -> None:
            if os.getpid() != owner:  # a child that reads images
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
                return
            raise kind

        if signal.getsignal(kind.number) is signal.SIG_DFL:
            before[kind.number] = signal.signal(kind.number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command(function: Command) -> Command:
    """Turn errors on purpose into one line and exit code 1, Ctrl-C into one line and exit code 130."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        from ..storage.atomic import written

        for name in _CHATTER:
            logging.getLogger(name).setLevel(logging.ERROR)
        json_output = bool(kwargs.get("json_output"))
        already = len(written)
        try:
            with ending_well():
                function(*args, **kwargs)
        except ComcatError as error:
            _fail(str(error), 1, json_output, error)
        except KeyboardInterrupt as error:
            kept = str(error) or what_was_written(written[already:])
            word = "terminated" if isinstance(error, Terminated) else "interrupted"
            _fail(f"{word}; {kept}", exit_code(error), json_output, error, prefix="")
        except BrokenPipeError as error:  # the reader of a pipe has had enough
            raise typer.Exit(1) from error
        except (MemoryError, OSError, RuntimeError) as error:
            from ..models.running import out_of_memory  # imports PyTorch

            if out_of_memory(error):
                _fail("out of memory. Use a smaller --batch-size, or --device cpu", 1, json_output, error)
            if not isinstance(error, OSError):
                raise
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            fix = "Free some space" if full else "Check the path and its permissions"
            _fail(f"{error.strerror or error}: {error.filename or 'a file'}. {fix}", 1, json_output, error)

    return run  # type: ignore[return-value]


def what_was_written(paths: list[Path]) -> str:
    """For a command that ends early: what it leaves under names that its user knows."""
    names = [f"'{path}'" for path in dict.fromkeys(paths) if not path.name.startswith(".") and path.exists()]
    if not names:
        return "nothing was written"
    return f"written before: {some(names)}"


def _fail(text: str, code: int, json_output: bool, cause: BaseException, prefix: str = "error: ") -> None:
    screen = Screen(json_output)
    screen.err.print(Text.assemble((prefix, "red"), one_line(text)), soft_wrap=True)
    with suppress(CheckpointError):  # which may be what has gone wrong
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
            Screen().err.print(f"process {rank}: {one_line(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as interrupt:
        if rank == 0:
            raise
        raise typer.Exit(exit_code(interrupt)) from interrupt
