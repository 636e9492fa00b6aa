"""How a run begins: anew, or from the newest checkpoint of its directory; and what to say when it ends early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TrainingError
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
