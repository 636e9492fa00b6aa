"""``save_pretrained`` of a model with adapters on it: what is written is the base model alone."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

#: Names of the submodules that hold products and token vectors.
_OWN = ("adapters", "extra")


def keep_out_of_files(module: Any) -> None:
    """While adapters are on, ``save_pretrained`` writes the model as it was loaded; without any it is its own again."""
    if not _held(module):
        module.__dict__.pop("save_pretrained", None)
    elif hasattr(module, "save_pretrained") and "save_pretrained" not in module.__dict__:
        save: Any = functools.partial(_save_base, module)
        save.__signature__ = inspect.signature(module.save_pretrained)  # pipelines look at it
        module.save_pretrained = save


def _save_base(module: Any, *args: Any, **kwargs: Any) -> Any:
    with without_products(module):
        return type(module).save_pretrained(module, *args, **kwargs)


@contextlib.contextmanager
def without_products(module: nn.Module) -> Iterator[None]:
    """``module`` with the names and values of its tensors before any adapter, token vectors included."""
    taken = [(owner, key, owner._modules.pop(key)) for owner, key in _held(module)]
    try:
        yield
    finally:
        for owner, key, value in taken:
            owner._modules[key] = value


def _held(module: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(owner, key) for owner in module.modules() for key in _OWN if key in owner._modules]
