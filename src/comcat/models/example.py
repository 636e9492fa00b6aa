"""What a model is called with, to look at it: images alone, or whatever else its forward wants besides.

Models of transformers say what they take in the signature of ``forward`` and in their configuration; two-tower models
of open_clip take tokens of text. For anything else that images do not suffice for, the user gives an example.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError

#: Tokens of text, at most.
_TOKENS = 11


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
        """The largest floating-point tensor, which is what errors speak of."""
        found = [t for t in [*self.args, *self.kwargs.values()] if isinstance(t, Tensor) and t.is_floating_point()]
        if not found:
            raise ModelError("an example call needs a floating-point tensor of images among its inputs")
        return max(found, key=Tensor.numel)


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
        kwargs = {key: value for key, value in example.items() if key not in ("labels", "label")}
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
    made = Example(tuple(_at(a, parameter) for a in args), {key: _at(a, parameter) for key, a in kwargs.items()})
    pixels = made.pixels
    if not pixels.dim() or not len(pixels):
        raise ModelError("an example call needs at least one image")
    count = len(kwargs["spatial_shapes"]) if "spatial_shapes" in kwargs else len(pixels)
    count = len(kwargs["grid_thw"]) if "grid_thw" in kwargs else count
    return Example(made.args, made.kwargs, count)


def _at(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(parameter.device, parameter.dtype if value.is_floating_point() else value.dtype)


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

    tokens = generator, parameter.device
    config, names = getattr(model, "config", None), _arguments(model)
    if hasattr(config, "model_type") and hasattr(model, "main_input_name"):
        return _transformers(config, names, size, images, pixels, tokens)
    if {"image", "text"} <= set(names) and hasattr(model, "encode_text"):  # open_clip
        shape = images, getattr(model, "context_length", 77)
        text = torch.randint(1, max(2, getattr(model, "vocab_size", 0)), shape, generator=generator).to(tokens[1])
        return Example((pixels(images, *size), text), {}, images)
    return Example((pixels(images, *size),), {}, images)


def _arguments(model: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return []


def _transformers(
    config: Any, names: list[str], size: Sequence[int], images: int, pixels: Any, tokens: tuple[Any, Any]
) -> Example:
    vision = getattr(config, "vision_config", config)
    patch = _number(vision, "patch_size", 16)
    grid = [max(1, n // patch) for n in size[1:]]
    merge = _number(vision, "spatial_merge_size", 1)
    kwargs: dict[str, Any] = {}
    if "grid_thw" in names:  # patches of all images in one row, as Qwen2-VL has them
        grid = [max(merge, n // merge * merge) for n in grid]
        deep = _number(vision, "temporal_patch_size", 1)
        width = size[0] * deep * patch * patch
        kwargs[names[0]] = pixels(images * grid[0] * grid[1], width)
        kwargs["grid_thw"] = torch.tensor([[1, *grid]] * images, device=tokens[1])
    elif "spatial_shapes" in names:  # NaFlex: patches, as many as the image has
        kwargs["pixel_values"] = pixels(images, grid[0] * grid[1], size[0] * patch * patch)
        kwargs["pixel_attention_mask"] = torch.ones(images, grid[0] * grid[1], dtype=torch.int64, device=tokens[1])
        kwargs["spatial_shapes"] = torch.tensor([grid] * images, device=tokens[1])
        if "pixel_attention_mask" not in names:
            kwargs["attention_mask"] = kwargs.pop("pixel_attention_mask")
    elif "pixel_values_videos" in names and "pixel_values" not in names:
        kwargs["pixel_values_videos"] = pixels(images, _frames(vision), *size)
    elif "pixel_values" in names:
        frames = [_frames(vision)] if hasattr(vision, "num_frames") else []
        kwargs["pixel_values"] = pixels(images, *frames, *size)
    else:
        return Example((pixels(images, *size),), {}, images)
    text = getattr(config, "text_config", config)
    vocabulary = _number(text, "vocab_size", 0)
    if "input_ids" in names and vocabulary:
        kwargs["input_ids"] = _text(images, _number(text, "max_position_embeddings", 77), vocabulary, *tokens)
    return Example((), kwargs, images)


def _frames(config: Any) -> int:
    return _number(config, "num_frames", _number(config, "frames_per_clip", 1))


def _number(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None)
    if isinstance(value, (tuple, list)) and value:
        value = value[-1]
    return value if type(value) is int and value > 0 else default


def _text(count: int, length: int, vocabulary: int, generator: torch.Generator, device: torch.device) -> Tensor:
    shape = (count, min(length, _TOKENS))
    return torch.randint(1, max(2, vocabulary), shape, generator=generator).to(device)
