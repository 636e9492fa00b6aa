"""Measuring a :class:`~comcat.planning.latency.LatencyTable`: layers timed inside the running model, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

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
from .latency import LatencyTable, LayerTimes, precision_of
from .measured_widths import MeasuredWidths, nanoseconds


def measure_latency(
    model: nn.Module | Prepared,
    batch_size: int = 1,
    input_size: Sequence[int] | None = None,
    widths: int = 8,
    rounds: int = 7,
    progress: Progress | None = None,
    runtime: str | None = None,
    precision: str = "fp32",
    threads: int | None = None,
) -> LatencyTable:
    """Time every kind of layer of a model at several widths, on the model's device and in its dtype, or in a runtime.

    Layers of equal shape are measured together: a round gives each width to one of them once, in some 10 arrangements
    of a ViT of 12 blocks, each of which runs three times. In a runtime other than PyTorch, every width of a kind of
    layer is a small model of its own (:mod:`comcat.runtimes.layer_timing`), which takes minutes to write.

    Args:
        model: the dense model; it is not changed.
        batch_size: images in a batch.
        input_size: (C, H, W), default what the model was built for.
        widths: how many widths of every part to measure, multiples of 8 where the part is wide enough.
        rounds: the least of two measurements in each of this many rounds counts.
        progress: called as ``progress("latency", arrangements done, arrangements in all)``.
        runtime: ``torch``, ``torch-compile``, ``onnxruntime`` or ``openvino``, on the processor; default PyTorch where
            and as the model is.
        precision: in which the runtime computes, as in :func:`comcat.runtimes.session`; threads: of the processor.

    Raises:
        ModelError: the model has nothing to compress, or does not run at this size.
        CalibrationError: a batch size or a number of rounds below 1, or fewer than 2 widths.
        ComcatError: a runtime that is not installed (the message has the pip line), or has no such precision.
        ExportError: a model that cannot be written for the runtime.
    """
    if batch_size < 1 or rounds < 1 or widths < 2:
        raise CalibrationError("latency is measured with a batch size and rounds of 1 or more, and 2 widths or more")
    ready = prepared(model)
    if runtime is not None:
        from ..runtimes.layer_timing import measure_in_runtime

        more = (batch_size, ready.size(input_size), widths, rounds, progress)
        return measure_in_runtime(ready, runtime, precision, threads, *more)
    with exclusive(ready.model):
        return measured_in_place(ready, batch_size, input_size, widths, rounds, progress)


def measured_in_place(
    ready: Prepared,
    batch_size: int,
    input_size: Sequence[int] | None,
    widths: int,
    rounds: int,
    progress: Progress | None,
) -> LatencyTable:
    """A table by a model that runs in PyTorch, its layers timed where they are."""
    model, size = ready.model, ready.size(input_size)
    dense, shapes = ready.profile(size), ready.shapes(size)
    kinds: dict[str, list[Layer]] = {}
    for layer in ready.inventory.layers:
        kinds.setdefault(layer.layer_key(shapes[layer.name]), []).append(layer)
    parameter = next(model.parameters())
    dtype = str(parameter.dtype).removeprefix("torch.")
    # Of the same kind on both sides: some processors multiply zeros and tiny numbers at another speed.
    images = _drawn(torch.empty(batch_size, *size, device=parameter.device, dtype=parameter.dtype))
    work = _Work(model, images, {key: _Kind(layers, widths) for key, layers in kinds.items()})
    rest = work.run(rounds, progress)
    times = {key: kind.times() for key, kind in work.kinds.items()}
    return LatencyTable(
        device=device_name(parameter.device),
        dtype=dtype,
        batch_size=batch_size,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        input_size=size,
        params=dense.params,
        macs=dense.macs,
        dense=rest + sum(layer.count * layer.dense for layer in times.values()),
        layers=times,
        precision=precision_of(dtype),
        version=torch.__version__,
    )


class _Kind:
    """Layers of equal shape, the choices to measure on them, and the seconds measured so far."""

    def __init__(self, layers: list[Layer], count: int) -> None:
        self.layers = layers
        self.widths = MeasuredWidths(layers[0], count)
        self.choices = self.widths.choices
        self.seconds: list[list[float]] = [[] for _ in self.choices]

    def times(self) -> LayerTimes:
        """The least: what makes a piece slower from time to time is other work on the machine."""
        return self.widths.times([min(seconds) for seconds in self.seconds], len(self.layers))


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
        return sum(nanoseconds(min(seconds)) for seconds in self.between.values())

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
