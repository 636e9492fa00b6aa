"""Measuring a :class:`~comcat.planning.latency.LatencyTable`: layers timed inside the running model, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..layers.base import Choice, Layer
from ..models.machine import device_name
from ..models.modes import evaluating, exclusive
from ..models.running import explained, still
from ..nn.swap import swapped
from ..prepared import Prepared, prepared
from ..progress import Progress
from .allocate import spaced_widths
from .latency import Grid, LatencyTable, LayerTimes, nested

#: Widths off this multiple fill vector units badly: on a CPU they take as long as the next multiple, or longer.
MULTIPLE = 8


def measure_latency(
    model: nn.Module | Prepared,
    batch_size: int = 1,
    input_size: Sequence[int] | None = None,
    widths: int = 8,
    rounds: int = 7,
    progress: Progress | None = None,
) -> LatencyTable:
    """Time every kind of layer of a model at several widths, on the model's device and in its dtype.

    Layers of equal shape are measured together: a round gives each width to one of them once, in some 10 arrangements
    of a ViT of 12 blocks, each of which runs three times.

    Args:
        model: the dense model; it is not changed.
        batch_size: images in a batch.
        input_size: (C, H, W), default what the model was built for.
        widths: how many widths of every part to measure, multiples of 8 where the part is wide enough.
        rounds: the least of two measurements in each of this many rounds counts.
        progress: called as ``progress("latency", arrangements done, arrangements in all)``.

    Raises:
        ModelError: the model has nothing to compress, or does not run at this size.
        CalibrationError: a batch size or a number of rounds below 1, or fewer than 2 widths.
    """
    if batch_size < 1 or rounds < 1 or widths < 2:
        raise CalibrationError("latency is measured with a batch size and rounds of 1 or more, and 2 widths or more")
    ready = prepared(model)
    with exclusive(ready.model):
        return _measured(ready, batch_size, input_size, widths, rounds, progress)


def _measured(
    ready: Prepared,
    batch_size: int,
    input_size: Sequence[int] | None,
    widths: int,
    rounds: int,
    progress: Progress | None,
) -> LatencyTable:
    model, size = ready.model, ready.size(input_size)
    dense, shapes = ready.profile(size), ready.shapes(size)
    kinds: dict[str, list[Layer]] = {}
    for layer in ready.inventory.layers:
        kinds.setdefault(layer.layer_key(shapes[layer.name]), []).append(layer)
    parameter = next(model.parameters())
    # Of the same kind on both sides: some processors multiply zeros and tiny numbers at another speed.
    images = _drawn(torch.empty(batch_size, *size, device=parameter.device, dtype=parameter.dtype))
    work = _Work(model, images, {key: _Kind(layers, widths) for key, layers in kinds.items()})
    rest = work.run(rounds, progress)
    times = {key: kind.times() for key, kind in work.kinds.items()}
    return LatencyTable(
        device=device_name(parameter.device),
        dtype=str(parameter.dtype).removeprefix("torch."),
        batch_size=batch_size,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        input_size=size,
        params=dense.params,
        macs=dense.macs,
        dense=rest + sum(layer.count * layer.dense for layer in times.values()),
        layers=times,
    )


class _Kind:
    """Layers of equal shape, the choices to measure on them, and the seconds measured so far."""

    def __init__(self, layers: list[Layer], count: int) -> None:
        self.layers = layers
        self.axes = _axes(layers[0], count)
        reduced = [choice for parts, axes in self.axes for choice in self._grid(parts, axes) if choice]
        self.choices: list[Choice] = [{}, *reduced]
        self.seconds: list[list[float]] = [[] for _ in self.choices]

    def _grid(self, parts: tuple[str, ...], axes: tuple[tuple[int, ...], ...]) -> list[Choice]:
        """The choices behind a grid, the last axis fastest; full widths are left out, for they are dense."""
        full = self.layers[0].full
        return [
            {part: width for part, width in zip(parts, widths, strict=True) if width < full[part]}
            for widths in product(*axes)
        ]

    def times(self) -> LayerTimes:
        taken = [_nanoseconds(seconds) for seconds in self.seconds]
        grids = []
        for parts, axes in self.axes:
            flat = [taken[self.choices.index(choice)] for choice in self._grid(parts, axes)]
            grids.append(Grid(parts, axes, nested(np.reshape(flat, [len(axis) for axis in axes]))))
        return LayerTimes(len(self.layers), taken[0], tuple(grids))


def _nanoseconds(seconds: list[float]) -> int:
    """The least: what makes a piece slower from time to time is other work on the machine."""
    return max(round(1e9 * min(seconds)), 1)


def _axes(layer: Layer, count: int) -> list[tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]]:
    """Parts that are measured together, and at which widths."""

    def axis(limit: int, count: int) -> tuple[int, ...]:
        return tuple(spaced_widths(limit, MULTIPLE if limit >= 2 * MULTIPLE else 1, count).tolist())

    if layer.timed_together:
        return [(tuple(layer.full), tuple((*axis(width, count - 1), width) for width in layer.full.values()))]
    found: list[tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]] = []
    for part in layer.full:
        if widths := axis(layer.reach(part), count):
            found.append(((part,), (widths,)))
    return found


class _Work:
    def __init__(self, model: nn.Module, images: Tensor, kinds: dict[str, _Kind]) -> None:
        self.model, self.images, self.kinds = model, images, kinds
        self.clock = _clock(images.device)
        self.own = {id(parameter) for parameter in model.parameters()}
        self.between: dict[int, list[float]] = {}  # seconds of what lies between the layers, by place
        #: Enough for every choice to have its turn at one of the layers.
        self.steps = max(-(-len(kind.choices) // len(kind.layers)) for kind in kinds.values())

    @torch.no_grad()
    def run(self, rounds: int, progress: Progress | None) -> int:
        """Fill the kinds' seconds; returns the nanoseconds of everything between the layers."""
        with evaluating(self.model), still(self.model), explained(self.images):
            for turn in range(rounds):
                for step in range(self.steps):
                    self._measure(turn, step)
                    if progress:
                        progress("latency", turn * self.steps + step + 1, rounds * self.steps)
        return sum(_nanoseconds(seconds) for seconds in self.between.values())

    def _measure(self, turn: int, step: int) -> None:
        """Another choice at every layer; which layer a choice is given to changes with the turn."""
        assigned: dict[str, list[float]] = {}
        new: dict[str, nn.Module] = {}
        for kind in self.kinds.values():
            for i, layer in enumerate(kind.layers):
                pick = (step * len(kind.layers) + i + turn) % len(kind.choices)
                assigned[layer.name] = kind.seconds[pick]
                new |= self._modules(layer, kind.choices[pick])
        with swapped(self.model, new), ExitStack() as stack:
            self.model(self.images)  # memory is found for activations of these sizes
            marks: list[tuple[str, Any]] = []
            for name in assigned:
                module = self.model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(self._marker(marks, name)).remove)
                stack.callback(module.register_forward_hook(self._marker(marks, "")).remove)
            for _ in range(2):
                marks[:] = [("", self.clock.now())]
                self.model(self.images)
                marks.append(("", self.clock.now()))
                self._collect(marks, assigned)

    def _marker(self, marks: list[tuple[str, Any]], name: str) -> Callable[..., None]:
        return lambda *_: marks.append((name, self.clock.now()))

    def _collect(self, marks: list[tuple[str, Any]], layers: dict[str, list[float]]) -> None:
        """What follows a named mark is that layer; what follows another lies between layers."""
        self.clock.wait(marks[-1][1])
        for place, ((name, begin), (_, end)) in enumerate(pairwise(marks)):
            pieces = layers[name] if name else self.between.setdefault(place, [])
            pieces.append(self.clock.seconds(begin, end))

    def _modules(self, layer: Layer, choice: Choice) -> dict[str, nn.Module]:
        new = layer.empty(choice)
        for module in new.values():
            module.eval()
            for parameter in module.parameters():
                if id(parameter) not in self.own:  # a norm or table that the layer shares with the dense one
                    parameter.copy_(_drawn(parameter, 0.02))
        return new


def _drawn(like: Tensor, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same at every call."""
    numbers = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)) * scale
    return numbers.to(like.device, like.dtype)


class _HostClock:
    def now(self) -> float:
        return time.perf_counter()

    def wait(self, mark: float) -> None:
        """Nothing runs behind the host's back."""

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class _DeviceClock:
    """Events in the device's own queue: times of the work itself, and of gaps where launching is what takes long."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> torch.Event:
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def wait(self, mark: torch.Event) -> None:
        mark.synchronize()

    def seconds(self, begin: torch.Event, end: torch.Event) -> float:
        return begin.elapsed_time(end) / 1e3


def _clock(device: torch.device) -> Any:
    return _HostClock() if device.type == "cpu" else _DeviceClock(device)
