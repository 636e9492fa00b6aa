"""A batch of whatever a model is called with: images alone, or the inputs of its ``forward`` by name.

What a data set or a processor delivers (a dictionary, a BatchFeature of transformers, (args, kwargs), a tensor) becomes
a :class:`Batch`: it can be moved, cut into single images, and put together again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ComcatError, DataError
from .running import IMAGES, LABELS, images_of

#: Patches of NaFlex models, which take them where others take images.
_PATCHES = "patches"
#: What models of transformers with an encoder of images and one of text return beside similarities.
_EMBEDDED = ("image_embeds", "text_embeds")
#: The one input of models that are called with images alone.
ALONE = "0"
#: What denoisers of diffusers call the picture that they are given.
NOISY = ("sample", "hidden_states")
#: Behind the name of an argument that is a list with one tensor for every image.
LISTED = "[]"


class Each(NamedTuple):
    """An argument that is a list with one entry for every image, alike for all."""

    value: Any


@dataclass(frozen=True)
class Batch:
    """The inputs of one call.

    Attributes:
        tensors: by name; numbers are places among the positional arguments, ``options.size`` is the entry ``size`` of
            the argument ``options``, and ``x[]`` an argument that is a list of tensors, one for every image.
        fixed: arguments, by name as above, that are the same whatever images there are: plain data, tensors, or
            :class:`Each`.
    """

    tensors: Mapping[str, Tensor]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_images(cls, images: Tensor) -> Batch:
        """(B, C, H, W) images alone."""
        return cls({ALONE: images})

    @classmethod
    def joined(cls, parts: Sequence[Batch]) -> Batch:
        """One batch of several with the same inputs."""
        first = parts[0]
        return cls({name: torch.cat([part.tensors[name] for part in parts]) for name in first.tensors}, first.fixed)

    @cached_property
    def count(self) -> int:
        """How many images, or texts with images, it holds: as many results the model returns."""
        return count_of(self.tensors)

    def __len__(self) -> int:
        return self.count

    @property
    def alone(self) -> bool:
        return set(self.tensors) == {ALONE} and self.tensors[ALONE].dim() == 4 and not self.fixed

    @cached_property
    def pixels(self) -> Tensor:
        """The picture, by its name or as the largest floating-point tensor."""
        return pixels_of(self.tensors)

    @cached_property
    def rows(self) -> dict[str, list[int]] | None:
        """Rows of every single image in each tensor, or None where they cannot be told apart."""
        found, packed = {}, _packed(self.tensors)
        for name, tensor in self.tensors.items():
            if packed is not None and len(packed) == self.count and not _is_grid(name) and len(tensor) == sum(packed):
                found[name] = packed
            elif len(tensor) == self.count:
                found[name] = [1] * self.count
            else:
                return None
        return found

    def kept(self, places: Sequence[int]) -> Batch:
        """Single images of it; only where :attr:`rows` tell them apart."""
        assert self.rows is not None
        found, chosen = {}, list(places)
        for name, tensor in self.tensors.items():
            if len(tensor) == self.count:
                found[name] = tensor[chosen]
            else:
                parts = tensor.split(self.rows[name])
                found[name] = torch.cat([parts[place] for place in chosen])
        return Batch(found, self.fixed)

    def __getitem__(self, part: slice) -> Batch:
        return self.kept(range(self.count)[part])

    def split(self, size: int) -> Iterator[Batch]:
        """Batches of up to ``size`` images, in their order."""
        if self.alone:
            yield from map(Batch.of_images, self.tensors[ALONE].split(size))
        elif self.rows is None:
            yield self
        else:
            for start in range(0, self.count, size):
                yield self[start : start + size]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """On a device; what is of floating point in ``dtype``."""

        def move(value: Any) -> Any:
            return moved(value, device, dtype)

        return Batch(move(dict(self.tensors)), move(dict(self.fixed)))

    @property
    def signature(self) -> dict[str, Any]:
        """Of every input the shape of a row, and what is fixed: equal where batches can be joined."""
        fixed = {f"{name}=": comparable(value) for name, value in self.fixed.items()}
        return {name: tuple(tensor.shape[1:]) for name, tensor in self.tensors.items()} | fixed

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs), which is also an example of :func:`comcat.prepare`."""
        places = sorted((name for name in self.tensors if name.isdigit()), key=int)
        named: dict[str, Any] = {}
        for name, value in {**self.tensors, **self.fixed}.items():
            if name.isdigit():
                continue
            if isinstance(value, Each):
                value = [value.value] * self.count
            elif name.endswith(LISTED):
                name, value = name.removesuffix(LISTED), list(value)
            *outer, leaf = name.split(".")
            inside = named
            for key in outer:
                inside = inside.setdefault(key, {})
            inside[leaf] = value
        return tuple(self.tensors[place] for place in places), named

    def run(self, model: nn.Module, forward: Callable[[nn.Module, Any], Any] | None = None) -> Any:
        """What the model, or ``forward(model, images or dictionary)``, returns; one entry for each image.

        Rows of all images, such as a vision tower of Qwen-VL returns, are put in order where all have as many. Of a
        model with two encoders it is what they say, not how like that is to all else in the batch.
        """
        args, named = self.call
        if forward is not None:
            return forward(model, self.pixels if self.alone else dict(self.tensors))
        found = model(*args, **named)
        if isinstance(found, Mapping) and set(_EMBEDDED) <= set(found):
            return {name: found[name] for name in _EMBEDDED}
        packed = _packed(self.tensors)
        return found if packed is None or len(set(packed)) > 1 else _by_image(found, self.count)


