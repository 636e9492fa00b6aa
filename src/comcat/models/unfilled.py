"""Models that are built for their shapes alone, on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: What initializations do to a weight, in place; on the meta device PyTorch works out in Python, at length, that
#: nothing comes of it.
_FILLS = frozenset([Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.clamp_])


class _Unfilled(TorchFunctionMode):
    """Filling a tensor that holds nothing does nothing."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def building(meta: bool = True) -> Iterator[None]:
    """Modules that are made inside are on the CPU; with ``meta``, they are shapes that take no memory and little time.

    PyTorch's generator of random numbers is left as it was.
    """
    unfilled = _Unfilled() if meta else nullcontext()
    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"), unfilled:
        yield
