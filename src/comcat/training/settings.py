"""Settings as frozen dataclasses that check themselves and come from plain data (JSON, YAML, the command line)."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

from ..errors import TrainingError
from ..storage.reader import read_yaml as _read_yaml

Own = TypeVar("Own", bound="TrainingSettings")


class TrainingSettings:
    """Base of a frozen dataclass of settings.

    Class attributes:
        ranges: smallest and largest value of the numbers; every entry of a tuple has to obey.
        free: fields that a resumed run may change, because none of them touches the result.
    """

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}
    free: ClassVar[tuple[str, ...]] = ()

    def check(self) -> None:
        """Convert every field to its type; for ``__post_init__``.

        Raises:
            TrainingError: a value of the wrong type or out of range.
        """
        hints = get_type_hints(type(self))
        for field in fields(self):  # type: ignore[arg-type]
            value = _typed(field.name, getattr(self, field.name), hints[field.name], self.ranges)
            object.__setattr__(self, field.name, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON and YAML can hold; :meth:`from_dict` reads it back."""
        values: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls: type[Own], data: Mapping[str, Any]) -> Own:
        """Settings from plain data; fields that are not named keep their defaults.

        Raises:
            TrainingError: an unknown field, a value of the wrong type or out of range.
        """
        check_fields(data, [field.name for field in fields(cls)])  # type: ignore[arg-type]
        return cls(**data)


def check_fields(data: Mapping[str, Any], known: list[str]) -> None:
    """Raise TrainingError naming the first field that is not ``known``, and what it may have meant."""
    for name in data:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 2)
            hint = f"did you mean {' or '.join(close)}?" if close else f"the fields are {', '.join(known)}"
            raise TrainingError(f"there is no setting '{name}'; {hint}")


def _typed(name: str, value: Any, hint: Any, ranges: Mapping[str, tuple[float, float]]) -> Any:
    """``value`` as the field's type.

    Raises:
        TrainingError: it is of another type, or out of range.
    """
    options = get_args(hint)
    if options and all(isinstance(option, str) for option in options):
        if value not in options:
            raise TrainingError(f"{name} is {value!r}; choose one of {', '.join(options)}")
        return value
    if value is None and type(None) in options:
        return None
    if options and options[-1] is type(None) and get_args(options[0]):
        return _typed(name, value, options[0], ranges)
    if options and options[-1] is Ellipsis:
        if not isinstance(value, (list, tuple)):
            raise TrainingError(
                f"{name} is {value!r}, but must be a list of {'texts' if options[0] is str else 'numbers'}"
            )
        return tuple(_plain(name, item, options[0], ranges) for item in value)
    return _plain(name, value, options[0] if options else hint, ranges)


def _plain(name: str, value: Any, kind: type, ranges: Mapping[str, tuple[float, float]]) -> Any:
    if kind is str:
        if not isinstance(value, str):
            raise TrainingError(f"{name} is {value!r}, but must be a text")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise TrainingError(f"{name} is {value!r}, but must be true or false")
        return value
    given = value
    if kind is float and isinstance(value, str):  # YAML takes 1e-4 for a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, int) and abs(value) > 2**63:
        raise TrainingError(f"{name} is a number of {len(hex(value)) - 2} hexadecimal digits, which is too large")
    wanted = (int, float) if kind is float else (int,)
    if not isinstance(value, wanted) or isinstance(value, bool) or not math.isfinite(value):
        raise TrainingError(f"{name} is {given!r}, but must be {'a number' if kind is float else 'a whole number'}")
    low, high = ranges.get(name, (-math.inf, math.inf))
    if not low <= value <= high:
        bounds = f"at least {low:g}" if value < low else f"at most {high:g}" if high == int(high) else "below 1"
        raise TrainingError(f"{name} is {value!r}, but must be {bounds}")
    return kind(value)


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; empty for an empty file.

    Raises:
        TrainingError: it cannot be read, is no YAML, or holds no mapping.
    """
    values = _read_yaml(file, error=TrainingError)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise TrainingError(f"'{file}' holds no settings; write lines such as 'epochs: 30'")
    return values
