"""A name says what a thing is: no file and no class of the library has the name of another one."""

import ast
from collections import defaultdict
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
#: Names of classes that are still to be told apart.
TWICE: set[str] = set()


def twice(found: list[tuple[str, Path]]) -> dict[str, list[str]]:
    places = defaultdict(list)
    for name, file in found:
        places[name].append(str(file.relative_to(SOURCE)))
    return {name: files for name, files in places.items() if len(files) > 1}


def test_no_file_name_occurs_twice() -> None:
    files = [(file.name, file) for file in SOURCE.rglob("*.py") if not file.name.startswith("__")]
    assert len(files) > 150
    assert twice(files) == {}


def test_no_class_name_occurs_twice() -> None:
    classes = [
        (node.name, file)
        for file in sorted(SOURCE.rglob("*.py"))
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef)
    ]
    assert len(classes) > 150
    assert {name: files for name, files in twice(classes).items() if name not in TWICE} == {}
