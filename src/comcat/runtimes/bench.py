"""Several models side by side, in every runtime: how long a batch takes, in turns, and what they are worth."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import ComcatError, ModelError
from ..evaluation.measure import evaluate
from ..models.machine import device_name, versions
from ..models.profile import default_input_size
from ..models.running import out_of_memory
from ..progress import Progress
from ..storage.atomic import atomic_file
from ..wording import by
from .bench_candidate import Candidate, SessionModule, candidate
from .registry import available, session_class
from .sessions import Session, in_turns

#: A model in one of its sessions.
Cell = tuple[Candidate, Session]
#: Seconds for all turns of one batch size, after which there are no more; but three at least.
_SECONDS, _LEAST_ROUNDS = 60.0, 3


@dataclass(frozen=True)
class BenchRow:
    """One model in one runtime.

    Attributes:
        median_ms, low_ms, high_ms: of a batch: the median and the quartiles of all turns.
        speedup: median over the turns of the first model's time over this one's, in the same runtime and precision
            (in its first precision there for a quantized file); None where the first model was not run.
        mac_ratio: of the first model over this one, by which time would fall if time went with MACs.
        accuracy, metric, unit: the score that counts most, where there is data, its name, and ``%`` or nothing.
    """

    model: str
    runtime: str
    precision: str
    batch_size: int
    median_ms: float
    low_ms: float
    high_ms: float
    images_per_second: float
    speedup: float | None = None
    macs: int | None = None
    params: int | None = None
    bytes: int | None = None
    mac_ratio: float | None = None
    accuracy: float | None = None
    metric: str | None = None
    unit: str | None = None


@dataclass
class Bench:
    """What :func:`bench` measured.

    Attributes:
        rows: by batch size, runtime and precision, models in the order in which they were given.
        machine: device, threads and versions; left_out: what was not measured, and why.
        images: that accuracy was measured on.
    """

    rows: list[BenchRow]
    machine: dict[str, Any]
    left_out: list[str] = field(default_factory=list)
    images: int | None = None

    @property
    def place(self) -> str:
        """The processor and its threads, in words."""
        threads = self.machine.get("threads")
        count = "threads as each runtime takes them" if threads is None else f"{threads} thread{'s' * (threads != 1)}"
        return f"{self.machine['device']}, {count}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the figures as JSON, atomically."""
        with atomic_file(path) as file:
            file.write((json.dumps(self.to_dict(), indent=1) + "\n").encode())

    def draw(self, path: str | Path) -> None:
        """Write a PNG: accuracy against latency with its Pareto front, or, without data, speed-up against MACs.

        Raises:
            ComcatError: matplotlib is not installed.
        """
        from ..report.bench_figure import draw_bench

        draw_bench(self, path)


