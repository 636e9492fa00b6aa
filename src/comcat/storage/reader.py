"""The one reader of files that somebody may have sent: with types, with limits, and without doing what they say.

A file is opened only if it is a regular one (a link to one is followed; a FIFO or a device is not), and read only up
to the size that the caller states. Text is UTF-8. JSON and YAML become plain data: dicts with text as keys, each once,
lists, texts, numbers that fit into 64 bits and are finite, nested no deeper than :data:`DEPTH`. Tensors come from
safetensors whose header has been checked first, so that memory is bounded by the file's own size. Nothing is ever
unpickled, and no path, address, name of code or regular expression that a file holds is followed here.

Every function takes the class of the error to raise, and what to call the file in its message.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ComcatError

if TYPE_CHECKING:
    from torch import Tensor

Failure = type[ComcatError]

#: Deepest nesting of JSON and YAML; the files of comcat need less than ten levels.
DEPTH = 50
#: Most values that one document may stand for, aliases of YAML written out.
NODES = 5_000_000
#: Most aliases in a file of YAML, and most fields that they may merge into one mapping.
_ALIASES = 1000
#: Largest file of settings, plan or metadata, and largest header of a safetensors file, in bytes.
TEXT_LIMIT = 32 << 20
#: Largest file of tensors, in bytes; far beyond any model of this library.
TENSOR_LIMIT = 1 << 40

_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_SIZES_FLOAT8 = {"F8_E4M3": 1, "F8_E5M2": 1}
#: Names of safetensors dtypes. ``PLAIN`` is what models are made of; float8 has to be asked for.
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
PLAIN = frozenset(_SIZES)
FLOAT8 = frozenset(_SIZES_FLOAT8)


def read_bytes(path: str | Path, *, limit: int, what: str = "", error: Failure = CheckpointError) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        error: there is none, it is no regular file, cannot be read, or is larger.
    """
    name = f"{what} '{path}'".strip()
    try:
        _check_kind(os.stat(path).st_mode, name, error)  # before opening: that alone has effects on some devices
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a FIFO put there meanwhile
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            _check_kind(status.st_mode, name, error)
            if status.st_size > limit:
                raise error(f"{name} has {status.st_size:,} bytes, more than the {limit:,} that it may have")
            content = file.read(min(limit, max(status.st_size, 1 << 20)) + 1)
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the path
        raise error(f"cannot read {name}: {getattr(cause, 'strerror', None) or cause}") from cause
    if len(content) > limit:
        raise error(f"{name} has more than the {limit:,} bytes that it may have")
    return content


def read_text(path: str | Path, *, limit: int = TEXT_LIMIT, what: str = "", error: Failure = CheckpointError) -> str:
    """The content of a UTF-8 file, with or without a byte order mark."""
    return _decoded(read_bytes(path, limit=limit, what=what, error=error), f"{what} '{path}'".strip(), error)


def read_json(path: str | Path, *, limit: int = TEXT_LIMIT, what: str = "", error: Failure = CheckpointError) -> Any:
    """Plain data from a JSON file; see :func:`parse_json`."""
    return parse_json(read_text(path, limit=limit, what=what, error=error), f"{what} '{path}'".strip(), error)


