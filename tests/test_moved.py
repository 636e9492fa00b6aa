"""Old names of modules lead to the same modules."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from comcat._moved import MOVED


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    """Old names are bound to their packages by an import; here they go again."""
    yield
    for name in [name for name in sys.modules if name[:7] == "comcat." and name[7:] in MOVED]:
        del sys.modules[name]
        parent, _, leaf = name.rpartition(".")
        if isinstance(vars(sys.modules[parent]).get(leaf), ModuleType):
            delattr(sys.modules[parent], leaf)


@pytest.mark.parametrize("old", ["customize.objective", "customize.photos", "factorize", "sites", "files", "compress"])
def test_an_old_name_is_the_module_at_its_new_place(old: str) -> None:
    sys.modules.pop(f"comcat.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"comcat\.{old} is comcat\.{MOVED[old]} now"):
        module = importlib.import_module(f"comcat.{old}")
    assert module is importlib.import_module(f"comcat.{MOVED[old]}")
    assert module.__spec__ is not None
    assert module.__spec__.name == module.__name__ == f"comcat.{MOVED[old]}"


def test_every_new_place_exists() -> None:
    for place in MOVED.values():
        name = place if place.startswith("comcat_demos") else f"comcat.{place}"
        assert importlib.util.find_spec(name) is not None, name


def test_public_names_are_not_hidden_by_old_modules() -> None:
    import comcat

    sys.modules.pop("comcat.evaluate", None)
    with pytest.warns(DeprecationWarning, match="is comcat"):
        importlib.import_module("comcat.evaluate")
    assert callable(comcat.evaluate)
    assert callable(comcat.compress)