def bench(
    models: Mapping[str, nn.Module | str | Path],
    runtimes: Sequence[str] | None = None,
    precisions: Sequence[str] = ("fp32",),
    batch_sizes: Sequence[int] = (1, 8),
    threads: int | None = None,
    rounds: int = 15,
    loader: Iterable[Any] | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Time models against the first of them, in turns over all of them and all runtimes.

    Args:
        models: name -> a model, or the path of an exported file (``.onnx``, ``.xml``). Models are exported for the
            runtimes that read files; a quantized file runs in its own precision.
        runtimes: names of :data:`comcat.runtimes.registry.RUNTIMES`; default all that are installed, where what one
            cannot run is left out with a note.
        precisions: of models and files that are not quantized; what a runtime has not is left out with a note.
        batch_sizes: images in a batch; threads: of the processor, default what each runtime takes by itself.
        rounds: turns of each; fewer, but three at least, where a batch size takes longer than a minute.
        loader: batches of (images, labels), for the accuracy of every model in every precision, each as its first
            runtime computes it.
        progress: called as ``progress(stage, done, total)``.

    Raises:
        ComcatError: a runtime that is asked for and missing (the message has the pip line), or nothing to measure.
        ExportError: a model that cannot be written for a runtime that is asked for.
        ModelError: no model, models of different image sizes, or a file that does not take these batches.
    """
    if not models or rounds < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise ModelError("a bench needs a model or more, and batch sizes and rounds of 1 or more")
    for name in runtimes or ():
        session_class(name)
    found = [candidate(name, source) for name, source in models.items()]
    size = _size(found)
    for one in found:
        one.check_batches(batch_sizes)
    work = _Bench(found, size, threads, progress, strict=runtimes is not None)
    with work.stack:
        work.open(list(runtimes or available()), list(dict.fromkeys(precisions)))
        rows = [row for batch in batch_sizes for row in work.measure(batch, rounds)]
        if not rows:
            raise work.nothing()
        images = None
        if loader is not None:
            rows, images = work.scored(rows, loader)
    machine = {"device": device_name(torch.device("cpu")), "threads": threads, "torch_threads": torch.get_num_threads()}
    runtimes_there = {one.runtime: one.version for _, one in work.cells}
    return Bench(rows, {**machine, "runtimes": runtimes_there, "versions": versions()}, work.reasons(), images)


def _size(found: Sequence[Candidate]) -> tuple[int, ...]:
    """(C, H, W) of all models."""
    sizes: dict[tuple[int, ...], str] = {}
    for one in found:
        size = one.file_size() if one.model is None else tuple(default_input_size(one.model))
        if size is not None:
            sizes.setdefault(size, one.name)
    if not sizes:
        raise ModelError("the files take images of any size: give the model that they were made from too (--dense)")
    if len(sizes) > 1:
        said = ", ".join(f"'{name}' takes {by(size)}" for size, name in sizes.items())
        raise ModelError(f"the models are for images of different sizes: {said}; give models of one size")
    return next(iter(sizes))


class _Bench:
    """The sessions of a bench: ``cells`` of (candidate, session), and what was left out."""

    def __init__(
        self,
        found: Sequence[Candidate],
        size: Sequence[int],
        threads: int | None,
        progress: Progress | None,
        strict: bool,
    ) -> None:
        self.found, self.size, self.threads, self.progress, self.strict = found, size, threads, progress, strict
        self.stack = ExitStack()
        self.cells: list[Cell] = []
        self.left_out: dict[tuple[str, str], list[str]] = {}

    def open(self, runtimes: list[str], precisions: list[str]) -> None:
        """A session for every model, runtime and precision that go together."""
        made = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        folder = Path(self.stack.enter_context(made))
        wanted: list[tuple[Candidate, str, str]] = []
        for runtime in runtimes:
            known = session_class(runtime).precisions
            for precision in precisions:
                if precision == "int8":
                    self._note(f"{runtime} in int8", "give a file of comcat export --int8 beside the models")
                    continue
                if precision not in known:
                    self._note(f"{runtime} in {precision}", "it does not compute models in that precision")
                    continue
                wanted += [(one, runtime, precision) for one in self.found if not one.quantized]
            wanted += [(one, runtime, "int8") for one in self.found if one.quantized]
        for done, (one, runtime, precision) in enumerate(wanted):
            with self._left_out(one, f"{runtime} in {precision}"):
                session = one.open(runtime, precision, self.threads, folder)
                self.cells += [] if session is None else [(one, session)]
            self._tell("export and open", done + 1, len(wanted))
        if not self.cells:
            raise self.nothing()

    def nothing(self) -> ComcatError:
        return ComcatError(f"there is nothing to measure: {'; '.join(self.reasons())}")

    @contextmanager
    def _left_out(self, one: Candidate, where: str) -> Iterator[None]:
        """What fails inside is noted, or raised where these runtimes were asked for."""
        try:
            yield
        except ComcatError as error:
            if self.strict:
                raise
            self._note(where, str(error), one.name)

    def _note(self, where: str, why: str, *names: str) -> None:
        self.left_out.setdefault((where, why), []).extend(names)

    def reasons(self) -> list[str]:
        """What was left out, and why, once for all models that it is true of."""
        return [
            f"{', '.join(names)} in {where}: {why}" if names else f"{where}: {why}"
            for (where, why), names in self.left_out.items()
        ]

    def measure(self, batch_size: int, rounds: int) -> list[BenchRow]:
        """The rows of one batch size; of none where nothing runs such batches."""
        try:
            cells, inputs = self._warm(batch_size)
            sessions = [made for _, made in cells]
            stage = self._stage(f"batches of {batch_size}")
            seconds = in_turns(sessions, inputs, rounds, 1, stage, _SECONDS) if cells else []
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise ModelError(
                f"out of memory with batches of {batch_size:,} images: choose smaller ones (--batch)"
            ) from error
        return [self._row(cells, i, batch_size, seconds) for i in range(len(cells))]

    def _warm(self, batch_size: int) -> tuple[list[Cell], list[list[np.ndarray]]]:
        """Cells that have run such a batch, and their inputs: some compile first, which takes long, or fails."""
        cells: list[Cell] = []
        inputs: list[list[np.ndarray]] = []
        for done, (one, made) in enumerate(self.cells):
            with self._left_out(one, f"{made.runtime} in {made.precision}, batches of {batch_size}"):
                batch = one.inputs(self.size, batch_size)
                made(*batch)
                cells.append((one, made))
                inputs.append(batch)
            self._tell(f"warm up, batches of {batch_size}", done + 1, len(self.cells))
        return cells, inputs

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)

    def _stage(self, name: str) -> Progress | None:
        return None if self.progress is None else lambda _, done, total: self.progress(name, done, total)  # type: ignore[misc]

    def _row(self, cells: list[Cell], i: int, batch_size: int, seconds: list[list[float]]) -> BenchRow:
        one, made = cells[i]
        low, median, high = (1e3 * np.quantile(seconds[i], (0.25, 0.5, 0.75))).tolist()
        base, first = self._base(cells, i), self.found[0]
        speedup = None if base is None else float(np.median(np.divide(seconds[base], seconds[i])))
        macs, params = one.cost(self.size)
        before, _ = first.cost(self.size)
        return BenchRow(
            model=one.name,
            runtime=made.runtime,
            precision=made.precision,
            batch_size=batch_size,
            median_ms=median,
            low_ms=low,
            high_ms=high,
            images_per_second=1e3 * batch_size / median,
            speedup=speedup,
            macs=macs,
            params=params,
            bytes=one.bytes,
            mac_ratio=before / macs if before and macs else None,
        )

    def _base(self, cells: list[Cell], i: int) -> int | None:
        """The first model's place in the same runtime, in the same precision if it has that."""
        runtime, precision = cells[i][1].runtime, cells[i][1].precision
        places = [j for j, (one, made) in enumerate(cells) if one is self.found[0] and made.runtime == runtime]
        same = [j for j in places if cells[j][1].precision == precision]
        return next(iter(same or places), None)

    def scored(self, rows: list[BenchRow], loader: Iterable[Any]) -> tuple[list[BenchRow], int]:
        """With the score of every model in every precision, and on how many images."""
        scores: dict[tuple[str, str], dict[str, Any]] = {}
        images = 0
        for one, made in self.cells:
            key = one.name, made.precision
            if key in scores:
                continue
            stage = self._stage(f"evaluate {one.name}, {made.precision}")
            found = evaluate(SessionModule(made), loader, progress=stage)
            figure, images = found.figures()[0], found.images
            scores[key] = {"accuracy": figure.value, "metric": figure.label, "unit": figure.unit}
        return [BenchRow(**{**asdict(row), **scores[row.model, row.precision]}) for row in rows], images
