"""How a run begins: anew, or from the newest checkpoint of its directory; and what to say when it ends early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, TrainingError
from ..storage import temporary
from . import state
from .checks import check_new, newest
from .process import on_main
from .state import Saved

if TYPE_CHECKING:
    from accelerate import Accelerator


def open_run(accelerator: Accelerator, out: Path | None, resume: bool, note: Callable[[str], None]) -> Saved | None:
    """The checkpoint to continue from, whose tensors only the main process holds; None for a new run."""
    if out is None:
        if resume:
            raise TrainingError("there is nothing to resume without out; give the directory of the run")
        return None
    found: list[Saved] = []

    def look() -> tuple[int, Any] | None:
        if not resume:
            check_new(out)
            out.mkdir(parents=True, exist_ok=True)
            state.clean(out)
            return None
        state.clean(out)
        found.append(newest(out, note))
        return found[0].step, found[0].plain

    main = on_main(accelerator, look)
    if main is None or found:
        return found[0] if found else None
    return Saved(main[0], {}, main[1])


@contextmanager
def alone(accelerator: Accelerator, out: Path | None) -> Iterator[None]:
    """No other run works in ``out`` meanwhile; a run of several processes is one.

    Raises:
        CheckpointError: another one does, or the directory cannot be written to.
    """
    if out is None:
        yield
        return
    claim = temporary.claimed(out, out / ".run.comcat.lock")

    def enter() -> None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            claim.__enter__()
        except FileExistsError as error:
            raise TrainingError(f"output '{out}' is a file; choose a directory") from error
        except OSError as error:
            raise CheckpointError(
                f"cannot write to '{out}': {error.strerror or error}; choose another --out"
            ) from error

    on_main(accelerator, enter)
    try:
        yield
    finally:
        if accelerator.is_main_process:
            claim.__exit__(None, None, None)
            with suppress(OSError):
                out.rmdir()  # if nothing came of it


def how_to_go_on(out: Path | None) -> str:
    return (
        f"Continue with --resume (resume=True) from '{out}'" if out is not None else "Start again, with out to resume"
    )


def interrupted(out: Path | None, step: int | None) -> str:
    found = state.checkpoints(out) if out is not None else []
    step = found[0][0] if found else step  # one may have been written just now
    if out is None or step is None:
        return "no checkpoint was written yet"
    return f"the checkpoint of step {step} is in '{out}'; continue with --resume"
