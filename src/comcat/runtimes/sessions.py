"""A model ready to run somewhere: what every runtime's session is, and timings of several in turns."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import ComcatError, ModelError
from ..progress import Progress
from ..wording import by

if TYPE_CHECKING:
    from torch import nn

#: Where in its source OpenVINO has noticed something.
_PLACE = re.compile(r"Exception from src/|Check '.*' failed at ")
#: In which a session can be asked to compute.
PRECISIONS = ("fp32", "bf16", "fp16", "int8")


@dataclass(frozen=True)
class Port:
    """An input of a file: its name, its shape (None where any size will do), and the type of NumPy it wants."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype

    def takes(self, array: np.ndarray) -> bool:
        """Whether an array has this shape."""
        return array.ndim == len(self.shape) and all(
            size in (None, given) for size, given in zip(self.shape, array.shape, strict=True)
        )

    @property
    def text(self) -> str:
        return f"'{self.name}' ({' x '.join('any' if size is None else str(size) for size in self.shape)})"


class Session(ABC):
    """A model in one runtime, called with arrays.

    Args:
        source: an ``nn.Module``, or the path of a file; each runtime says which.
        precision: one of :data:`PRECISIONS`; threads: of the processor, default what the runtime takes by itself.

    Attributes:
        runtime, packages: its name, and what it needs to be installed; extra: of comcat, that installs them.
        precision: in which it computes; threads: None for what the runtime takes by itself.
        version: of the runtime.

    Raises:
        ComcatError: the runtime is not installed, or does not compute in this precision.
        ModelError: nothing that it can run, or no file.
    """

    runtime: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    extra: ClassVar[str] = ""
    precisions: ClassVar[tuple[str, ...]]

    def __init__(self, source: nn.Module | str | Path, precision: str = "fp32", threads: int | None = None) -> None:
        self.check(precision, threads)
        self.precision, self.threads = precision, threads
        self.version = ""
        self.name = str(source) if isinstance(source, (str, Path)) else type(source).__name__
        self._open(source)

    def __repr__(self) -> str:
        threads = "its own" if self.threads is None else self.threads
        return f"Session({self.name!r} in {self.runtime} {self.version}, {self.precision}, {threads} threads)"

    @classmethod
    def check(cls, precision: str, threads: int | None) -> None:
        """Raise ComcatError for a precision that the runtime does not compute in, or no number of threads."""
        if precision not in cls.precisions:
            raise ComcatError(
                f"{cls.runtime} does not compute in {precision!r} here; choose {' or '.join(cls.precisions)}"
            )
        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise ComcatError(f"threads is {threads!r}; give a number of 1 or more")

    @abstractmethod
    def _open(self, source: Any) -> None:
        """Make it ready to run."""

    @abstractmethod
    def _prepared(self, arrays: Sequence[np.ndarray], named: Mapping[str, np.ndarray]) -> Any:
        """The inputs as the runtime wants them; ModelError where it does not want them."""

    @abstractmethod
    def _run(self, inputs: Any) -> Any:
        """One batch, finished when it returns."""

    @abstractmethod
    def _arrays(self, outputs: Any) -> list[np.ndarray]:
        """The outputs of :meth:`_run`, copied."""

    def __call__(self, *arrays: np.ndarray, **named: np.ndarray) -> list[np.ndarray]:
        """Run one batch.

        Args:
            arrays: the inputs in their order; named: or by name.

        Returns:
            Every output, in order.

        Raises:
            ModelError: inputs of other names, numbers or shapes than the model takes.
        """
        return self._arrays(self._first(self._prepared(arrays, named)))

    def seconds(self, arrays: Sequence[np.ndarray], repeats: int = 1) -> list[float]:
        """How long a batch takes, each of ``repeats`` times after one that does not count; inputs are converted before.

        Raises:
            ModelError: as calling it.
        """
        inputs = self._prepared(arrays, {})
        self._first(inputs)
        return [self._timed(inputs) for _ in range(repeats)]

    def _first(self, inputs: Any) -> Any:
        """:meth:`_run` of inputs that have not run before, which may fail; ModelError then."""
        return self._run(inputs)

    def _timed(self, inputs: Any) -> float:
        begin = time.perf_counter()
        self._run(inputs)
        return time.perf_counter() - begin


