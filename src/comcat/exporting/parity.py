"""Whether a file computes what the model computes: both on the same images, in batches of several sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..models.example import Example, example_for
from ..models.running import exact, explained, images_of
from ..wording import by
from .flat_model import FlatModel

#: Largest difference by default, of the largest output. Measured over the models of benchmarks/export_parity.py: fp32
#: at most 6e-6, fp16 2e-3, bf16 2e-2.
#: Int8 is held to its divergence instead, and to this only so that a broken file does not pass.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "int8": 0.5}
#: Images in the batches that an open batch is tried with, none of them the size that the graph was traced with.
_BATCHES = (1, 2, 5)
#: Images that are looked at.
MOST_COMPARED = sum(_BATCHES)


@dataclass(frozen=True)
class Deviation:
    """The largest difference of an output; ``relative`` to the largest value of that output."""

    absolute: float
    relative: float
    output: str = ""

    def __or__(self, other: Deviation) -> Deviation:
        absolute = max(self.absolute, other.absolute)
        return replace(max(self, other, key=lambda one: one.relative), absolute=absolute)


def calls(
    model: nn.Module, size: Sequence[int], batches: Sequence[int], images: Tensor | None, config: Mapping[str, Any]
) -> list[Example]:
    """Calls of the model with batches of these sizes, on the images given or on random ones."""
    made, start = [], 0
    for seed, count in enumerate(batches):
        call = example_for(model, size, count, seed=seed + 1)
        if images is None:
            pixels = _plausible(call.pixels, config, seed)
        else:
            rows = [i % len(images) for i in range(start, start + count)]
            pixels = images[rows].to(call.pixels)
        start += count
        made.append(_with_pixels(call, pixels))
    return made


def _plausible(noise: Tensor, config: Mapping[str, Any], seed: int) -> Tensor:
    """Pixels in [0, 1], normalized as the model's images are, where it says how and takes images as they are."""
    mean, std = config.get("mean"), config.get("std")
    if noise.ndim != 4 or mean is None or std is None or len(mean) not in (1, noise.shape[1]):
        return noise
    pixels = torch.rand(noise.shape, generator=torch.Generator().manual_seed(seed))
    shape = (1, -1, 1, 1)
    return ((pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)).to(noise)


def _with_pixels(call: Example, pixels: Tensor) -> Example:
    old = call.pixels

    def put(value: Any) -> Any:
        return pixels if value is old else value

    return replace(call, args=tuple(map(put, call.args)), kwargs={k: put(v) for k, v in call.kwargs.items()})


def given_images(images: Any, size: Sequence[int], most: int) -> Tensor | None:
    """The first ``most`` of the images given.

    Args:
        images: (N, C, H, W), normalized, or batches as a loader delivers them.

    Raises:
        ExportError: there are none, or they are of another size than the file will take.
    """
    if images is None:
        return None
    batches = [images] if isinstance(images, (Tensor, Mapping)) else images
    found: list[Tensor] = []
    for batch in batches:
        found.append(images_of(batch, "images", ExportError).float().cpu())
        if tuple(found[-1].shape[1:]) != tuple(size):
            raise ExportError(
                f"the images are of {by(found[-1].shape[1:])}, and the file will take those of {by(size)}: prepare "
                "them for the model, or make the model for their size"
            )
        if sum(map(len, found)) >= most:
            break
    if not found:
        raise ExportError("there are no images to check the file with; leave images out for random ones")
    return torch.cat(found)[:most]


def reference(flat: FlatModel, examples: Sequence[Example]) -> list[list[np.ndarray]]:
    """What the model itself puts out, in float32."""
    found = []
    for example in examples:
        with explained(example.pixels, ExportError), exact(torch.device("cpu")), torch.no_grad():
            found.append([tensor.numpy() for tensor in flat(*flat.given(example))])
    return found


def compare(
    names: Sequence[str], wanted: Sequence[Sequence[np.ndarray]], got: Sequence[Sequence[np.ndarray]]
) -> Deviation:
    """The largest difference over all batches and outputs; infinite where shapes or finiteness differ."""
    found = Deviation(0.0, 0.0)
    for one, other in zip(wanted, got, strict=True):
        if len(one) != len(other):
            raise ExportError(f"the file has {len(other)} outputs, and the model {len(one)}")
        for name, a, b in zip(names, one, other, strict=True):
            found |= _difference(name, a, b)
    return found


def _difference(name: str, a: np.ndarray, b: np.ndarray) -> Deviation:
    if a.shape != b.shape:
        raise ExportError(f"output '{name}' of the file is {by(b.shape)}, and that of the model {by(a.shape)}")
    if not a.size:
        return Deviation(0.0, 0.0, name)
    a, b = a.astype(np.float64), b.astype(np.float64)
    if (np.isfinite(a) != np.isfinite(b)).any():
        return Deviation(float("inf"), float("inf"), name)
    finite = np.isfinite(a)
    absolute = float(np.abs(a - b)[finite].max(initial=0.0))
    largest = float(np.abs(a)[finite].max(initial=0.0))
    return Deviation(absolute, absolute / max(largest, 1e-30), name)


def batches_of(fixed: int | None) -> tuple[int, ...]:
    """The sizes that a file is tried with, one where it takes only that."""
    return _BATCHES if fixed is None else (fixed,) * -(-MOST_COMPARED // fixed)


def arrays(flat: FlatModel, examples: Sequence[Example]) -> Iterator[list[np.ndarray]]:
    """The inputs of a file, batch by batch."""
    for example in examples:
        yield [tensor.numpy() for tensor in flat.given(example)]
