"""Calling somebody's model: what is a batch, in which precision, and what a failure means."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ComcatError, DataError, ModelError
from ..wording import by

#: Names under which data sets of dictionaries keep their images and labels, in the order in which they are looked for.
IMAGES = ("pixel_values", "images", "image", "img", "inputs", "x")
LABELS = ("labels", "label", "targets", "target", "y")
_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "insufficient memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is a lack of memory, of the host or of a device, in whatever words it comes."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _MEMORY)


@contextmanager
def explained(images: Tensor, kind: type[ComcatError] = ModelError) -> Iterator[None]:
    """A failure of the model inside becomes one error of ``kind`` that names the cause.

    Args:
        images: (B, C, H, W) that the model is called with.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise kind(
                f"out of memory on {images.device} with a batch of {len(images)} images of {by(images.shape[1:])}; use "
                "smaller batches, or another device"
            ) from error
        raise _refusal(images, kind, error) from error
    except (AssertionError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _refusal(images, kind, error) from error


def _refusal(images: Tensor, kind: type[ComcatError], error: BaseException) -> ComcatError:
    return kind(
        f"the model does not run on images of size {tuple(images.shape[1:])}, a batch of {len(images)} on "
        f"{images.device} in {str(images.dtype).removeprefix('torch.')}: {error}"
    )


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Neither the caller's autocast nor short float32 products (TF32, bfloat16) inside: dtypes are what they say."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """PyTorch's global generators, the host's and that of the model's device, are afterwards as they were."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    index = [] if device.type in ("cpu", "meta") else [device.index or 0]
    with torch.random.fork_rng(index, device_type=device.type if index else "cuda"):
        yield


def has_float64(device: torch.device) -> bool:
    """Whether tensors there can be float64; Apple's GPUs have no such type."""
    return device.type != "mps"


def wide(device: torch.device | str) -> torch.device:
    """Where to hold what is float64: ``device``, or the host for devices that have no such type."""
    device = torch.device(device)
    return device if has_float64(device) else torch.device("cpu")


def double(x: Tensor) -> Tensor:
    """``x`` in float64, on the host where its device has no such type."""
    return x.to(wide(x.device)).double()


def images_of(batch: Any, place: str = "the batch", kind: type[ComcatError] = DataError) -> Tensor:
    """The images of a batch: a tensor, the first of (images, ...), or a dictionary's entry of one of :data:`IMAGES`.

    Raises:
        ComcatError: of ``kind``; ``place`` names the batch.
    """
    images = batch
    if isinstance(batch, Mapping):
        images = next((batch[name] for name in IMAGES if name in batch), batch)
    elif isinstance(batch, (tuple, list)):
        images = batch[0] if len(batch) else batch
    if not isinstance(images, Tensor) or images.dim() != 4:
        got = tuple(images.shape) if isinstance(images, Tensor) else _described(images)
        raise kind(
            f"{place} must be a (B, C, H, W) tensor, (images, labels), or a dictionary with {IMAGES[0]!r}, not {got}"
        )
    if images.layout != torch.strided or images.is_meta:
        raise kind(
            f"{place} holds {'meta' if images.is_meta else 'sparse'} images, which have no pixels to read; give dense "
            "tensors"
        )
    if not len(images):
        raise kind(f"{place} holds 0 images of {images.dtype}; leave empty batches out")
    if not images.is_floating_point():
        raise kind(
            f"{place} holds {len(images)} images of {images.dtype}; the model needs floating-point images, normalized "
            "as in its training"
        )
    images = images.detach()  # what was made under inference_mode is of no use to gradients
    return images.clone() if images.is_inference() and not torch.is_inference_mode_enabled() else images


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of an output or of arguments, nested as they may be, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from tensors_in(one)


def label_entry(batch: Any) -> Any:
    """What a batch has for labels, whatever it is; None where it has none."""
    if isinstance(batch, Mapping):
        return next((batch[name] for name in LABELS if name in batch), None)
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) >= 2 else None


def labels_of(batch: Any) -> Tensor:
    """The labels of a batch: the second of (images, labels), or a dictionary's entry of one of :data:`LABELS`.

    Raises:
        DataError: it has none.
    """
    found = label_entry(batch)
    if not isinstance(found, Tensor):
        raise DataError(
            f"needed are batches of (images, labels), or dictionaries with {IMAGES[0]!r} and {LABELS[0]!r}; give a "
            "loader that delivers both as tensors"
        )
    return found


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dictionary of {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, (tuple, list)):
        return f"an empty {type(value).__name__}" if not value else f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__