class FileSession(Session):
    """One that reads a file and knows its inputs.

    Attributes:
        inputs: what the file takes.
        suffixes: endings of the files that the runtime reads.
    """

    suffixes: ClassVar[tuple[str, ...]]
    inputs: tuple[Port, ...]

    def _open(self, source: Any) -> None:
        if not isinstance(source, (str, Path)):
            raise ModelError(
                f"{self.runtime} runs exported files ({', '.join(self.suffixes)}), not {type(source).__name__}; write "
                "one with comcat.export"
            )
        path = Path(source)
        if path.suffix not in self.suffixes:
            raise ModelError(f"{self.runtime} reads {', '.join(self.suffixes)}, not '{path}'")
        if not path.is_file():
            raise ModelError(f"there is no file '{path}'")
        try:
            self._read(path)
        except (RuntimeError, ValueError, OSError) as error:
            raise unreadable(self.runtime, path, error) from error

    @abstractmethod
    def _read(self, path: Path) -> None:
        """Load it; sets ``inputs``."""

    def _first(self, inputs: Any) -> Any:
        try:
            return self._run(inputs)
        except Exception as error:  # of a runtime: they have no common base
            sizes = ", ".join(by(array.shape) for array in inputs.values())
            raise ModelError(f"{self.runtime} cannot run '{self.name}' on {sizes}: {first_line(error)}") from error

    def _prepared(self, arrays: Sequence[np.ndarray], named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        wanted = ", ".join(port.text for port in self.inputs)
        names = [port.name for port in self.inputs]
        given = dict(zip(names, arrays, strict=False)) | dict(named)
        if len(arrays) + len(named) != len(names) or set(given) != set(names):
            what = f"{len(arrays)} arrays" + (f" and {', '.join(map(repr, named))}" if named else "")
            raise ModelError(f"'{self.name}' takes {wanted}, and got {what}")
        made = {}
        for port in self.inputs:
            array = np.asarray(given[port.name])
            if not port.takes(array):
                raise ModelError(f"'{self.name}' takes {wanted}, and got {by(array.shape)} for '{port.name}'")
            if array.dtype.kind != port.dtype.kind:
                raise ModelError(f"'{self.name}' takes {port.dtype} for '{port.name}', and got {array.dtype}")
            made[port.name] = np.ascontiguousarray(array, dtype=port.dtype)
        return made


def first_line(error: BaseException) -> str:
    """What an error of a runtime says first, behind the places in the runtime's own source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    saying = [line for line in lines if not _PLACE.match(line)]
    return next(iter(saying or lines), type(error).__name__)


def unreadable(runtime: str, path: Path, error: BaseException) -> ModelError:
    """That a runtime cannot read a file, and what helps."""
    return ModelError(
        f"{runtime} cannot read '{path}': {first_line(error)}. It is damaged, incomplete or none of its files: write "
        "it again with comcat export"
    )


def in_turns(
    sessions: Sequence[Session],
    arrays: Sequence[np.ndarray] | Sequence[Sequence[np.ndarray]],
    rounds: int = 7,
    repeats: int = 1,
    progress: Progress | None = None,
    seconds: float | None = None,
    least_seconds: float = 0.0,
) -> list[list[float]]:
    """Seconds of a batch in several sessions, one after the other in every round, so that a busy machine slows all.

    Args:
        arrays: the inputs of all, or one list of inputs for each.
        rounds: of which each session has its turn in; after one that does not count.
        repeats: how often a session runs in its turn; the least of these counts for the round.
        progress: called as ``progress("timing", turns done, turns in all)``.
        seconds: after which no further round begins, once there were three; least_seconds: up to which rounds go on, so
            that what else a machine does for a while does not fall into all of them.

    Returns:
        For each session, one figure per round.
    """
    each = [list(arrays)] * len(sessions) if _same_for_all(arrays) else [list(one) for one in arrays]
    inputs = [one._prepared(own, {}) for one, own in zip(sessions, each, strict=True)]
    times: list[list[float]] = [[] for _ in sessions]
    turn, going, begin = 0, True, 0.0
    while going:
        begin = begin if turn > 1 else time.perf_counter()  # the first round warms up, or compiles
        for spent, one, own in zip(times, sessions, inputs, strict=True):
            least = min(one._timed(own) for _ in range(repeats))
            if turn:
                spent.append(least)
        turn, passed = turn + 1, time.perf_counter() - begin
        late = seconds is not None and turn > 3 and passed > seconds
        going = (turn <= rounds or passed < least_seconds) and not late
        if progress:
            progress("timing", turn, max(rounds + 1, turn + 1) if going else turn)
    return times


def _same_for_all(arrays: Sequence[Any]) -> bool:
    return all(isinstance(array, np.ndarray) for array in arrays)
