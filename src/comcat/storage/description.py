"""``comcat.json``: what a saved model is, apart from its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, NonNegativeInt

from ..compression import Report
from ..errors import CheckpointError
from .atomic import CONFIG_NAME
from .reader import digest, read_json, validated

#: 1 holds models of timm; 2 those of other libraries, with tied weights, which versions that read 1 alone refuse.
FORMAT = 2
_INNER = {"tensors": {"bytes", "sha256"}, "architecture": {"library", "name", "args", "config"}}
_FIELDS = {"comcat_format", "comcat_version", "architecture", "plan", "report", "tensors"}


class Architecture(BaseModel):
    """What :class:`comcat.models.source.Source` is made of, then ``attributes`` by module name."""

    library: str
    name: str
    args: dict[str, Any]
    config: dict[str, Any]
    attributes: dict[str, dict[str, Any]] = Field(default_factory=dict)
    wide_buffers: list[str] = Field(default_factory=list)  # not saved, and float32 whatever the parameters are


class TensorDigests(BaseModel):
    """Size and SHA-256 of the tensor file, and of the description itself (older files have none)."""

    bytes: NonNegativeInt
    sha256: str
    description: str | None = None


class Description(BaseModel):
    """The whole file."""

    comcat_format: int
    comcat_version: str
    architecture: Architecture
    plan: Any
    report: Report | None
    tensors: TensorDigests
    found: str = ""  # the digest of what was read

    def check_digest(self, name: str) -> None:
        """Raise CheckpointError if the description was changed after it was written."""
        if self.tensors.description not in (None, self.found):
            raise CheckpointError(
                f"{name} does not match its checksum: it was damaged or edited; copy the model again, or, if the edit "
                "was on purpose, remove the entry 'description' under 'tensors'"
            )


def description_digest(config: dict[str, Any]) -> str:
    """SHA-256 of a description (as read from JSON) without its own digest."""
    tensors = {key: value for key, value in config["tensors"].items() if key != "description"}
    return digest({**config, "tensors": tensors})


def read_description(path: Path) -> Description:
    """The description in the directory ``path``.

    Raises:
        CheckpointError: there is none, it is of a newer version, or damaged.
    """
    file = path / CONFIG_NAME
    if not file.exists():
        raise CheckpointError(
            f"'{path}' is not a model saved by comcat: it has no {CONFIG_NAME}. Give a directory that comcat compress, "
            "comcat finetune or comcat.save wrote"
        )
    config = read_json(file)
    if not isinstance(config, dict) or type(config.get("comcat_format")) is not int:
        raise CheckpointError(f"'{file}' is not a comcat model description")
    if config["comcat_format"] > FORMAT:
        raise CheckpointError(
            f"'{file}' has format {config['comcat_format']} (written by comcat {config.get('comcat_version')}), this "
            f"version reads up to {FORMAT}; upgrade comcat"
        )
    unknown, missing = sorted(set(config) - _FIELDS), sorted(_FIELDS - set(config))
    for name, fields in _INNER.items():
        inner = config.get(name)
        there = set(inner) if isinstance(inner, dict) else set()
        missing += [f"{name}.{field}" for field in sorted(fields - there)] if name in config else []
    if unknown or missing:
        said = [f"{what} fields {', '.join(names)}" for what, names in (("unknown", unknown), ("no", missing)) if names]
        raise CheckpointError(f"'{file}' has {' and '.join(said)}; it was edited or written by another tool")
    if config["comcat_format"] == 1 and config["architecture"]["library"] != "timm":
        raise CheckpointError(f"'{file}' has format 1, which holds models of timm alone; it was edited")
    if config["report"] is not None:
        try:
            Report.from_dict(config["report"])  # no field may be unknown
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"'{file}' is damaged: {error}") from error
    description: Description = validated(Description, config, f"'{file}'", CheckpointError)
    return description.model_copy(update={"found": description_digest(config)})
