"""PyTorch as it is, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.running import explained, tensors_in
from .sessions import Session

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """So many threads inside, for the whole process; None leaves them as they are."""
    before = torch.get_num_threads()
    if count in (None, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchSession(Session):
    """A module, run on the device where it is; in another precision than its own, a copy of it that is cast."""

    runtime = "torch"
    packages: ClassVar[tuple[str, ...]] = ("torch",)
    precisions: ClassVar[tuple[str, ...]] = tuple(DTYPES)

    def _open(self, source: Any) -> None:
        if not isinstance(source, nn.Module):
            raise ModelError(f"{self.runtime} runs modules, not '{source}'; open a saved one with comcat.load_model")
        self.dtype = DTYPES[self.precision]
        first = next((p for p in source.parameters() if p.is_floating_point()), torch.empty(0))
        self.device, self.version = first.device, torch.__version__
        if first.dtype != self.dtype or source.training:
            source = copy.deepcopy(source).to(self.dtype).eval()
        self.module: Any = source

    def _prepared(self, arrays: Sequence[np.ndarray], named: Mapping[str, np.ndarray]) -> Any:
        if not arrays and not named:
            raise ModelError(f"{self.name} got no input")
        return [self._tensor(a) for a in arrays], {name: self._tensor(a) for name, a in named.items()}

    def _tensor(self, array: Any) -> Tensor:
        tensor = torch.as_tensor(np.asarray(array))
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def _run(self, inputs: Any) -> Any:
        args, kwargs = inputs
        largest = max([*args, *kwargs.values()], key=Tensor.numel)
        # Not inference mode: what a model caches in it could never be trained with.
        with torch_threads(self.threads), torch.no_grad(), explained(largest):
            output = self.module(*args, **kwargs)
            if self.device.type not in ("cpu", "meta"):
                torch.accelerator.synchronize(self.device)
        return output

    def _arrays(self, outputs: Any) -> list[np.ndarray]:
        return [_array(tensor) for tensor in tensors_in(outputs)]


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()