def parse_json(text: str, what: str, error: Failure = CheckpointError) -> Any:
    """Plain data from JSON.

    Raises:
        error: no JSON, a field twice, NaN or infinity, a number beyond 64 bits, nesting deeper than :data:`DEPTH`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant, parse_int=_small_int)
    except RecursionError as cause:
        raise error(f"{what} is nested too deeply") from cause
    except ValueError as cause:
        raise error(f"cannot read {what}: it is not valid JSON: {cause}") from cause
    _check_plain(value, what, error)
    return value


def read_yaml(path: str | Path, *, limit: int = 1 << 20, what: str = "", error: Failure = CheckpointError) -> Any:
    """Plain data from a YAML file; see :func:`parse_yaml`."""
    return parse_yaml(read_text(path, limit=limit, what=what, error=error), f"{what} '{path}'".strip(), error)


def parse_yaml(text: str, name: str, error: Failure = CheckpointError) -> Any:
    """Plain data from YAML; None for an empty text. No tags of Python, no dates, no sets, no field twice.

    Raises:
        error: it holds anything else.
    """
    import yaml

    try:
        value = yaml.load(text, Loader=_yaml_loader())
    except RecursionError as cause:
        raise error(f"{name} is nested too deeply") from cause
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as cause:
        # PyYAML's constructors raise whatever Python raises for a text that does not fit an explicit tag.
        raise error(f"cannot read {name}: it is not valid YAML: {' '.join(str(cause).split())}") from cause
    _check_plain(value, name, error)
    return value


def validated(kind: Any, data: Any, what: str, error: Failure = CheckpointError) -> Any:
    """``data`` (plain, as read here) as a pydantic model, dataclass or any type, without conversions.

    A list may stand for a tuple and a whole number for a float; a text never stands for a number.

    Raises:
        error: one line with the first field that is wrong, what was found there and what is wanted.
    """
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(json.dumps(data), strict=True)
    except ValidationError as cause:
        first = cause.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        wanted = first["msg"].removeprefix("Value error, ").removeprefix("Input ").removeprefix("String ")
        found = "is missing" if first["type"] == "missing" else f"is {shown(first['input'])}, but {wanted}"
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            found = "is not known"
        more = f" (and {cause.error_count() - 1} more)" if cause.error_count() > 1 else ""
        raise error(f"{what} is damaged: {where or 'its content'} {found}{more}") from cause


def digest(data: Any) -> str:
    """SHA-256 of plain data as JSON holds it (lists for tuples, texts for keys), whatever their order and layout."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(data)), sort_keys=True).encode()).hexdigest()


def shown(value: Any) -> str:
    """A short ``repr`` for a message; control characters are escaped."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    return short.repr(value)


def read_tensors(
    path: str | Path,
    *,
    limit: int = TENSOR_LIMIT,
    dtypes: Collection[str] = PLAIN,
    what: str = "",
    error: Failure = CheckpointError,
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file.

    Args:
        limit: largest size of the file in bytes.
        dtypes: names of the dtypes that are allowed, as safetensors spells them.

    Raises:
        error: missing, no regular file, too large, a pickle under another name, damaged, or of other dtypes.
    """
    content = read_bytes(path, limit=limit, what=what, error=error)
    return parse_tensors(content, f"{what} '{path}'".strip(), dtypes=dtypes, error=error)


def parse_tensors(
    content: bytes, what: str, *, dtypes: Collection[str] = PLAIN, error: Failure = CheckpointError
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors from the bytes of a safetensors file; see :func:`read_tensors`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    header = _header(content, what, error)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise error(f"the metadata of {what} is damaged: it must be texts by name")
    for name, entry in header.items():
        _check_entry(name, entry, dtypes, what, error)
    try:
        return metadata, load(content)
    except (SafetensorError, RuntimeError, ValueError, KeyError, OverflowError) as cause:
        raise error(f"{what} is damaged or no safetensors file: {cause}") from cause


def _header(content: bytes, what: str, error: Failure) -> dict[str, Any]:
    # A safetensors file begins with eight bytes of any value, then its JSON header.
    if content[8:9] != b"{" and (content[:4] == b"PK\x03\x04" or content[:1] == b"\x80"):
        raise error(
            f"{what} is a pickle, which could run any code when read; it is never unpickled. Ask for a real "
            "safetensors file"
        )
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or content[8:9] != b"{" or length > len(content) - 8:
        raise error(f"{what} is damaged or no safetensors file")
    if length > TEXT_LIMIT:
        raise error(f"{what} is damaged: its header has {length:,} bytes")
    header = parse_json(
        _decoded(content[8 : 8 + length], f"the header of {what}", error), f"the header of {what}", error
    )
    if not isinstance(header, dict):
        raise error(f"{what} is damaged or no safetensors file")
    return header


def _check_entry(name: str, entry: Any, dtypes: Collection[str], what: str, error: Failure) -> None:
    """Raise unless the header's entry is of an allowed dtype and takes the bytes that its shape needs."""
    problem = f"tensor {shown(name)} of {what}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise error(f"{problem} is damaged: it has no dtype, shape and place")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    size = {**_SIZES, **_SIZES_FLOAT8}.get(dtype) if isinstance(dtype, str) else None
    if size is None or dtype not in dtypes:
        raise error(
            f"{problem} has dtype {shown(dtype)}, which comcat does not write; it may be {', '.join(sorted(dtypes))}"
        )
    if not _naturals(shape) or not _naturals(place) or len(place) != 2 or len(shape) > 16:
        raise error(f"{problem} is damaged: shape {shown(shape)} at {shown(place)}")
    if math.prod(max(n, 1) for n in shape) >= 2**60 or math.prod(shape) * size != place[1] - place[0]:
        raise error(f"{problem} is damaged: shape {shown(shape)} does not fit its {place[1] - place[0]:,} bytes")


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


def _check_kind(mode: int, name: str, error: Failure) -> None:
    if stat.S_ISDIR(mode):
        raise error(f"{name} is a directory; give a file")
    if not stat.S_ISREG(mode):
        raise error(f"{name} is no regular file (a pipe, a socket or a device); give a file")


def _decoded(content: bytes, name: str, error: Failure) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(f"cannot read {name}: it is not UTF-8 text: {cause}") from cause


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the field {shown(name)} is there twice")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number that it may hold")


