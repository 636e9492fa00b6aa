"""What a pipeline calls its denoiser with, as batches of single examples."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..models.batches import LISTED, Batch, Each
from ..models.call_files import storable

#: Positions of tokens, which are those of every example where they have no axis of examples.
_POSITIONS = ("img_ids", "txt_ids")


def batches_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Batch]:
    """One batch of a call, on the CPU; one for every example where examples differ in length.

    Guidance without a classifier doubles the examples: both halves are examples of their own.

    Raises:
        CalibrationError: an argument that no file can hold, or no example in the call.
    """
    given = _named(model, args, kwargs)
    count = _count(given)
    if not count:
        raise CalibrationError(f"{type(model).__name__} was called without a picture, but with {', '.join(given)}")
    lists = [value for value in given.values() if _is_listed(value, count)]
    if any(len({one.shape for one in value}) > 1 for value in lists):
        return [_batch({name: _row(value, i, count) for name, value in given.items()}, 1) for i in range(count)]
    return [_batch(given, count)]


def _named(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, without those that are as ``forward`` has them by itself; dictionaries are flat."""
    signature = inspect.signature(model.forward)
    given: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= value
        elif not (value is None and parameter.default is None):
            given[name] = value
    flat = dict(_flat(given))
    for name, value in flat.items():
        if not storable(value):
            raise CalibrationError(
                f"the pipeline calls {type(model).__name__} with {name!r}, a {type(value).__name__}, which cannot be "
                "recorded; call it without"
            )
    return flat


def _flat(given: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in given.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _count(given: Mapping[str, Any]) -> int:
    """How many examples there are: those of the first argument, which is the noisy picture."""
    first = next(iter(given.values()), None)
    return len(first) if isinstance(first, (Tensor, list)) else 0


def _is_listed(value: Any, count: int) -> bool:
    return type(value) is list and len(value) == count and all(isinstance(one, Tensor) for one in value)


def _row(value: Any, place: int, count: int) -> Any:
    """What one example is called with."""
    if (isinstance(value, Tensor) and value.dim() and len(value) == count) or (
        isinstance(value, (list, tuple)) and len(value) == count
    ):
        return value[place : place + 1]
    return value


def _batch(given: Mapping[str, Any], count: int) -> Batch:
    tensors: dict[str, Tensor] = {}
    fixed: dict[str, Any] = {}
    for name, value in given.items():
        if _is_time(name, value):
            tensors[name] = torch.as_tensor(value).detach().flatten().expand(count).to("cpu", copy=True)
        elif isinstance(value, Tensor):
            own = value.dim() and len(value) == count and not (name in _POSITIONS and value.dim() == 2)
            (tensors if own else fixed)[name] = value.detach().to("cpu", copy=True)
        elif _is_listed(value, count):
            tensors[name + LISTED] = torch.stack([one.detach().cpu() for one in value])
        elif type(value) is list and len(value) == count and all(one == value[0] for one in value):
            fixed[name] = Each(value[0])
        else:
            fixed[name] = value
    return Batch(tensors, fixed)


def _is_time(name: str, value: Any) -> bool:
    """Whether it is one time for all examples, which may be given as a number alone."""
    if name not in ("timestep", "t", "timesteps"):
        return False
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
