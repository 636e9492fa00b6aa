"""Modules that a host's module carries without having them: its own tensors stay all that it shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .derived import change_class, derived, original_class


class Carries:
    """Mixin for a module of the host: ``extras``, name -> what it carries, a module each.

    They move and are converted with the host, but are none of its submodules: what copies, saves, stores in 8 bit or
    offloads the host's tensors finds the base model alone. They are never stored in fewer than 16 bits.
    """

    extras: dict[str, Any]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def wide(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return tensor.to(found.device) if found.dtype.itemsize < 2 else found

        super()._apply(fn, recurse)  # type: ignore[misc]
        for extra in self.extras.values():
            extra._apply(wide)
        return self

    def train(self, mode: bool = True) -> Any:
        super().train(mode)  # type: ignore[misc]
        for extra in self.extras.values():
            extra.train(mode)
        return self


def carry(module: nn.Module, mixin: type[Carries], name: str, extra: nn.Module) -> None:
    """Let ``module`` carry ``extra``; the first one changes its class."""
    own: Any = module
    if not isinstance(module, mixin):
        own.extras = {}
        change_class(module, derived(type(module), mixin))
    extra.train(module.training)
    own.extras[name] = extra


def drop(module: nn.Module, mixin: type[Carries], name: str) -> None:
    """Take ``name`` out again; after the last one the module is what it was."""
    own: Any = module
    del own.extras[name]
    if not own.extras:
        change_class(module, original_class(module, mixin))
        del own.extras