def _small_int(digits: str) -> int:
    if len(digits) > 20:  # long before int() of thousands of digits gets slow
        raise ValueError(f"the number {digits[:20]}... does not fit into 64 bits")
    return int(digits)


def _check_plain(document: Any, what: str, error: Failure) -> None:
    """Raise unless the document is plain data within the limits. Does not recurse."""
    level, depth, nodes = [document], 0, 0
    while level:
        nodes += len(level)
        if depth > DEPTH or nodes > NODES:
            raise error(f"{what} is nested too deeply" if depth > DEPTH else f"{what} stands for too many values")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.values()
                for name in value:
                    if not isinstance(name, str):
                        raise error(f"{what} has the field {shown(name)}; a field's name is a text")
                    _check_scalar(name, what, error)
            elif isinstance(value, list):
                below += value
            else:
                _check_scalar(value, what, error)
            if len(below) > NODES:
                raise error(f"{what} stands for too many values")
        level, depth = below, depth + 1


def _check_scalar(value: Any, what: str, error: Failure) -> None:
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as cause:
                raise error(f"{what} holds {shown(value)}, which is no text") from cause
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise error(f"{what} holds {value}, but numbers must be finite")
    elif isinstance(value, int):  # bool included
        if not -(2**63) <= value < 2**63:
            raise error(f"{what} holds a number that does not fit into 64 bits")
    elif value is not None:
        raise error(f"{what} holds a {type(value).__name__}; write it as a text in quotes, a number or a list")


@lru_cache(maxsize=64)
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


@lru_cache(maxsize=1)
def _yaml_loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Gives up at the first bracket, indent or alias too many: a kilobyte could otherwise take minutes to read."""

        aliases = 0

        def fetch_flow_collection_start(self, token: Any) -> None:
            self._bound(self.flow_level + len(self.indents))
            super().fetch_flow_collection_start(token)

        def add_indent(self, column: int) -> bool:
            self._bound(len(self.indents))
            return bool(super().add_indent(column))

        def _bound(self, depth: int) -> None:
            if depth > DEPTH:
                raise RecursionError

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                self.aliases += 1
                self._few(self.aliases, self.peek_event().start_mark)
            return super().compose_node(parent, index)

        def flatten_mapping(self, node: Any) -> None:
            super().flatten_mapping(node)
            self._few(len(node.value) if self.aliases else 0, node.start_mark)

        def _few(self, count: int, mark: Any) -> None:
            if count > _ALIASES:
                raise yaml.constructor.ConstructorError(None, None, "its aliases stand for too many values", mark)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
            for name, count in Counter(name for name in names if isinstance(name, str)).most_common(1):
                if count > 1:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{shown(name)} is there twice", node.start_mark
                    )
            return super().construct_mapping(node, deep)

    return Loader


_MERGE = "tag:yaml.org,2002:merge"