def calling(forward: Callable[[nn.Module, Any], Any] | None) -> Callable[[nn.Module, Any], Any]:
    """A function of the model and a :class:`Batch` (or images) that runs it."""

    def run(model: nn.Module, batch: Any) -> Any:
        made = Batch.of_images(batch) if isinstance(batch, Tensor) else batch
        return made.run(model, forward)

    return run


def batch_of(
    batch: Any, model: nn.Module, place: str = "the batch", kind: type[ComcatError] = DataError, named: bool = True
) -> Batch:
    """What ``model`` is called with, from a batch as a loader delivers it.

    A dictionary holds the inputs of ``forward`` by name, beside labels and what else is of no use to it; one with
    images alone may call them anything of :data:`comcat.models.running.IMAGES`.

    Args:
        named: whether ``forward`` is the model's own; another one takes everything but labels.

    Raises:
        ComcatError: of ``kind``; what it holds does not fit the model's ``forward``. ``place`` names the batch.
    """
    args: tuple[Any, ...] = ()
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Mapping):
        if not isinstance(batch[0], (tuple, list)):
            raise kind(
                f"{place} is ({type(batch[0]).__name__}, dictionary); give (args, kwargs), or the dictionary alone"
            )
        args, values = tuple(batch[0]), dict(batch[1])
    elif isinstance(batch, Mapping):
        values = dict(batch)
    else:
        return Batch.of_images(images_of(batch, place, kind))
    found = {str(i): value for i, value in enumerate(args)} | _inputs(values, model, named and not args)
    images = next((name for name in IMAGES if name in values), None)
    if not args and set(found) <= {images, ALONE} and (not named or len(_needed(model)) <= 1):
        pixels = values.get(images or "")
        if images not in found or not isinstance(pixels, Tensor) or pixels.dim() == 4:
            return Batch.of_images(images_of(batch, place, kind))
    _check(found, values, model, place, kind, named)
    return Batch({name: _usable(value) for name, value in found.items()})


def count_of(tensors: Mapping[str, Any]) -> int:
    """How many results a call with these inputs has."""
    named = ("input_ids", "spatial_shapes", "grid_thw", "image_grid_thw")
    decisive = next((tensors[name] for name in named if isinstance(tensors.get(name), Tensor)), None)
    if decisive is not None:
        return len(decisive)
    found = [t for t in tensors.values() if isinstance(t, Tensor) and t.is_floating_point() and t.dim()]
    return len(max(found, key=Tensor.numel)) if found else 0


def pixels_of(tensors: Mapping[str, Any]) -> Tensor:
    """The picture among the inputs of a call."""
    found = {name: t for name, t in tensors.items() if isinstance(t, Tensor) and t.is_floating_point()}
    named = next((found[name] for name in NOISY if name in found), None)
    return max(found.values(), key=Tensor.numel) if named is None else named


