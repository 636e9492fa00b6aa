"""Packages that import their public names on first use, so that importing the package itself costs nothing.

    if TYPE_CHECKING:
        from .plan import Budget  # for type checkers and editors

    _lazy.package(__name__, {"Budget": "plan"})  # comcat.Budget imports comcat.plan when it is first asked for

Some public functions bear the name of the module they live in: ``comcat.calibrate`` is the function, whether or not
``comcat/calibrate.py`` has been imported, by whomever, and in whatever order.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

# One thread at a time: timm's and transformers' modules import each other in circles, and two threads that enter such a
# circle at different points get modules that are not finished. Submodules, which modules import while they are being
# imported themselves, go without it: with it, two threads could wait for each other.
_LOCK = threading.RLock()


class _Package(ModuleType):
    """A package's module; ``_homes`` maps each public name to the submodule that defines it."""

    _homes: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        """A public name, or a submodule, that nobody has asked for before."""
        if name in self._homes:
            with _LOCK:
                value = getattr(import_module(f"{self.__name__}.{self._homes[name]}"), name)
            # What another thread has put there meanwhile, a test's replacement perhaps, stays.
            return vars(self).setdefault(name, value)
        if not name.startswith("_"):
            submodule = f"{self.__name__}.{name}"
            try:
                return import_module(submodule)
            except ModuleNotFoundError as error:
                if error.name != submodule:  # it is there, and something that it needs is not
                    raise
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds every submodule to its package, once it is loaded.
        if name in self._homes and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)

    def __dir__(self) -> Iterable[str]:
        return sorted({*vars(self), *self._homes})


def package(name: str, homes: Mapping[str, str]) -> None:
    """Make the package ``name`` import its public names from their ``homes``, its submodules, on first use."""
    module = sys.modules[name]
    vars(module)["_homes"] = dict(homes)
    module.__class__ = _Package
