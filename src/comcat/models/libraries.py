"""The libraries whose models comcat opens, describes and saves. Each is imported when it is first asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec

from torch import nn

from ..errors import CheckpointError, ComcatError, ModelError
from .library import Library

#: Name in files and on the command line -> the file here whose ``LIBRARY`` it is, and the package that it needs.
_LIBRARIES = {
    "timm": ("timm_models", "timm"),
    "transformers": ("transformers_models", "transformers"),
    "torchvision": ("torchvision_models", "torchvision"),
    "open_clip": ("open_clip_models", "open_clip"),
    "diffusers": ("diffusers_models", "diffusers"),
}
#: The extra of comcat that installs a package which is not always there.
_EXTRAS = {"transformers": "transformers", "open_clip": "openclip", "diffusers": "customize"}
NAMES = tuple(_LIBRARIES)


@cache
def _library(name: str) -> Library:
    found: Library = import_module(f".{_LIBRARIES[name][0]}", __package__).LIBRARY
    return found


def library(name: str, error: type[ComcatError] = CheckpointError) -> Library:
    """The library of this name.

    Raises:
        error: comcat does not know it, or it is not installed.
    """
    if name not in _LIBRARIES:
        raise error(f"comcat knows no library {name!r}; it knows {', '.join(NAMES)}. Upgrade comcat")
    package = _LIBRARIES[name][1]
    if package not in sys.modules and find_spec(package) is None:
        raise error(f"this model needs {name}, which is not installed: pip install 'comcat[{_EXTRAS[name]}]'")
    return _library(name)


def installed() -> Iterator[Library]:
    """All libraries that are installed."""
    for name, (_, package) in _LIBRARIES.items():
        if package in sys.modules or find_spec(package) is not None:
            yield _library(name)


def said_classes(model: nn.Module) -> int | None:
    """The number of the model's classes, if it says; 0 where it has no classifier."""
    home = library_of(model)
    found = getattr(model, "num_classes", None) if home is None else home.num_classes(model)
    return found if isinstance(found, int) else None


def library_of(model: nn.Module) -> Library | None:
    """The library that a model comes from; None where it is of none."""
    for name, (_, package) in _LIBRARIES.items():
        if package in sys.modules and (found := _library(name)).owns(model):
            return found
    return None


def prefixed(typed: str) -> tuple[Library, str] | None:
    """Library and name of a typed ``library/name``; None where it begins with no library's name."""
    name, slash, rest = typed.partition("/")
    if not slash or name not in _LIBRARIES or name in ("timm", "diffusers"):  # which are organizations of the Hub
        return None
    return library(name, ModelError), rest
