"""The metadata of an adapter file: versioned JSON that is read with suspicion."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from ..._version import __version__
from ...errors import CheckpointError
from ...storage.reader import parse_json, validated
from ..adapter.attached import NAME
from .numbers import Storage
from .packing import Packing

#: The newest: layers are packed. Format 1, a tensor for every factor, is written wherever it holds the adapter.
FORMAT = 2
KEY = "comcat"
STORAGES: tuple[Storage, ...] = get_args(Storage)
_CONFIG = ConfigDict(extra="forbid")


class TokenEntry(TypedDict):
    """The word that an adapter brings along, and how many vectors of a text encoder it stands for."""

    text: Annotated[str, Field(pattern=r"^\S+$")]
    vectors: int


@dataclass(frozen=True)
class Entry:
    """What a file holds for one attention layer.

    Attributes:
        signature: of the layer that it was made for: its name, kind, heads and widths.
        biases: constants that it has, e.g. "sample.query".
        packing: what its bytes are, in format 2.
    """

    rank: int
    signature: str
    biases: list[str] = field(default_factory=list)
    packing: Packing | None = None
    __pydantic_config__ = _CONFIG


@dataclass(frozen=True)
class Part:
    """What a file holds for one component.

    Attributes:
        model: class of the component; fingerprint: of all of its attention layers.
    """

    model: str
    fingerprint: str
    layers: dict[str, Entry]
    __pydantic_config__ = _CONFIG


@dataclass(frozen=True)
class Header:
    """The metadata of an adapter file."""

    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    scale: float
    storage: Storage
    base: dict[str, str]
    components: dict[str, Part]
    token: TokenEntry | None = None
    prompt: str | None = None
    training: dict[str, Any] | None = None
    format: int = 1
    comcat: str = __version__
    __pydantic_config__ = _CONFIG

    def to_json(self) -> str:
        data = asdict(self)
        for part in data["components"].values():
            for entry in part["layers"].values():
                if entry["packing"] is None:  # which the first versions do not know
                    del entry["packing"]
                elif entry["packing"]["kept"] is None:
                    del entry["packing"]["kept"]
        return json.dumps(data, sort_keys=True, separators=None if self.format == 1 else (",", ":"))

    @classmethod
    def from_json(cls, text: str, path: Path) -> Header:
        """Raises CheckpointError for anything that :meth:`to_json` could not have written."""
        what = f"the metadata of '{path}'"
        data: Any = parse_json(text, what)
        if not isinstance(data, dict) or "format" not in data:
            raise CheckpointError(f"{what} is damaged: format is missing")
        version = data["format"]
        if type(version) is not int or not 1 <= version <= FORMAT:
            raise CheckpointError(
                f"'{path}' has format {version} (written by comcat {data.get('comcat')}), this version reads up to "
                f"{FORMAT}; upgrade comcat"
            )
        if data.get("storage", STORAGES[0]) not in STORAGES:
            raise CheckpointError(f"'{path}' is stored as {data['storage']!r}, which is not known; upgrade comcat")
        header: Header = validated(cls, data, what)
        entries = [entry for part in header.components.values() for entry in part.layers.values()]
        if any((entry.packing is None) != (version == 1) for entry in entries):
            raise CheckpointError(f"{what} is damaged: layers are packed in format 2, and in no other")
        return header
