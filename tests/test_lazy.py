"""Packages that import their names on first use, on a package where a function and its module share a name."""

import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from unittest import mock

import pytest

INIT = """from comcat import _lazy

__all__ = ["Thing", "plan"]
_lazy.package(__name__, {"Thing": "things", "plan": "plan"})
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """``lazybox``: the function ``plan`` in ``plan.py``, the class ``Thing`` in ``things.py``, and ``broken.py``."""
    root = tmp_path / "lazybox"
    root.mkdir()
    (root / "__init__.py").write_text(INIT)
    (root / "plan.py").write_text("from .things import Thing\ndef plan():\n    return Thing\n")
    (root / "things.py").write_text("import time\ntime.sleep(0.01)\nclass Thing:\n    pass\n")
    (root / "broken.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("lazybox")
    for name in [n for n in sys.modules if n.partition(".")[0] == "lazybox"]:
        del sys.modules[name]


def test_nothing_is_imported_before_it_is_asked_for(package: ModuleType) -> None:
    assert {"Thing", "plan", "__all__"} <= set(dir(package))
    assert "lazybox.plan" not in sys.modules
    assert package.plan() is package.Thing
    assert "plan" in vars(package)  # found at once from now on


@pytest.mark.parametrize("first", ["import lazybox.plan", "from lazybox import plan", "from lazybox.plan import plan"])
def test_the_function_is_never_hidden_by_its_module(package: ModuleType, first: str) -> None:
    exec(first, {})
    for statement in ("import lazybox.plan as plan", "from lazybox import plan", "from lazybox import *"):
        names: dict[str, object] = {}
        exec(statement, names)
        assert isinstance(names["plan"], FunctionType)
    assert isinstance(package.plan, FunctionType)
    assert isinstance(importlib.import_module("lazybox.plan"), ModuleType)
    importlib.reload(importlib.import_module("lazybox.plan"))
    assert isinstance(importlib.reload(package).plan, FunctionType)


def test_submodules_are_attributes_as_ever(package: ModuleType) -> None:
    assert package.things.Thing is package.Thing
    with pytest.raises(AttributeError, match="module 'lazybox' has no attribute 'nothing'"):
        _ = package.nothing
    with pytest.raises(ImportError, match="cannot import name 'nothing' from 'lazybox'"):
        exec("from lazybox import nothing", {})
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        _ = package.broken  # what is missing is named, not the module that needs it


@pytest.mark.parametrize("used", [False, True])
def test_names_can_be_replaced_and_come_back(package: ModuleType, used: bool) -> None:
    if used:
        _ = package.plan
    with mock.patch("lazybox.plan") as double:
        assert package.plan is double
        importlib.import_module("lazybox.plan")
        assert package.plan is double
    assert package.plan() is package.Thing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "plan", 7)
        assert package.plan == 7
        patch.delattr(package, "Thing")
    assert package.plan() is package.Thing


def test_threads_that_ask_at_once_get_the_same(package: ModuleType) -> None:
    start = threading.Barrier(8)
    found: list[object] = []

    def ask(number: int) -> None:
        start.wait()
        if number % 4 == 3:
            importlib.import_module("lazybox.plan")
        found.append((package.plan, package.Thing)[:: 1 if number % 2 else -1])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert {frozenset(pair) for pair in found} == {frozenset((package.plan, package.Thing))}
    assert isinstance(package.plan, FunctionType)
