"""Writing files so that nothing half-written is ever seen under its final name, and nothing is lost that was there.

Everything is written under a temporary name beside the final one (:mod:`comcat.storage.temporary`), reaches the disk,
and is then renamed. A file is replaced in one step everywhere; a directory where the system can exchange two names
(Linux and macOS on local disks). Elsewhere the old directory is set aside for a moment: a kill in it leaves
``.NAME.comcat-old``, which the next writer, or :func:`recover`, puts back.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from ..errors import CheckpointError
from . import temporary
from .exchange import exchange, onto_nothing
from .owned import CONFIG_NAME as CONFIG_NAME
from .owned import MODEL, DirectoryKind, check_replaceable

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
_IN_USE = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)

#: What this process has written under final names, for messages that say so.
written: list[Path] = []


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The safetensors file content for ``tensors``: the same bytes for the same content."""
    from safetensors.torch import save as tensors_to_bytes

    content = tensors_to_bytes({name: t.detach().contiguous() for name, t in tensors.items()}, metadata)
    return _sorted_metadata(content) if metadata and len(metadata) > 1 else content


def _sorted_metadata(content: bytes) -> bytes:
    """safetensors writes the entries of the metadata in random order."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[end:]


@contextmanager
def atomic_file(path: str | Path, overwrite: bool = True) -> Iterator[BinaryIO]:
    """A binary file that appears under ``path`` complete, or not at all; a link stays a link.

    Args:
        overwrite: replace a file that is there by then. Otherwise it is an error, and the new file is kept beside it.

    Raises:
        CheckpointError: the file cannot be written (full disk, no permission, no regular file); nothing is left behind.
    """
    path = Path(os.path.realpath(path))
    with _explained(path), _parents(path):
        mode = _mode(path)
        temporary.sweep(path.parent)
        with temporary.new(path, directory=False) as new:
            with open(new, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if mode is not None:
                with suppress(OSError):
                    new.chmod(mode)
            if overwrite:
                os.replace(new, path)
            else:
                try:
                    onto_nothing(new, path)
                except FileExistsError as error:
                    _keep(new, path, error)
            _done(path)


@contextmanager
def atomic_directory(path: str | Path, overwrite: bool = False, kind: DirectoryKind = MODEL) -> Iterator[Path]:
    """A directory that appears under ``path`` complete, or not at all; yields where to write meanwhile.

    Inside another one it is written in place: the outer one appears as a whole.

    Args:
        overwrite: replace a directory of this ``kind``, and no other.

    Raises:
        CheckpointError: ``path`` already holds something and ``overwrite`` is off, or the disk is full. Where it came
            to hold something in between, the new directory is kept beside it, and named.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    if temporary.is_staged(path):
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    check_free(path, overwrite, kind)
    with _explained(path), _parents(path):
        temporary.sweep(path.parent)
        with temporary.new(path, directory=True) as new:
            yield new
            sync_tree(new)
            _publish(new, path, overwrite, kind)
            _done(path)


@contextmanager
def claimed_output(path: str | Path) -> Iterator[None]:
    """While long work is done for ``path``, other processes that would write there are told so at their start.

    Raises:
        CheckpointError: another process works for it.
    """
    path = Path(os.path.realpath(path))
    with _explained(path), _parents(path), temporary.claimed(path):
        yield


def _publish(new: Path, path: Path, overwrite: bool, kind: DirectoryKind) -> None:
    """Give ``new`` its name; what is replaced is left under the temporary one."""
    if not overwrite:
        _name(new, path)
        return
    with temporary.claimed(path, _beside(path, "swap"), wait=True):
        if not path.is_dir():
            _name(new, path)
            return
        try:
            _check(path, True, kind)
        except CheckpointError as error:
            _keep(new, path, error)
        hold = temporary.Hold(path, wait=True)  # under the temporary name it would be taken for one left behind
        try:
            if not exchange(new, path):
                _set_aside(new, path)
                return
            try:
                _check(new, True, kind)  # it may have been given more until now
            except CheckpointError as error:
                exchange(new, path)
                _keep(new, path, error)
        finally:
            hold.release()


def _name(new: Path, path: Path) -> None:
    try:
        onto_nothing_or_empty(new, path)
    except OSError as error:
        if error.errno not in _IN_USE:
            raise
        _keep(new, path, error)


def _set_aside(new: Path, path: Path) -> None:
    old = _beside(path, "old")
    temporary.remove(old)
    os.rename(path, old)
    try:
        _name(new, path)
    except BaseException as error:  # Ctrl-C included
        if os.path.lexists(path) and isinstance(error, Exception):  # another writer's, which does not overwrite
            _keep(old, path, error)
        os.rename(old, path)
        raise
    temporary.remove(old)


