"""A model as a function from tensors to tensors, each with a name, which is what every file format wants."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..models.example import Example
from ..models.libraries import said_classes

#: Names of parameters that say nothing of what is given.
_VAGUE = {"x", "input", "inputs", "args", "img", "image", "image_input"}


class FlatModel(nn.Module):
    """``model`` called with positional tensors; it returns a tuple of tensors, in float32 where they are numbers.

    Args:
        model: in evaluation mode, in float32.
        example: one call of it; what is no tensor in it is given in every call.

    Attributes:
        input_names, output_names: of the tensors, in their order.
        tensors: those of the example.
        dtype: that of the model's weights, into which floating-point inputs are cast.
    """

    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__()
        self.model, self.dtype = model, torch.float32
        self._args, self._kwargs = list(example.args), dict(example.kwargs)
        named = _parameters(model, len(self._args))
        slots: list[tuple[Any, str]] = [(i, named[i]) for i, value in enumerate(self._args) if _is_tensor(value)]
        slots += [(key, key) for key, value in self._kwargs.items() if _is_tensor(value)]
        self._slots = [slot for slot, _ in slots]
        self.input_names = [name for _, name in slots]
        self.tensors = tuple(self._args[s] if isinstance(s, int) else self._kwargs[s] for s in self._slots)
        with torch.no_grad():
            found = list(_leaves(self.model(*self._args, **self._kwargs)))
        if not found:
            raise ExportError(f"the {type(model).__name__} returns no tensors, so that there is nothing to export")
        self.output_names = _unique([name for name, _ in found], self._answer(found[0][1]))

    def _answer(self, first: Tensor) -> str:
        """What an output without a name is called."""
        return "logits" if first.ndim == 2 and said_classes(self.model) == first.shape[1] else "output"

    def cast(self, dtype: torch.dtype) -> FlatModel:
        """A copy whose weights are of this dtype, with the same inputs and outputs."""
        made = copy.deepcopy(self)
        made.model.to(dtype)
        made.dtype = dtype
        return made

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs in the order of ``output_names``."""
        args, kwargs = list(self._args), dict(self._kwargs)
        for slot, tensor in zip(self._slots, tensors, strict=True):
            given = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            if isinstance(slot, int):
                args[slot] = given
            else:
                kwargs[slot] = given
        outputs = _leaves(self.model(*args, **kwargs))
        return tuple(tensor.float() if tensor.is_floating_point() else tensor for _, tensor in outputs)

    def given(self, example: Example) -> tuple[Tensor, ...]:
        """The tensors of another call, in the order of ``input_names``."""
        return tuple(example.args[s] if isinstance(s, int) else example.kwargs[s] for s in self._slots)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _parameters(model: nn.Module, count: int) -> list[str]:
    """Names of the first ``count`` positional arguments."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    try:
        found = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    except (TypeError, ValueError):
        found = []
    found += [f"input_{i}" for i in range(len(found), count)]
    return _unique(["images" if name in _VAGUE else name for name in found[:count]], "images")


def _unique(names: Sequence[str], default: str) -> list[str]:
    """Names that differ; those that occur several times are numbered."""
    names = [name or default for name in names]
    made: list[str] = []
    for i, name in enumerate(names):
        made.append(f"{name}_{names[:i].count(name)}" if names.count(name) > 1 else name)
    return made


def _leaves(raw: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of an output, nested as it may be; a dictionary's keys are joined by dots."""
    if isinstance(raw, Tensor):
        yield name, raw
    elif isinstance(raw, Mapping):
        for key, value in raw.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(raw, (tuple, list)):
        keys = getattr(raw, "_fields", None) or [name] * len(raw)
        for key, value in zip(keys, raw, strict=True):
            yield from _leaves(value, f"{name}.{key}" if name and key != name else key)
