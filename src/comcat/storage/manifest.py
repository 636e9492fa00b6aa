"""Which files of a directory comcat wrote: a run shares its directory with what its user keeps there."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from ..errors import CheckpointError
from .atomic import atomic_file, onto_nothing, sync_directory, written
from .owned import MANIFEST_NAME
from .reader import read_json, shown

_FIELD = "comcat_files"


class Manifest:
    """Relative name -> SHA-256 of what comcat wrote into ``folder``, or None for what grows; kept in a file there.

    A name is recorded before its file is written, so that after a kill nothing is there that is not recorded.

    Raises:
        CheckpointError: the file of that name is of something else.
    """

    def __init__(self, folder: Path, name: str = MANIFEST_NAME) -> None:
        self.folder, self.path = folder, folder / name
        self.files: dict[str, str | None] = {}
        self.exists = self.path.is_file()
        if self.exists:
            self.files = _read(self.path)

    def knows(self, name: str) -> bool:
        """Whether what is under ``name``, if anything, is of comcat and unchanged since."""
        path = self.folder / name
        if not path.exists():
            return True
        if name not in self.files:
            return False
        recorded = self.files[name]
        return recorded is None or (path.is_file() and recorded == _digest(path))

    def record(self, name: str, sha: str | None = None) -> None:
        """Say that comcat writes ``name``."""
        if not self.exists or self.files.get(name, "") != sha:
            self.files[name] = sha
            self._write()

    def write(self, name: str, content: bytes) -> None:
        """Write a file of this run, over nothing but its own."""
        self.refuse_others([name])
        self.record(name, hashlib.sha256(content).hexdigest())
        with atomic_file(self.folder / name) as file:
            file.write(content)

    def take(self, source: Path, name: str) -> None:
        """Rename a finished file to ``name``, over nothing but what comcat wrote.

        Raises:
            CheckpointError: something else is there by now.
        """
        self.refuse_others([name])
        target = self.folder / name
        self.record(name, _digest(source))
        try:
            if target.exists():
                source.replace(target)
            else:
                onto_nothing(source, target)
        except FileExistsError as error:
            raise CheckpointError(f"'{target}' came into being meanwhile and is left as it is") from error
        sync_directory(self.folder)
        written.append(target)

    def remove(self, name: str) -> None:
        """Remove a file of this run; one that was changed since, or is of something else, stays."""
        path = self.folder / name
        if self.knows(name) and not (path.is_dir() and not path.is_symlink()):
            path.unlink(missing_ok=True)
            self.forget(name)

    def forget(self, name: str) -> None:
        """Say that ``name`` is no longer there."""
        if name in self.files:
            del self.files[name]
            self._write()

    def free(self, name: str) -> str:
        """``name``, or one with a number if something else is there."""
        path = Path(name)
        number, found = 1, name
        while not self.knows(found):
            found = str(path.with_name(f"{path.stem}-{number}{path.suffix}"))
            number += 1
        return found

    def refuse_others(self, names: list[str]) -> None:
        """Raise CheckpointError if one of ``names`` is there and not of comcat."""
        for name in names:
            if not self.knows(name):
                raise CheckpointError(
                    f"'{self.folder / name}' is there and was not written by this run, or was changed since; it is "
                    "left as it is, move it away or choose another directory"
                )

    def _write(self) -> None:
        with atomic_file(self.path) as file:
            file.write((json.dumps({_FIELD: self.files}, indent=1, sort_keys=True) + "\n").encode())
        self.exists = True


def remove_emptied(folder: Path, *names: str) -> None:
    """Remove directories of these names in ``folder``, as far as nothing is left in them."""
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            shutil.rmtree(path, ignore_errors=True)


def _read(path: Path) -> dict[str, str | None]:
    document = read_json(path)
    files = document.get(_FIELD) if isinstance(document, dict) else None
    if not isinstance(files, dict) or not all(v is None or isinstance(v, str) for v in files.values()):
        raise CheckpointError(f"'{path}' is not comcat's list of its files; move it away or choose another directory")
    for name in files:
        if not _is_within(name):
            raise CheckpointError(
                f"'{path}' lists {shown(name)}, which is no file of its directory; move the list away"
            )
    return files


def _is_within(name: str) -> bool:
    """Whether a name is that of something in the directory: a list that somebody edited must not lead elsewhere."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") or len(part.encode()) > 255 or set(part) & set("\0\\") for part in parts)


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()