def onto_nothing_or_empty(source: Path, target: Path) -> None:
    """Rename a directory to a name that is free, or that of an empty directory; OSError if it is neither."""
    if os.name == "nt" and target.is_dir():
        target.rmdir()
    os.rename(source, target)


def _keep(new: Path, path: Path, cause: Exception) -> None:
    """Leave the result of long work beside ``path``, where something is that must not be replaced.

    Raises:
        CheckpointError: always; it says where.
    """
    number = 1
    while True:
        kept = path.with_name(f"{temporary.stem(path.stem)}-{number}{path.suffix}")
        number += 1
        if os.path.lexists(kept):
            continue
        try:
            (os.rename if new.is_dir() else onto_nothing)(new, kept)
        except OSError as error:
            if error.errno in _IN_USE:
                continue
            raise
        break
    _done(kept)
    why = f" ({cause})" if isinstance(cause, CheckpointError) else ""
    raise CheckpointError(
        f"'{path}' came to hold something while the result was made, and is left as it is{why}; the result is in "
        f"'{kept}'"
    ) from cause


def recover(path: str | Path) -> None:
    """Put back what a killed process had set aside while it replaced ``path``."""
    path = Path(os.path.realpath(path))
    old = _beside(path, "old")
    if not old.is_dir():
        return
    with suppress(OSError), temporary.claimed(path, _beside(path, "swap"), wait=True):
        if os.path.lexists(path):
            temporary.remove(old)
        else:
            os.rename(old, path)


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{temporary.stem(path.name)}.comcat-{what}")


def check_free(path: str | Path, overwrite: bool = False, kind: DirectoryKind = MODEL) -> None:
    """Raise CheckpointError if a directory cannot be written there, or would replace what is not to be replaced.

    ``overwrite`` allows a directory of this ``kind``, by default a model saved by comcat, that holds nothing else.
    """
    recover(path)
    while True:
        before = _identity(path)
        try:
            _check(Path(path), overwrite, kind)
            return
        except CheckpointError:
            if _identity(path) == before:  # else it was replaced meanwhile
                raise


def read_whole(path: str | Path, read: Callable[[], T]) -> T:
    """``read()`` of several files in a directory, again where that failed because another process replaced it."""
    recover(path)
    while True:
        before = _identity(path)
        try:
            return read()
        except CheckpointError:
            if _identity(path) == before:
                raise


def _identity(path: str | Path) -> tuple[int, int, int] | None:
    """What ``path`` stands for, with the time of its last change: the number of a removed one is used again."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _check(path: Path, overwrite: bool, kind: DirectoryKind) -> None:
    if not os.fspath(path).strip("."):
        path = path.resolve()
    try:
        there = stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        check_place(path)
        return
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot write '{path}': {getattr(error, 'strerror', None) or error}") from error
    if not there:
        raise CheckpointError(f"output '{path}' is a file; choose a directory")
    if os.path.ismount(path):
        raise CheckpointError(
            f"output directory '{path}' is a mount point and cannot be replaced; choose one inside it"
        )
    check_place(path)
    try:
        if not any(path.iterdir()):
            return
    except OSError as error:
        raise CheckpointError(f"output directory '{path}' cannot be read: {error.strerror}") from error
    if not overwrite:
        raise CheckpointError(f"output directory '{path}' already holds something; choose another or overwrite it")
    check_replaceable(path, kind)


def check_place(path: Path) -> None:
    """Raise CheckpointError, before any work is done, where nothing can be written under ``path`` in the end."""
    place = next((parent for parent in Path(os.path.realpath(path)).parents if parent.exists()), Path("/"))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "may not be written to" if place.is_dir() else "is a file"
        raise CheckpointError(f"cannot write '{path}': '{place}' {why}; choose another place")


def sync_directory(path: Path) -> None:
    """Make renames in a directory last, where the system can."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_tree(path: Path) -> None:
    """Everything in a directory reaches the disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            handle = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_directory(Path(folder))


def _mode(path: Path) -> int | None:
    """The permissions of a file that is to be replaced; None for a new one."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "no regular file"
        raise CheckpointError(f"cannot write '{path}': it is {what}; choose another name")
    return stat.S_IMODE(mode)


def _done(path: Path) -> None:
    sync_directory(path.parent)
    written.append(path)


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """The directories above ``path``; if it is not written, those that were made for it go again."""
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for parent in made:
            if not os.path.lexists(path):
                with suppress(OSError):
                    parent.rmdir()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write '{path}': {error.strerror or error}; nothing was written there") from error
