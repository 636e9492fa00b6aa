"""Fields of the page for settings, and the command's options for what they hold: both from the settings' own fields."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import ComcatError

#: Settings with a slider, which the mouse moves: smallest, largest, step.
SLIDERS = {"rank": (1, 64, 1), "steps": (10, 4000, 10), "validate_every": (0, 1000, 10)}


@dataclasses.dataclass(frozen=True)
class SettingField:
    """One setting that is an option of the command line too.

    Attributes:
        name: of the setting; panel: the group in which it is shown; text: what it says.
        default: the command's own; choices: of a text that is one of few; kind: int, float, bool or str.
        optional: whether it may be left empty, which is None; repeated: whether it is a list of texts.
    """

    name: str
    panel: str
    text: str
    default: Any
    kind: type
    choices: tuple[str, ...] = ()
    optional: bool = False
    repeated: bool = False
    flag: str | None = None

    @property
    def option(self) -> str:
        return self.flag or f"--{self.name.replace('_', '-')}"

    @property
    def label(self) -> str:
        """``lr`` -> "Learning rate"; the names of the command line where they are words."""
        words = {"lr": "learning rate", "token_lr": "token learning rate", "num_class_images": "class images to draw"}
        return words.get(self.name, self.name.replace("_", " ")).capitalize()

    def shown(self, value: Any) -> Any:
        """A value as the page holds it: lists as one text, nothing as an empty one."""
        if self.repeated:
            return ", ".join(value or ())
        return "" if value is None and self.kind is not bool else value

    def read(self, value: Any) -> Any:
        """What the page holds as a value of the setting.

        Raises:
            ComcatError: a number that is none; ranges are checked by the settings themselves.
        """
        if self.repeated:
            return tuple(part.strip() for part in str(value or "").split(",") if part.strip())
        if value is None or (isinstance(value, str) and not value.strip()):
            return None if self.optional else self.default
        if self.kind is bool:
            return bool(value)
        if self.kind is str:
            return str(value).strip()
        return number(value, self.label, self.kind)

    def component(self, default: Any) -> Any:
        """The gradio component, which holds ``default``."""
        import gradio as gr

        info = re.sub(r"\[/?\w+\]", "", self.text)
        texts: dict[str, Any] = {"label": self.label, "info": info}
        value = self.shown(default)
        if self.name in SLIDERS:
            low, high, step = SLIDERS[self.name]
            return gr.Slider(low, high, value, step=step, **texts)
        if self.kind is bool:
            return gr.Checkbox(value, **texts)
        if self.choices:
            return gr.Dropdown(list(self.choices), value=value, **texts)
        if self.kind is int and not self.optional:
            return gr.Number(value, precision=0, **texts)
        return gr.Textbox(value if isinstance(value, str) else f"{value:g}", **texts)


def fields_of(settings: type) -> list[SettingField]:
    """The fields of a class of settings that are options, in their order."""
    hints = get_type_hints(settings)
    found = []
    for field in dataclasses.fields(settings):
        text = field.metadata.get("option")
        if text is not None:
            kind = _kind(hints[field.name])
            found.append(SettingField(field.name, text.panel, text.text, field.default, flag=text.flag, **kind))
    return found


def _kind(hint: Any) -> dict[str, Any]:
    options = get_args(hint)
    if get_origin(hint) is Literal:
        return {"kind": str, "choices": options}
    if get_origin(hint) is tuple:
        return {"kind": str, "repeated": True}
    if type(None) in options:
        inner = next(option for option in options if option is not type(None))
        return {**_kind(inner), "optional": True}
    return {"kind": hint}


def as_arguments(fields: Iterable[SettingField], values: Mapping[str, Any]) -> list[str]:
    """The command's options for those values that are not the command's own defaults."""
    arguments: list[str] = []
    for field in fields:
        value = values.get(field.name, field.default)
        if value == field.default or value is None:
            continue
        if field.kind is bool:
            arguments.append(field.option if value else field.option.replace("--", "--no-", 1))
        elif field.repeated:
            arguments += [part for item in value for part in (field.option, item)]
        else:
            arguments += [field.option, f"{value:g}" if isinstance(value, float) else str(value)]
    return arguments


def number(value: Any, label: str, kind: type = float) -> Any:
    """What a field for a number holds, as int or float; None where it is empty.

    Raises:
        ComcatError: it is none, or no whole one where it must be.
    """
    text = str("" if value is None else value).strip()
    if not text:
        return None
    try:
        found = float(text)
        if kind is int and found != int(found):
            raise ValueError
    except (ValueError, OverflowError) as error:
        raise ComcatError(f"“{label}” is {text!r}, but must be a {'whole ' if kind is int else ''}number") from error
    return int(found) if kind is int else found
