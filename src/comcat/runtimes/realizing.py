"""A latency budget that is met in the runtime itself: the built model is measured, and the table put right by it.

A sum of layers' times is not the time of a model, for a runtime fuses and caches across them. So the model that a plan
makes is exported and timed against the dense one, in turns. Where what it saves is not what the plan promised, all
savings in the table are multiplied by what was measured over what was promised, and the plan is made again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from torch import nn

from ..errors import BudgetError
from ..planning.latency import LatencyTable
from ..planning.plan import Plan
from ..prepared import Prepared
from .layer_stacks import float_copy
from .sessions import Session, in_turns
from .whole_model import random_inputs, whole_session

#: A budget counts as met within this fraction of it.
TOLERANCE = 0.05
#: Plans are made anew until this is reached, so that the next measurement of the same model finds it met too.
_AIM = TOLERANCE / 2
#: Plans that are made anew at most.
_CORRECTIONS = 2
#: Turns of both models, and seconds that they take at least.
_ROUNDS, _SECONDS = 15, 4.0
Built = TypeVar("Built")


@dataclass(frozen=True)
class Realized:
    """What a built model takes in a runtime.

    Attributes:
        dense_ms, small_ms: medians for a batch.
        kept: the median of the small one over the dense one, turn by turn; low, high: its quartiles.
        planned: what of the dense time the plan's estimate says is kept; budget: what shall be.
    """

    dense_ms: float
    small_ms: float
    kept: float
    low: float
    high: float
    planned: float
    budget: float

    @property
    def off(self) -> float:
        """How far beside the budget, in units of it; positive where it takes too long."""
        return self.kept / self.budget - 1

    @property
    def met(self) -> bool:
        return abs(self.off) <= TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass
class Outcome(Generic[Built]):
    """What :func:`realize` came to.

    Attributes:
        plan, built: those closest to the budget; realized: what they take; table: that the plan was made by.
        tried: what was measured at every attempt.
    """

    plan: Plan
    built: Built
    realized: Realized
    table: LatencyTable
    tried: list[Realized] = field(default_factory=list)


class RuntimeClock:
    """The dense model in a table's runtime, and other models against it; a context manager, for their files.

    Attributes:
        dense: its session; inputs: a batch of random images, as the table was measured.

    Raises:
        ExportError: the model cannot be written for this runtime.
        ComcatError: the runtime is not installed.
    """

    def __init__(self, ready: Prepared, table: LatencyTable) -> None:
        self.ready, self.table = ready, table

    def __enter__(self) -> RuntimeClock:
        with ExitStack() as stack:
            made = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            self._folder = Path(stack.enter_context(made))
            table = self.table
            copied = float_copy(self.ready, table.runtime)
            self.inputs = random_inputs(copied.model, table.input_size, table.batch_size)
            self.dense = self.opened(copied.model, "dense")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        del self.dense
        self._stack.close()

    def opened(self, model: nn.Module, name: str = "small") -> Session:
        """A model in the runtime, as the table was measured."""
        table = self.table
        return whole_session(model, table.runtime, table.precision, table.threads or None, self._folder, name)

    def seconds(self, small: nn.Module) -> tuple[list[float], list[float]]:
        """Of the dense model and of another one, turn by turn."""
        dense, other = in_turns([self.dense, self.opened(small)], self.inputs, _ROUNDS, least_seconds=_SECONDS)
        return dense, other

    def measure(self, small: nn.Module, plan: Plan, budget: int) -> Realized:
        """What a plan's model takes; ``budget`` in nanoseconds of the table."""
        dense, other = self.seconds(small)
        low, kept, high = np.quantile(np.divide(other, dense), (0.25, 0.5, 0.75)).tolist()
        whole = self.table.dense
        planned = plan.estimate["latency"] / whole
        dense_ms, small_ms = (1e3 * float(np.median(one)) for one in (dense, other))
        return Realized(dense_ms, small_ms, kept, low, high, planned, budget / whole)


def realize(
    clock: RuntimeClock,
    plan: Plan,
    budget: int,
    build: Callable[[Plan], tuple[nn.Module, Built]],
    replan: Callable[[LatencyTable], Plan] | None,
) -> Outcome[Built]:
    """Build a plan's model, measure it, and plan again until the budget is met well within 5 %, twice at most.

    Args:
        budget: in nanoseconds of the table.
        build: the model of a plan, and what the caller wants to have back.
        replan: a plan by another table; None to take what comes of this one.
    """
    table, best, tried = clock.table, None, []
    while True:
        model, built = build(plan)
        realized = clock.measure(model, plan, budget)
        tried.append(realized)
        if best is None or abs(realized.off) < abs(best.realized.off):
            best = Outcome(plan, built, realized, table, tried)
        if abs(realized.off) <= _AIM or replan is None or len(tried) > _CORRECTIONS:
            return best
        # What the plan says it saves is by this table, whose dense time stays.
        promised, saved = 1 - realized.planned, 1 - realized.kept
        if promised <= 0 or saved <= 0:
            return best
        table = table.corrected(saved / promised)
        try:
            plan = replan(table)
        except BudgetError:  # what was possible by the first table is not by what was measured
            return best
