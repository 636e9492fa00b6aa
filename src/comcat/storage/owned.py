"""What comcat makes under one name, so that ``--overwrite`` replaces that and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..wording import some
from .reader import read_json

#: Pattern of a name -> None for a file, or what the directory may hold.
DirectoryLayout = Mapping[str, Any]

#: The file that marks a directory as a model saved by comcat.
CONFIG_NAME = "comcat.json"
#: The file of a run that says which other files are its own, see :mod:`comcat.storage.manifest`.
MANIFEST_NAME = ".comcat-run.json"

CHECKPOINT: DirectoryLayout = {"state.json": None, "*.safetensors": None}
EVENTS: DirectoryLayout = {"events.out.tfevents.*": None}
_MODEL: DirectoryLayout = {
    CONFIG_NAME: None,
    "model.safetensors": None,
    "plan.json": None,
    "report.json": None,
    "report.png": None,
    "report.html": None,
    "finetune.json": None,
    "metrics.jsonl": None,
    "search.jsonl": None,
    "search.png": None,
    MANIFEST_NAME: None,
    "tensorboard": EVENTS,
    "checkpoints": {"step-*": CHECKPOINT},
}


@dataclass(frozen=True)
class DirectoryKind:
    """A kind of directory.

    Attributes:
        name: with its article, for messages.
        marker: a JSON file in it; field, type: one that it has.
        layout: all that it may hold.
    """

    name: str
    marker: str
    field: str
    layout: DirectoryLayout
    type: type | tuple[type, ...] = int


#: What ``save_pretrained`` and timm write, for a model that needs no comcat.
_STOCK: DirectoryLayout = {
    "config.json": None,
    "model*.safetensors": None,
    "model.safetensors.index.json": None,
    "preprocessor_config.json": None,
    "plan.json": None,
    "report.json": None,
    "report.png": None,
    "report.html": None,
}

MODEL = DirectoryKind("a comcat model", CONFIG_NAME, "comcat_format", _MODEL)
STOCK = DirectoryKind("a stock model written by comcat", "plan.json", "comcat_plan", _STOCK)


def check_replaceable(path: Path, kind: DirectoryKind) -> None:
    """Raise CheckpointError unless ``path`` is of this kind and holds nothing else."""
    marker = path / kind.marker
    if not marker.is_file():
        raise CheckpointError(
            f"output directory '{path}' holds files that are not {kind.name}; they are not overwritten, choose another "
            "directory"
        )
    try:
        document = read_json(marker)
    except CheckpointError as error:
        raise CheckpointError(
            f"output directory '{path}' is not overwritten: whether it is {kind.name} cannot be told ({error}); choose "
            "another directory"
        ) from error
    if not isinstance(document, dict) or not isinstance(document.get(kind.field), kind.type):
        raise CheckpointError(
            f"output directory '{path}' is not {kind.name}: its {kind.marker} is of something else; it is not "
            "overwritten, choose another directory"
        )
    found = strangers(path, kind.layout)
    if found:
        raise CheckpointError(
            f"output directory '{path}' also holds {some(map(repr, found))}, which comcat did not make; "
            "it is not overwritten, move that away or choose another directory"
        )


def strangers(path: Path, layout: DirectoryLayout) -> list[str]:
    """Relative names of what is in ``path`` and not in ``layout``.

    Raises:
        CheckpointError: it cannot be read, for example because another process has just replaced it.
    """
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise CheckpointError(f"directory '{path}' cannot be read: {error.strerror}") from error
    found = []
    for entry in entries:
        inner = next((layout[pattern] for pattern in layout if fnmatchcase(entry.name, pattern)), Ellipsis)
        is_directory = entry.is_dir() and not entry.is_symlink()
        if inner is Ellipsis or (inner is None) == is_directory or (inner is not None and entry.is_symlink()):
            found.append(entry.name)
        elif inner is not None:
            found += [f"{entry.name}/{name}" for name in strangers(entry, inner)]
    return found
