"""Another class for an object of somebody else's: a subclass of its own, under its own name."""

from __future__ import annotations

import functools
import types
from typing import Any, cast

from torch import nn


def derived(base: Any, mixin: type) -> type:
    """``base`` with methods of ``mixin`` before its own, under its own name: what a host looks up stays true."""
    return _derived(base, mixin)


@functools.cache
def _derived(base: type, mixin: type) -> type:
    return type(base.__name__, (mixin, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})


def change_class(module: nn.Module, cls: type) -> None:
    """Give a module another class; a ``forward`` that Accelerate's or diffusers' hooks have bound to it follows."""
    old, own = type(module), module.__dict__
    module.__class__ = cls

    def rebound(forward: Any) -> Any:
        ours = getattr(forward, "__func__", None) is cast(Any, old).forward
        return types.MethodType(cast(Any, cls).forward, module) if ours else forward

    for key in ("forward", "_old_forward"):
        if key in own:
            own[key] = rebound(own[key])
    for call in getattr(own.get("_diffusers_hook"), "_fn_refs", ()):
        call.forward, call.original_forward = rebound(call.forward), rebound(call.original_forward)


def original_class(of: Any, mixin: type) -> Any:
    """The class that a module or tokenizer had before :func:`derived`."""
    cls = type(of)
    return cls.__bases__[1] if issubclass(cls, mixin) else cls
