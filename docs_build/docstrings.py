"""Docstrings as Markdown: roles of Sphinx become links to what the site describes, and code elsewhere."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object
from public_names import public_names

_ROLE = re.compile(r":(?:func|class|mod|meth|attr|data|exc):`~?([^`]+)`")


class Roles(Extension):
    """Runs on every object that griffe has read."""

    def __init__(self) -> None:
        super().__init__()
        self.known = {
            f"{package}.{name}" for package in ("comcat", "comcat.customize") for name in public_names(package)
        }

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(lambda role: self._shown(role[1]), obj.docstring.value)

    def _shown(self, name: str) -> str:
        for full in (name, f"comcat.{name}"):
            if full in self.known:
                return f"[`{full}`][{full}]"
        return f"`{name}`"
