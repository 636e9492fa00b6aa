"""Putting modules into a model under every name that it has for the old ones, and back again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn


class Place(NamedTuple):
    """Where a module was put, and what was there before."""

    parent: nn.Module
    key: str
    old: nn.Module
    new: nn.Module

    def holds_new(self) -> bool:
        """False where somebody has since put something else in its place."""
        return self.parent._modules.get(self.key) is self.new

    def undo(self) -> None:
        setattr(self.parent, self.key, self.old)


def swap(model: nn.Module, new: Mapping[str, nn.Module], done: list[Place]) -> None:
    """Put the modules of ``new`` in place by name; a module that has several names is replaced under all of them.

    Args:
        done: every replacement is added before it happens, so that an interrupted call can be undone too.
    """
    wanted = {id(model.get_submodule(name)): module for name, module in new.items()}
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and id(child) in wanted:
                done.append(Place(parent, key, child, wanted[id(child)]))
                setattr(parent, key, wanted[id(child)])


def undo(done: list[Place]) -> None:
    """Put the old modules back, the last one first."""
    while done:
        done[-1].undo()
        done.pop()


@contextmanager
def swapped(model: nn.Module, new: Mapping[str, nn.Module]) -> Iterator[None]:
    """Modules in place by name, under all their names, and the old ones back afterwards."""
    done: list[Place] = []
    try:
        swap(model, new, done)
        yield
    finally:
        undo(done)
