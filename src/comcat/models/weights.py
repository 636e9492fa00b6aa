"""Weights from safetensors into a model, after their names, shapes and sizes have been compared with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from ..storage.reader import read_tensors
from ..wording import some

#: A model may take this many bytes, or this many times those of its checkpoint or of the bare architecture.
_MOST_BYTES, _MOST_TIMES = 1 << 30, 2


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ModelError: it is missing, of another format, or damaged.
    """
    if not path.is_file():
        raise ModelError(f"checkpoint '{path}' does not exist")
    if path.suffix != ".safetensors":
        raise ModelError(
            f"checkpoint '{path}' is not a .safetensors file; pickled checkpoints can run code when read and are never "
            "opened: convert it once with safetensors.torch.save_file"
        )
    return read_tensors(path, what="checkpoint", error=ModelError)[1]


def fill(model: nn.Module, tensors: Mapping[str, Tensor], checkpoint: str | Path | None, advice: str) -> None:
    """Load ``tensors`` into ``model``, all of them and no others.

    Raises:
        ModelError: they do not fit; the differing tensors are named, and ``advice`` is given.
    """
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError:
        check_fits(model, tensors, checkpoint, advice)
        raise


def check_fits(model: nn.Module, tensors: Mapping[str, Tensor], checkpoint: str | Path | None, advice: str) -> None:
    """Raise ModelError unless the tensors are those of the model, by name, shape and kind of number."""
    there = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if there != wanted:
        raise ModelError(f"checkpoint '{checkpoint}' does not fit the model: {_difference(wanted, there)}; {advice}")
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() != tensors[key].is_floating_point():
            raise ModelError(
                f"checkpoint '{checkpoint}' does not fit the model: {key} is of dtype {tensors[key].dtype}"
            )


def check_proportion(name: str, args: Any, model: nn.Module, usual: int) -> None:
    """Raise ModelError where a model (without memory) would be out of all proportion to the ``usual`` bytes."""
    needed = size_of([*model.parameters(), *model.buffers()])
    if needed > _MOST_BYTES and needed > _MOST_TIMES * usual:
        raise ModelError(
            f"'{name}' with {args} would take {needed:,} bytes, far beyond the {usual:,} of the architecture or its "
            "checkpoint; choose a larger architecture, or correct the arguments"
        )


def is_large(model: nn.Module) -> bool:
    """Whether it pays to ask how large the bare architecture is."""
    return size_of([*model.parameters(), *model.buffers()]) > _MOST_BYTES


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _difference(wanted: dict[str, tuple[int, ...]], there: dict[str, tuple[int, ...]]) -> str:
    """The first few tensors that are missing, unknown or of another shape."""
    missing = [key for key in wanted if key not in there]
    unknown = [key for key in there if key not in wanted]
    shapes = [f"{k} is {there[k]}, not {wanted[k]}" for k in wanted if k in there and there[k] != wanted[k]]
    found = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    return "; ".join(f"{len(names)} tensors {what} ({some(names, count=2)})" for what, names in found if names)
