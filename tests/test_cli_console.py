"""What commands print: text of others as text, truthful last lines, signals."""

import errno
import io
import json
import os
import signal
import threading
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from rich.table import Table

from comcat.cli import console
from comcat.cli.console import PlainConsole, Screen, command
from comcat.errors import DataError
from comcat.models.running import out_of_memory
from comcat.report.text import one_line, printable
from comcat.storage.atomic import atomic_file

HOSTILE = "[/bold] [link=http://a]b[/link] \x1b]0;title\x07\x1b[31m \u202egnp\r\x9b1m\udc80 :smile:"
HARMLESS = "[/bold] [link=http://a]b[/link] ]0;title[31m gnp1m :smile:"


def shown(*things: Any, **options: Any) -> str:
    screen = Screen()
    screen.out = PlainConsole(file=io.StringIO(), width=200, **options)
    for thing in things:
        thing(screen)
    assert isinstance(screen.out.file, io.StringIO)
    return screen.out.file.getvalue()


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "color_system": None}])
def test_text_of_others_is_shown_as_it_is(options: dict[str, Any]) -> None:
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    for thing in (
        lambda s: s.out.print(HOSTILE),
        lambda s: s.out.print(table),
        lambda s: s.say("to ", (HOSTILE, "bold")),
        lambda s: s.done(HOSTILE),
    ):
        text = shown(thing, **options)
        assert HARMLESS in text
        for bad in ("\x1b]", "\x07", "\u202e", "\r", "\x9b", "\udc80"):
            assert bad not in text
    assert one_line("a\nb\x1b") == "a b"
    assert printable("a\nb\t") == "a\nb\t"


def test_long_stages_say_how_far_they_are_where_there_are_no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: clock[0])
    for json_output in (False, True):
        screen = Screen(json_output)
        screen.err = PlainConsole(file=io.StringIO(), width=40)
        for stage, seconds, total in (("probe", 25, 8), ("read", 20, None), ("quick", 0.1, 9)):
            for done in range(1, (total or 4) + 1):
                screen.progress(stage, done, total)
                clock[0] += seconds
        assert isinstance(screen.err.file, io.StringIO)
        said = [] if json_output else [
            "probe: 3 of 8, about 1 min 23 s left", "probe: 5 of 8, about 1 min 0 s left",
            "probe: 7 of 8, about 21 s left", "probe: done in 2 min 55 s", "read: 3",
        ]  # fmt: skip
        assert screen.err.file.getvalue().splitlines() == said


def failing(error: BaseException, capfd: pytest.CaptureFixture[str], **options: Any) -> tuple[int, str, str]:
    @command
    def fail(json_output: bool = False) -> None:
        raise error

    with pytest.raises(typer.Exit) as exit:
        fail(**options)
    out, err = capfd.readouterr()
    return exit.value.exit_code, out, err


def test_errors_are_one_line_and_json_stays_raw(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = failing(DataError("no 'a\nb' " + HOSTILE), capfd, json_output=True)
    assert (code, err) == (1, f"error: no 'a b' {HARMLESS}\n")
    assert json.loads(out)["error"] == "no 'a\nb' " + HOSTILE


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 20 MiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_memory(error: Exception, capfd: pytest.CaptureFixture[str]) -> None:
    assert out_of_memory(error)
    code, _, err = failing(error, capfd)
    assert (code, err[:21]) == (1, "error: out of memory.")


@pytest.mark.parametrize("closed", [False, True])
def test_a_document_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], closed: bool
) -> None:
    """A full disk behind ``>``, or no stdout at all."""

    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @command
    def work(json_output: bool = False) -> None:
        Screen(json_output).result({"a": 1})

    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", None if closed else Full())
        with pytest.raises(typer.Exit) as exit:
            work(json_output=True)
    assert exit.value.exit_code == 1
    why = "stdout is closed" if closed else os.strerror(errno.ENOSPC)
    text = f"error: the JSON document cannot be written to stdout: {why}. Send it elsewhere; "
    assert capfd.readouterr().err.startswith(text)


def test_other_runtime_errors_are_not_hidden() -> None:
    @command
    def fail() -> None:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        fail()


@pytest.mark.parametrize(
    ("name", "code", "word"),
    [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated"), ("SIGHUP", 129, "terminated")],
)
def test_signals_end_a_command_cleanly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, code: int, word: str
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    @command
    def work(first: bool) -> None:
        if first:
            with atomic_file(tmp_path / "a"):
                pass
        with atomic_file(tmp_path / "b") as file:
            file.write(b"half")
            os.kill(os.getpid(), number)
            threading.Event().wait(5)

    try:
        for first, said in ((False, "nothing was written"), (True, f"written before: '{tmp_path / 'a'}'")):
            with pytest.raises(typer.Exit) as exit:
                work(first)
            assert exit.value.exit_code == code
            assert capfd.readouterr().err == f"{word}; {said}\n"
            assert [path.name for path in tmp_path.iterdir()] == ["a"] * first
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with console.ending_well():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_adapter_without_layers_is_described() -> None:
    part = SimpleNamespace(layers={}, model="UNet")
    header = SimpleNamespace(
        name=HOSTILE,
        storage="int8",
        base={},
        scale=1.0,
        token=None,
        prompt=HOSTILE,
        components={"unet": part},
        training={},
    )
    text = shown(
        *(
            lambda s, line=line: s.say(*line)
            for line in import_module("comcat.cli.adapter_command")._lines(header, "5 B")
        )
    )
    assert text.count(HARMLESS) == 2
    assert "0 attention layers of UNet, no products" in text
