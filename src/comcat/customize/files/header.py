"""The metadata of an adapter file: versioned JSON that is read with suspicion."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..._version import __version__
from ...errors import CheckpointError, ModelError
from ...storage.reader import parse_json
from ..adapter.attached import NAME, check_scale
from ..adapter.tokens import is_word

FORMAT = 1
KEY = "comcat"
Storage = Literal["float32", "float16", "bfloat16", "int8"]
STORAGES: tuple[Storage, ...] = ("float32", "float16", "bfloat16", "int8")


@dataclass(frozen=True)
class Entry:
    """What a file holds for one attention layer.

    Attributes:
        signature: of the layer that it was made for: its name, kind, heads and widths.
        biases: constants that it has, e.g. "sample.query".
    """

    rank: int
    signature: str
    biases: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """What a file holds for one component.

    Attributes:
        model: class of the component; fingerprint: of all of its attention layers.
    """

    model: str
    fingerprint: str
    layers: dict[str, Entry]


@dataclass(frozen=True)
class Header:
    """The metadata of an adapter file."""

    name: str
    scale: float
    storage: Storage
    base: dict[str, str]
    components: dict[str, Part]
    token: dict[str, Any] | None = None
    prompt: str | None = None
    training: dict[str, Any] | None = None
    format: int = FORMAT
    comcat: str = __version__

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str, path: Path) -> Header:
        """Raises CheckpointError for anything that :meth:`to_json` could not have written."""
        data: Any = parse_json(text, f"the metadata of '{path}'")
        try:
            version = data["format"]
            if not _is_int(version) or not 1 <= version <= FORMAT:
                raise CheckpointError(
                    f"'{path}' has format {version} (written by comcat {data.get('comcat')}), this version reads up to "
                    f"{FORMAT}; upgrade comcat"
                )
            unknown = sorted(set(data) - {f.name for f in fields(cls)})
            if unknown:
                raise CheckpointError(f"the metadata of '{path}' has unknown fields {', '.join(unknown)}")
            parts = {
                name: Part(**{**part, "layers": {key: Entry(**entry) for key, entry in part["layers"].items()}})
                for name, part in data["components"].items()
            }
            header = cls(**{**data, "components": parts})
            if header.storage not in STORAGES:
                raise CheckpointError(f"'{path}' is stored as {header.storage!r}, which is not known; upgrade comcat")
            header._check()
            return header
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, ModelError) as error:
            raise CheckpointError(f"the metadata of '{path}' is damaged: {error!r}") from error

    def _check(self) -> None:
        check_scale(self.scale)
        entries = [entry for part in self.components.values() for entry in part.layers.values()]
        parts = self.components.values()
        token = {"text": "V*", "vectors": 1} if self.token is None else self.token
        checks = {
            "name": isinstance(self.name, str) and NAME.fullmatch(self.name),
            "base": isinstance(self.base, dict) and all(isinstance(value, str) for value in self.base.values()),
            "token": isinstance(token, dict) and is_word(token["text"]) and _is_int(token["vectors"]),
            "prompt": self.prompt is None or isinstance(self.prompt, str),
            "training": self.training is None or isinstance(self.training, dict),
            "comcat": isinstance(self.comcat, str),
            "model": all(isinstance(part.model, str) and isinstance(part.fingerprint, str) for part in parts),
            "rank": all(_is_int(entry.rank) and isinstance(entry.signature, str) for entry in entries),
            "biases": all(
                isinstance(entry.biases, list) and all(isinstance(name, str) for name in entry.biases)
                for entry in entries
            ),
        }
        wrong = [name for name, right in checks.items() if not right]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} of another kind than a file of comcat has")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
