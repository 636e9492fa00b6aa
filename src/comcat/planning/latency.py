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
from typing import Any

import numpy as np

from ..errors import CalibrationError
from ..layers.base import Inventory, Layer
from ..layers.cost import Shape
from ..models.profile import Profile
from ..storage.atomic import atomic_file
from ..storage.reader import digest, read_json, shown
from ..wording import by

#: 2 has the runtime, its version and precision; tables of 1 are of PyTorch.
FORMAT = 2
#: Largest width of a part in a table; interpolation takes memory by it.
MOST_WIDTH = 1 << 20


@dataclass(frozen=True)
class Grid:
    """Times of one or two parts of a layer that vary together, everything else dense.

    Attributes:
        parts: names, e.g. ``("qk", "vo")``.
        widths: ascending, one tuple per part; of two parts the last width is the full one.
        times: nanoseconds, nested to the shape (len(widths[0]), ...).
    """

    parts: tuple[str, ...]
    widths: tuple[tuple[int, ...], ...]
    times: tuple[Any, ...]

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

    count: int
    dense: int
    grids: tuple[Grid, ...]

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
    batch_size: int
    threads: int
    torch: str
    input_size: tuple[int, ...]
    params: int
    macs: int
    dense: int
    layers: dict[str, LayerTimes]
    runtime: str = "torch"
    precision: str = "fp32"
    version: str = ""

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
            return cls.from_dict(data)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CalibrationError(f"latency table '{path}' is damaged: {error!r}; measure again") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the inverse of :meth:`from_dict`."""
        return {"comcat_latency": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LatencyTable:
        """From parsed JSON; KeyError, TypeError or ValueError where it is no table."""
        fields = {key: value for key, value in data.items() if key != "comcat_latency"}
        layers = {
            key: LayerTimes(_positive(layer["count"]), _positive(layer["dense"]), tuple(map(_grid, layer["grids"])))
            for key, layer in data["layers"].items()
        }
        sizes = {key: _positive(data[key]) for key in ("batch_size", "dense", "params", "macs")}
        sizes |= {"threads": data["threads"] if data["threads"] == 0 else _positive(data["threads"])}
        if data["comcat_latency"] == 1:
            fields |= {"runtime": "torch", "precision": precision_of(data["dtype"]), "version": data["torch"]}
        names = ("device", "dtype", "torch", "runtime", "precision", "version")
        wrong = [key for key in names if not isinstance(fields[key], str)]
        if wrong or len(data["input_size"]) != 3 or not all(map(_positive, data["input_size"])):
            raise ValueError(f"{wrong[0] if wrong else 'input_size'} is of another kind than a table has")
        return cls(**{**fields, **sizes, "input_size": tuple(data["input_size"]), "layers": layers})


def precision_of(dtype: str) -> str:
    """A dtype in the words of the runtimes."""
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(dtype, dtype)


def _grid(data: dict[str, Any]) -> Grid:
    parts, widths = tuple(data["parts"]), tuple(tuple(map(_positive, axis)) for axis in data["widths"])
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"the parts {shown(parts)} are no names")
    if any(len(axis) < 1 or axis[-1] > MOST_WIDTH for axis in widths) or math.prod(a[-1] + 1 for a in widths) > 10**8:
        raise ValueError(f"the widths of {', '.join(parts)} are larger than any layer")
    times = np.asarray(data["times"], dtype=np.int64)
    if times.shape != tuple(map(len, widths)) or len(parts) != len(widths):
        raise ValueError(f"times of shape {times.shape} do not fit the widths of {', '.join(parts)}")
    if (times <= 0).any() or any((np.diff(axis) <= 0).any() or axis[0] < 1 for axis in widths):
        raise ValueError(f"times of {', '.join(parts)} must be positive and widths ascending")
    return Grid(parts, widths, nested(times))


def _positive(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**62:
        raise ValueError(f"{value!r} is not a positive integer")
    return value


def nested(times: np.ndarray) -> tuple[Any, ...]:
    """An array as tuples, which compare and go into JSON."""
    return tuple(nested(row) if row.ndim else int(row) for row in times)
