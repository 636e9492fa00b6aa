"""Options of a command that are not written in its signature.

Those of configuration classes are made from their fields, so that a new field is one line there; those of how images
are read stand in many commands.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from ..training.option_texts import OptionText
from . import options as opt
from .inputs import Reading

Command = TypeVar("Command", bound=Callable[..., None])


def configured(*classes: Any, before: Mapping[str, str]) -> Callable[[Command], Command]:
    """Give a command, which takes them as keywords, an option for every field that has an :class:`OptionText`.

    An option that is not given is None, so that a file of settings can be told from it.

    Args:
        before: name or panel of a field -> the command's own parameter before which it stands; "" for all others.
    """

    def decorate(function: Command) -> Command:
        own = inspect.signature(function, eval_str=True)
        parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        for kind in classes:
            hints = get_type_hints(kind)
            for field in fields(kind):
                text = field.metadata.get("option")
                if text is not None:
                    place = before.get(field.name, before.get(text.panel, before[""]))
                    index = [p.name for p in parameters].index(place)
                    parameters.insert(index, _parameter(field, text, hints[field.name]))
        function.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return decorate


def reads_images(function: Command) -> Command:
    """Give a command the options of how images are read in place of its parameter ``reading_of``.

    It gets a function of DATA that gives the :class:`Reading`.
    """
    own = inspect.signature(function, eval_str=True)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (_, kind, default) in opt.READING.items()
    ]
    parameters: list[inspect.Parameter] = []
    for parameter in own.parameters.values():
        parameters += options if parameter.name == "reading_of" else [parameter]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]

    @functools.wraps(function)
    def run(**given: Any) -> None:
        how = {field: given.pop(name) for name, (field, _, _) in opt.READING.items()}
        function(reading_of=functools.partial(Reading, **how), **given)

    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


def _parameter(field: Field[Any], text: OptionText, hint: Any) -> inspect.Parameter:
    option = opt.Option(
        *((text.flag,) if text.flag else ()),
        help=text.text + _default(field.default, text.shown),
        rich_help_panel=text.panel,
        metavar=text.metavar,
        show_default=False,
    )
    kind = _type(hint, field.default) | None
    return inspect.Parameter(
        field.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=Annotated[kind, option]
    )


def _default(value: Any, shown: bool | str) -> str:
    """The default in words; one that is off, empty or a switch says nothing."""
    if not shown or value is None or value == () or isinstance(value, bool):
        return ""
    if shown is True:
        items = value if isinstance(value, tuple) else (value,)
        shown = " ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in items)
    return f" [dim]\\[default: {shown}][/dim]"


def _type(hint: Any, default: Any) -> Any:
    """What the command line reads for a field: lists of texts may be repeated, lists of numbers are one text."""
    if isinstance(hint, type):
        return hint
    options = [o for o in get_args(hint) if o not in (type(None), Ellipsis)]
    if isinstance(options[0], str):  # a choice, which the class checks and names
        return str
    if getattr(hint, "__origin__", None) is not tuple:
        return _type(options[0], default)
    if options[0] is str:
        return list[str]
    return tuple[(options[0],) * len(default)] if default else str  # type: ignore[misc]
