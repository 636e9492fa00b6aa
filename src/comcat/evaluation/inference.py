"""Running a model to look at its outputs: where, in which mode, and what is refused."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..models.modes import evaluating
from ..models.running import explained
from .outputs import Outputs


@contextlib.contextmanager
def inference(model: nn.Module, device: torch.device | str | None) -> Iterator[tuple[torch.device, torch.dtype]]:
    """``model`` in evaluation mode on ``device``; every submodule's mode and the device are restored."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    home = first.device
    with evaluating(model):
        try:
            target = torch.device(device) if device is not None else home
            torch.empty(0, device=target)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"there is no device {str(device)!r} here: {error}. Choose another device") from error
        try:
            with explained(torch.empty(0, device=target)):
                model.to(target)
            # Not inference mode: what a model caches in it could never be trained with.
            with torch.no_grad():
                yield target, first.dtype
        finally:
            model.to(home)


def forward_checked(inputs: Any, amp_dtype: torch.dtype | None, read: Outputs) -> Any:
    """Outputs in at least float32, checked for kind and NaN; ``inputs`` are those of :meth:`Outputs.inputs`."""
    with explained(inputs), torch.autocast(inputs.device.type, amp_dtype, enabled=amp_dtype is not None):
        found = read.run(inputs)
    if not all(torch.isfinite(tensor).all() for tensor in read.tensors(found)):
        raise ModelError(
            "the outputs hold NaN or infinite values. Check the weights and the normalization of the images"
            + (f", or compute in float32 instead of {amp_dtype}" if amp_dtype else "")
        )
    return found


def comparable(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Our outputs in the dtype of theirs; ModelError where they are of another shape."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        raise ModelError(
            f"the models have {ours[0].shape[1:].numel()} and {theirs[0].shape[1:].numel()} outputs. Compare models of "
            "the same classes"
        )
    return tuple(t.to(r.dtype) for t, r in zip(ours, theirs, strict=True))


def length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader) or None  # type: ignore[arg-type]
    except TypeError:
        return None


def now(device: torch.device) -> float:
    """Seconds, when all work on the device is done."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
    return time.perf_counter()