def moved(value: Any, device: torch.device | str, dtype: torch.dtype | None) -> Any:
    """Arguments on a device, nested as they may be; what is of floating point in ``dtype``.

    One number for every image, such as the time of a denoiser, keeps its own: 999 is none of bfloat16's.
    """
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() and value.dim() > 1 else None)
    if isinstance(value, Mapping):
        return {key: moved(one, device, dtype) for key, one in value.items()}
    if isinstance(value, Each):
        return Each(moved(value.value, device, dtype))
    if type(value) in (list, tuple):
        return type(value)(moved(one, device, dtype) for one in value)
    return value


def comparable(value: Any) -> Any:
    """Plain data that is the same for the same argument."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), str(value.dtype), value.flatten().tolist())
    if isinstance(value, Mapping):
        return {key: comparable(one) for key, one in value.items()}
    return [comparable(one) for one in value] if isinstance(value, (list, tuple)) else value


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(model.forward).parameters)
    except (AttributeError, TypeError, ValueError):
        return {}


def _needed(model: nn.Module) -> list[str]:
    """Parameters of ``forward`` that have no default."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, p in _parameters(model).items() if p.default is p.empty and p.kind not in variable]


def _inputs(values: Mapping[str, Any], model: nn.Module, named: bool) -> dict[str, Any]:
    """The entries that the model is called with."""
    given = {name: value for name, value in values.items() if name not in LABELS and value is not None}
    if not named:
        return given
    taken = _parameters(model)
    found = {name: value for name, value in given.items() if name in taken}
    images = next((name for name in (*IMAGES, _PATCHES) if name in given and name not in taken), None)
    if found and images is not None and not any(name in found for name in IMAGES):
        found = {ALONE: given[images], **found}  # forward calls them otherwise, and takes them first
    return found


def _check(
    found: Mapping[str, Any],
    values: Mapping[str, Any],
    model: nn.Module,
    place: str,
    kind: type[ComcatError],
    named: bool,
) -> None:
    held = ", ".join(map(str, values)) or "nothing"
    taken, name = _parameters(model), type(model).__name__
    if named:
        needed = _needed(model)
        places = sum(one.isdigit() for one in found)
        missing = [one for one in needed[places:] if one not in found]
        if missing or not found:
            raise kind(
                f"{place} is a dictionary of {held}, but the forward of {name} needs {', '.join(missing or taken)}; "
                "give its inputs by these names"
            )
    for one, value in found.items():
        if not isinstance(value, Tensor):
            raise kind(f"{place} holds {one!r} as a {type(value).__name__}; give tensors, as return_tensors='pt' does")
        if not value.dim() or not len(value):
            raise kind(
                f"{place} holds {one!r} of shape {tuple(value.shape)}; the first axis must be that of the images"
            )
        if value.layout != torch.strided or value.is_meta:
            raise kind(f"{place} holds {one!r} as a {'meta' if value.is_meta else 'sparse'} tensor; give dense tensors")
    if not any(value.is_floating_point() for value in found.values()):
        raise kind(
            f"{place} is a dictionary of {held}, none of which are floating-point images that {name} takes; normalize "
            "them as in its training"
        )


def _usable(tensor: Tensor) -> Tensor:
    """What was made under inference_mode is of no use to gradients."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def _is_grid(name: str) -> bool:
    return name.endswith("grid_thw")


def _packed(tensors: Mapping[str, Tensor]) -> list[int] | None:
    """How many patches every image has, where those of all are rows of one tensor."""
    grids = [tensor for name, tensor in tensors.items() if _is_grid(name)]
    return [int(n) for n in grids[0].prod(-1)] if len(grids) == 1 else None


def _by_image(value: Any, count: int) -> Any:
    if isinstance(value, Tensor):
        many = value.dim() and len(value) != count and len(value) % count == 0
        return value.unflatten(0, (count, -1)) if many else value
    if isinstance(value, Mapping):
        return {name: _by_image(one, count) for name, one in value.items() if one is not None}
    if isinstance(value, (tuple, list)):
        return tuple(_by_image(one, count) for one in value)
    return value
