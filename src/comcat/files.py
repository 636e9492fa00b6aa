"""Writing files so that nothing half-written is ever seen under its final name."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from .errors import CheckpointError

#: The file that marks a directory as a model saved by comcat.
CONFIG_NAME = "comcat.json"


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The safetensors file content for ``tensors``."""
    return tensors_to_bytes({name: t.detach().contiguous() for name, t in tensors.items()}, metadata)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that appears under ``path`` complete, or not at all.

    Raises:
        CheckpointError: the file cannot be written (full disk, no permission); nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"cannot write '{path}': {error.strerror or error}; nothing was written") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_directory(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory that appears under ``path`` complete, or not at all; yields where to write meanwhile.

    Raises:
        CheckpointError: ``path`` already holds something and ``overwrite`` is off, or the disk is full.
    """
    path = Path(path).resolve()  # a link stays a link
    check_free(path, overwrite)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        temporary.chmod(0o755)
        yield temporary
        _replace_directory(temporary, path)
    except OSError as error:
        raise CheckpointError(f"cannot write '{path}': {error.strerror or error}; nothing was written") from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def _replace_directory(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``; what was there is set aside first and comes back if the rename fails."""
    old = new.with_suffix(".old")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:  # Ctrl-C included
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_free(path: str | Path, overwrite: bool = False) -> None:
    """Raise CheckpointError if ``path`` is a file, or a directory that holds something.

    ``overwrite`` allows a directory that holds a model saved by comcat, and no other.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"output '{path}' is a file; choose a directory")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"output directory '{path}' already holds something; choose another or overwrite it")
    if not (path / CONFIG_NAME).exists():
        raise CheckpointError(
            f"output directory '{path}' holds files that are not a comcat model; they are not overwritten, choose "
            "another directory"
        )
