"""What the library promises to keep: the names in ``__all__``, read without importing anything."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"


def public_names(package: str) -> list[str]:
    """The names of ``comcat`` or of a package in it."""
    tree = ast.parse((SOURCE.joinpath(*package.split(".")) / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            names: list[str] = ast.literal_eval(node.value)
            return [name for name in names if not name.startswith("_")]
    raise ValueError(f"{package} has no __all__")


def with_the_rest(text: str, package: str) -> str:
    """A page of the reference, with what it does not describe yet at its end; errors have one place together."""
    rest = [
        f"::: {package}.{name}"
        for name in public_names(package)
        if f"::: {package}.{name}\n" not in f"{text}\n" and not name.endswith("Error")
    ]
    return text if not rest else "\n".join([text.rstrip(), "", "## More", "", *rest, ""])
