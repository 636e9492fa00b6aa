"""Latency as a cost: how long every kind of layer takes on the user's device, at a grid of widths.

In PyTorch layers are timed where they are, inside the running model, so that caches and launches are as in use. Every
layer of a kind is given another width, hence one pass measures as many widths as the model has such layers. Passes
repeat in turns and the least time of each short piece counts: on a busy machine a median of pieces would hold other
work too. In other runtimes layers are small models of their own (:mod:`comcat.runtimes.layer_timing`).

Between the measured widths times are interpolated. What a choice of widths costs is then a sum: all layers, and what
lies between them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field

from ..errors import CalibrationError
from ..layers.base import Inventory, Layer
from ..layers.cost import Shape
from ..models.profile import Profile
from ..storage.atomic import atomic_file
from ..storage.reader import digest, read_json, shown, validated
from ..wording import by

#: 2 has the runtime, its version and precision; tables of 1 are of PyTorch.
FORMAT = 2
#: Largest width of a part in a table; interpolation takes memory by it.
MOST_WIDTH = 1 << 20
Count = Annotated[int, Field(gt=0, lt=1 << 62)]
_CONFIG = ConfigDict(extra="forbid")  # of what is read from a file


@dataclass(frozen=True)
class Grid:
    """Times of one or two parts of a layer that vary together, everything else dense.

    Attributes:
        parts: names, e.g. ``("qk", "vo")``.
        widths: ascending, one tuple per part; of two parts the last width is the full one.
        times: nanoseconds, nested to the shape (len(widths[0]), ...).
    """

    parts: tuple[str, ...]
    widths: tuple[tuple[Count, ...], ...]
    times: tuple[Any, ...]
    __pydantic_config__ = _CONFIG

    def __post_init__(self) -> None:
        names, times = ", ".join(self.parts), np.asarray(self.times)
        if times.shape != tuple(map(len, self.widths)) or len(self.parts) != len(self.widths):
            raise ValueError(f"times of shape {times.shape} do not fit the widths of {names}")
        if times.dtype.kind != "i" or (times <= 0).any() or any((np.diff(axis) <= 0).any() for axis in self.widths):
            raise ValueError(f"times of {names} must be positive integers and widths ascending")
        if max(axis[-1] for axis in self.widths) > MOST_WIDTH or math.prod(a[-1] + 1 for a in self.widths) > 10**8:
            raise ValueError(f"the widths of {names} are larger than any layer")
        object.__setattr__(self, "times", nested(times))

    @cached_property
    def table(self) -> np.ndarray:
        """The times at every width from 0 to the last measured one; below the first, they are those of the first."""
        table = np.asarray(self.times, dtype=float)
        for measured in self.widths:  # the axis in front goes, and comes back at the end, interpolated
            every = np.arange(measured[-1] + 1)
            share = np.stack([np.interp(every, measured, one) for one in np.eye(len(measured))])
            table = np.tensordot(table, share, (0, 0))
        return table

    def at(self, widths: Mapping[str, Any], dense: int) -> np.ndarray:
        """Nanoseconds at integer arrays of widths by part; -1 stands for dense."""
        given = [np.asarray(widths[part]) for part in self.parts]
        last = [measured[-1] for measured in self.widths]
        index = tuple(np.where(w < 0, full, np.minimum(w, full)) for w, full in zip(given, last, strict=True))
        return np.where(np.all([w < 0 for w in given], axis=0), dense, self.table[index])


@dataclass(frozen=True)
class LayerTimes:
    """Times of one kind of layer: ``count`` of them, ``dense`` nanoseconds each, and what narrower ones take."""

    count: Count
    dense: Count
    grids: tuple[Grid, ...]
    __pydantic_config__ = _CONFIG

    def at(self, widths: Mapping[str, Any]) -> np.ndarray:
        """Nanoseconds, int64, at integer arrays of widths by part; -1 stands for dense.

        The two low-rank matrices of an FFN are taken to save independently of each other.
        """
        total = np.asarray(float(self.dense))
        for grid in self.grids:
            if all(part in widths for part in grid.parts):
                total = total + grid.at(widths, self.dense) - self.dense
        return np.maximum(np.rint(total), 1).astype(np.int64)

    @property
    def least(self) -> int:
        """The shortest time of all."""
        return min([self.dense, *(int(np.min(grid.times)) for grid in self.grids)])

    def changed(self, change: Callable[[np.ndarray], np.ndarray]) -> LayerTimes:
        """With other times, each a function of what it was, and at least one nanosecond."""

        def new(times: Any) -> np.ndarray:
            return np.maximum(np.rint(change(np.asarray(times, dtype=float))), 1).astype(np.int64)

        grids = tuple(replace(grid, times=nested(new(grid.times))) for grid in self.grids)
        return replace(self, dense=int(new(self.dense)), grids=grids)


@dataclass(frozen=True)
class LatencyTable:
    """What :func:`comcat.measure_latency` measured, for ``comcat.plan(..., latency=table)``; JSON on disk.

    Attributes:
        device, dtype, batch_size, threads, torch: what was measured on and with; ``threads`` are PyTorch's on a CPU,
            or those that the runtime was given, and 0 for as many as it takes by itself.
        runtime, precision, version: where the times were measured, in which precision it computed, and its version.
        input_size: (C, H, W); params, macs: of the dense model, by which it is recognized.
        dense: nanoseconds that the dense model takes for one batch.
        layers: times by kind of layer.
    """

    device: str
    dtype: str
    batch_size: Count
    threads: Annotated[int, Field(ge=0, lt=1 << 62)]
    torch: str
    input_size: Annotated[tuple[Count, ...], Field(min_length=3, max_length=3)]
    params: Count
    macs: Count
    dense: Count
    layers: dict[str, LayerTimes]
    runtime: str = "torch"
    precision: str = "fp32"
    version: str = ""
    __pydantic_config__ = _CONFIG

    def __repr__(self) -> str:
        size = by(self.input_size)
        layers = sum(layer.count for layer in self.layers.values())
        return (
            f"LatencyTable({layers} layers of {len(self.layers)} kinds, {self.batch_size} images of {size} on "
            f"{self.device} in {self.runtime} and {self.precision}, dense {self.dense / 1e6:.3g} ms)"
        )

    def corrected(self, factor: float) -> LatencyTable:
        """With every time that a narrower layer saves multiplied by ``factor``, the dense model's time as it is."""
        layers = {key: layer.changed(lambda times: times * factor) for key, layer in self.layers.items()}
        return replace(self, layers=layers).settled()

    def settled(self) -> LatencyTable:
        """With layers that do not take longer than the whole model, and save what they did.

        Small models of single layers have inputs and outputs that the whole one has not. What is too much is taken off
        all times of a layer alike, as far as its shortest time goes.
        """
        much = sum(layer.count * layer.dense for layer in self.layers.values()) - self.dense
        least = {key: layer.least - 1 for key, layer in self.layers.items()}
        room = sum(layer.count * least[key] for key, layer in self.layers.items())
        if much <= 0 or room <= 0:
            return self
        share = min(much / room, 1.0)
        layers = {
            key: layer.changed(lambda times, off=share * least[key]: times - off)  # type: ignore[misc]
            for key, layer in self.layers.items()
        }
        return replace(self, layers=layers)

    def cost(self, layer: Layer, shape: Shape, widths: Mapping[str, Any]) -> np.ndarray:
        """Nanoseconds of a layer at integer arrays of widths by part; -1, or a part left out, stands for dense."""
        return self.layers[layer.layer_key(shape)].at({**dict.fromkeys(layer.full, -1), **widths})

    def check(self, inventory: Inventory, shapes: Mapping[str, Shape], dense: Profile) -> None:
        """Raise CalibrationError unless this was measured on a model with these layers and costs."""
        if tuple(dense.input_size) != self.input_size:
            raise CalibrationError(
                f"the latency table was measured at input size {self.input_size}, the plan is for "
                f"{tuple(dense.input_size)}; measure latency at that size"
            )
        counts: dict[str, int] = {}
        for found in inventory.layers:
            key = found.layer_key(shapes[found.name])
            counts[key] = counts.get(key, 0) + 1
        if counts != {key: layer.count for key, layer in self.layers.items()}:
            foreign = [key for key in counts if key not in self.layers] or list(counts)
            raise CalibrationError(
                f"the latency table was measured on another model, without this one's {counts[foreign[0]]} layers "
                f"'{foreign[0]}'; measure this one"
            )
        if (dense.params, dense.macs) != (self.params, self.macs):
            raise CalibrationError(
                f"the latency table was measured on another model, of {self.params:,} parameters and "
                f"{self.macs:,} MACs where this one has {dense.params:,} and {dense.macs:,}; measure this one"
            )

    def save(self, path: str | Path) -> None:
        """Write the JSON atomically."""
        with atomic_file(path) as file:
            data = self.to_dict()
            file.write((json.dumps({**data, "sha256": digest(data)}, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read what :meth:`save` wrote.

        Raises:
            CalibrationError: not a latency table, of a newer version, or damaged.
        """
        data = read_json(path, what="latency table", error=CalibrationError)
        if not isinstance(data, dict) or "comcat_latency" not in data:
            raise CalibrationError(
                f"'{path}' is not a latency table; make one with comcat.measure_latency(...).save(path)"
            )
        if data["comcat_latency"] not in range(1, FORMAT + 1):
            raise CalibrationError(
                f"latency table '{path}' has format {shown(data['comcat_latency'])}, this comcat reads up to {FORMAT}; "
                "upgrade comcat"
            )
        recorded = data.pop("sha256", None)  # older files have none
        if recorded not in (None, digest(data)):
            raise CalibrationError(
                f"latency table '{path}' is damaged: it does not match its checksum; measure again, or, if it was "
                "edited on purpose, remove its field 'sha256'"
            )
        try:
            return cls.from_dict(data, f"latency table '{path}'")
        except CalibrationError as error:
            raise CalibrationError(f"{error}; measure again") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the inverse of :meth:`from_dict`."""
        return {"comcat_latency": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any], what: str = "the latency table") -> LatencyTable:
        """From parsed JSON; CalibrationError, which calls it ``what``, where it is no table."""
        values = {key: value for key, value in data.items() if key != "comcat_latency"}
        if data["comcat_latency"] == 1:
            precision = precision_of(str(data.get("dtype")))
            values |= {"runtime": "torch", "precision": precision, "version": str(data.get("torch"))}
        table: LatencyTable = validated(cls, values, what, CalibrationError)
        return table


def precision_of(dtype: str) -> str:
    """A dtype in the words of the runtimes."""
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(dtype, dtype)


def nested(times: np.ndarray) -> tuple[Any, ...]:
    """An array as tuples, which compare and go into JSON."""
    return tuple(nested(row) if row.ndim else int(row) for row in times)
