"""Functions of somebody else's that look up a few names elsewhere: copies with globals of their own.

Nothing of the other's module is changed, so that everything else that uses it goes on as before.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any


def rebound_methods(cls: type, replaced: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    """The methods of a class that reach one of these names, also through functions of their module, as copies.

    Args:
        replaced: (name in the module of a method, attribute of it that is meant, "" for itself) -> what the name
            means in the copies.
    """
    scopes: dict[int, _Scope] = {}
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        for name, method in vars(base).items():
            if not isinstance(method, types.FunctionType):
                continue
            scope = scopes.setdefault(id(method.__globals__), _Scope(method.__globals__, replaced))
            if scope.reaches(method):
                found[name] = scope.rebound(method)
            else:
                found.pop(name, None)  # a subclass has another one
    return found


class _Scope:
    """The globals of one module with other meanings for some names."""

    def __init__(self, original: dict[str, Any], replaced: Mapping[tuple[str, str], Any]) -> None:
        self._wanted = [{name, attribute} - {""} for name, attribute in replaced if name in original]
        own = {
            name: value
            for name, value in original.items()
            if isinstance(value, types.FunctionType) and value.__globals__ is original
        }
        reached: set[str] = set()
        while more := {name for name, function in own.items() if self.reaches(function)} - reached:
            reached |= more
            self._wanted += [{name} for name in more]
        self._globals = dict(original)
        # torch.compile looks names up in the module of this name, which has the original ones.
        self._globals.pop("__name__", None)
        self._globals |= {name: value for (name, _), value in replaced.items() if name in original}
        self._globals |= {name: self.rebound(own[name]) for name in reached}

    def reaches(self, function: types.FunctionType) -> bool:
        names = set(_names_in(function.__code__))
        return any(wanted <= names for wanted in self._wanted)

    def rebound(self, function: types.FunctionType) -> types.FunctionType:
        made = types.FunctionType(
            function.__code__, self._globals, function.__name__, function.__defaults__, function.__closure__
        )
        made.__kwdefaults__ = function.__kwdefaults__
        return made


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def with_methods(instance: Any, methods: Mapping[str, Any]) -> Any:
    """``instance`` with other methods: another object of a subclass, with the same attributes."""
    cls = type(instance)
    made: Any = object.__new__(type(cls.__name__, (cls,), {"__module__": cls.__module__, **methods}))
    made.__dict__ = instance.__dict__
    return made


def module_with(module: types.ModuleType, **replaced: Any) -> types.ModuleType:
    """A module with the same contents but these."""
    made = types.ModuleType(module.__name__)
    vars(made).update(vars(module))
    vars(made).update(replaced)
    return made
