"""What a model is called with, to look at it: images alone, or whatever else its forward wants besides.

Models of transformers say what they take in the signature of ``forward`` and in their configuration; two-tower models
of open_clip take tokens of text. For anything else that images do not suffice for, the user gives an example.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .batches import count_of, moved, pixels_of
from .running import LABELS
from .transformers_inputs import TransformersInputs


@dataclass(frozen=True)
class Example:
    """One call of a model.

    Attributes:
        images: how many images it holds, by which counts are divided.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    images: int = 1

    def run(self, model: nn.Module) -> Any:
        """The model's output."""
        return model(*self.args, **self.kwargs)

    @property
    def pixels(self) -> Tensor:
        """The picture, which is what errors speak of."""
        given = {str(i): one for i, one in enumerate(self.args)} | dict(self.kwargs)
        flat = given | {name: value[0][None] for name, value in given.items() if _is_list(value)}
        if not any(isinstance(t, Tensor) and t.is_floating_point() for t in flat.values()):
            raise ModelError("an example call needs a floating-point tensor of images among its inputs")
        return pixels_of(flat)


def given_example(example: Any, model: nn.Module) -> Example:
    """A user's example on the model's device and in its dtype.

    Args:
        example: a dictionary of keyword arguments, (args, kwargs), a tuple of arguments, or a tensor.

    Raises:
        ModelError: anything else, or no images among it.
    """
    args: Any = ()
    kwargs: Any = {}
    if isinstance(example, Tensor):
        args = (example,)
    elif isinstance(example, Mapping):
        kwargs = {key: value for key, value in example.items() if key not in LABELS}
    elif (
        isinstance(example, tuple)
        and len(example) == 2
        and isinstance(example[0], (tuple, list))
        and isinstance(example[1], Mapping)
    ):
        args, kwargs = tuple(example[0]), dict(example[1])
    elif isinstance(example, (tuple, list)):
        args = tuple(example)
    else:
        raise ModelError(
            f"an example is a dictionary of the model's inputs, or (args, kwargs), not {type(example).__name__}"
        )
    parameter = next(model.parameters())
    made = Example(moved(args, parameter.device, parameter.dtype), moved(kwargs, parameter.device, parameter.dtype))
    pixels = made.pixels
    if not pixels.dim() or not len(pixels):
        raise ModelError("an example call needs at least one image")
    given = {str(i): one for i, one in enumerate(args)} | kwargs
    listed = next((len(value) for value in given.values() if _is_list(value)), None)
    return Example(made.args, made.kwargs, listed or count_of(given))


def _is_list(value: Any) -> bool:
    """Whether it is a list with one tensor for every image."""
    return type(value) is list and bool(value) and all(isinstance(one, Tensor) for one in value)


def example_for(model: Any, size: Sequence[int], images: int = 1, seed: int | None = None) -> Example:
    """Images of this size, and what the model wants besides.

    Args:
        size: (C, H, W); seed: of random pixels; zeros by default.
    """
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(seed or 0)

    def pixels(*shape: int) -> Tensor:
        made = torch.zeros(shape) if seed is None else torch.randn(shape, generator=generator)
        return made.to(parameter.device, parameter.dtype)

    config, names = getattr(model, "config", None), _arguments(model)
    if hasattr(config, "model_type") and hasattr(model, "main_input_name"):
        wanted = TransformersInputs(model, names, size, images, pixels, generator, parameter.device).arguments()
        return Example((pixels(images, *size),) if wanted is None else (), wanted or {}, images)
    if {"image", "text"} <= set(names) and hasattr(model, "encode_text"):  # open_clip
        shape = images, getattr(model, "context_length", 77)
        text = torch.randint(1, max(2, getattr(model, "vocab_size", 0)), shape, generator=generator)
        return Example((pixels(images, *size), text.to(parameter.device)), {}, images)
    return Example((pixels(images, *size),), {}, images)


def of_any_size(example: Example, model: nn.Module) -> Example:
    """The call with the switch of models of transformers on that lets them take images of other sizes than theirs."""
    switch = "interpolate_pos_encoding"
    return replace(example, kwargs={**example.kwargs, switch: True}) if switch in _arguments(model) else example


def _arguments(model: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return []
