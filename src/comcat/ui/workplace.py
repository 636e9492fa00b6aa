"""Where the page works: the base, the folder of adapters, and what lies beside an adapter there.

FOLDER/dog.safetensors      the adapter
FOLDER/dog.run/             checkpoints, log and samples of its training, as comcat customize has them
FOLDER/dog.photos/          the photos with their captions, and what else the training was told
"""

from __future__ import annotations

import contextlib
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ComcatError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]*")


@dataclass(frozen=True)
class Workplace:
    """What ``comcat ui`` was told.

    Attributes:
        base: a pipeline's directory or its name on the Hub, or "".
        folder: of the adapters; made when something is written to it.
        device: auto or cpu; variant: of the base's weights.
    """

    base: str
    folder: Path
    device: str = "auto"
    variant: str | None = None

    @property
    def options(self) -> list[str]:
        """Of every command that opens the base."""
        variant = ["--variant", self.variant] if self.variant else []
        return [*variant, *(["--device", self.device] if self.device != "auto" else [])]

    def adapter(self, name: str) -> Path:
        """The file of an adapter.

        Raises:
            ComcatError: a name that no file in the folder can have.
        """
        stem = name.strip().removesuffix(".safetensors")
        if not _NAME.fullmatch(stem):
            raise ComcatError(f"the name {name!r} is none for a file: use letters, digits, '-', '_', '.' and blanks")
        return self.folder / f"{stem}.safetensors"

    def run(self, name: str) -> Path:
        return self.adapter(name).with_suffix(".run")

    def photos(self, name: str) -> Path:
        return self.adapter(name).with_suffix(".photos")


@dataclass(frozen=True)
class LibraryEntry:
    """One adapter of the folder, as its file says it; ``problem`` where it cannot be read."""

    path: Path
    bytes: int
    header: Any = None
    problem: str = ""

    @property
    def name(self) -> str:
        """That of the file, which is unique."""
        return self.path.stem

    @property
    def word(self) -> str:
        token = self.header.token if self.header else None
        return token["text"] if token else ""

    @property
    def ranks(self) -> str:
        """``2``, or ``1 to 4``."""
        parts = self.header.components.values() if self.header else ()
        ranks = sorted({entry.rank for part in parts for entry in part.layers.values()})
        return "" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"

    def row(self) -> list[str]:
        """Name, base, rank, size, word and prompt, as the table shows them."""
        from ..report.format import size

        if self.header is None:
            return [self.name, f"cannot be used: {self.problem}", "", size(self.bytes), "", ""]
        base = Path(self.header.base.get("name") or "unnamed").name
        return [self.name, base, self.ranks, size(self.bytes), self.word, self.header.prompt or ""]


def library(folder: Path) -> list[LibraryEntry]:
    """The adapters of a folder, by name; other files are left out, damaged adapters are not."""
    found = []
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # it has just been removed
            stamp = path.stat()
            found.append(_entry(path, stamp.st_size, stamp.st_mtime_ns))
    return [entry for entry in found if entry is not None]


@functools.lru_cache(maxsize=4096)
def _entry(path: Path, size: int, changed: int) -> LibraryEntry | None:
    """A file as it was ``changed`` last: read once, not at every look; None for another kind of file."""
    from ..customize.files.adapter_file import read_adapter
    from ..customize.files.restoring import is_adapter

    try:
        return LibraryEntry(path, size, read_adapter(path)[0]) if is_adapter(path) else None
    except CheckpointError as error:
        return LibraryEntry(path, size, problem=str(error))


def unfinished(folder: Path) -> list[str]:
    """The names of trainings that can go on: their run has a checkpoint."""
    from ..training.state import checkpoints

    runs = sorted(folder.glob("*.run")) if folder.is_dir() else ()
    return [run.stem for run in runs if checkpoints(run)]
