"""How a setting reads on the command line, kept beside its default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class OptionText:
    """One option.

    Attributes:
        panel: the group that it is shown in; text: what it says; metavar: the word for its value.
        flag: its name, where that is not the field's.
        shown: whether the default is shown, or how.
    """

    panel: str
    text: str
    metavar: str | None = None
    flag: str | None = None
    shown: bool | str = True


def setting(default: Any, panel: str, text: str, metavar: str | None = None, **more: Any) -> Any:
    """A field of a dataclass with a default, which is an option too; ``more`` as :class:`OptionText` takes it."""
    return field(default=default, metadata={"option": OptionText(panel, text, metavar, **more)})
