"""Names for what is not finished, held by a lock of the process that writes it; and the end of those left by dead ones.

    .NAME.comcat-HOST-RANDOM.tmp    becomes NAME when it is complete
    .NAME.comcat.lock               says that a process works on NAME

The lock of a temporary ends with its process, however that ends. Whoever writes next to it later removes those of this
host that nobody holds; those of other hosts stay, since a lock need not reach from one to the other. Where there are no
locks (Windows, some network file systems) nothing is removed.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NAME = re.compile(r"\..+\.comcat-([0-9a-f]{8})-[0-9a-f]{12}\.tmp", re.DOTALL)
_LONGEST = 120  # bytes of the final name in the temporary one, which must fit into 255

#: Directories that become visible as a whole later on: inside them nothing needs a temporary name of its own.
_stages: set[Path] = set()


class Hold:
    """A lock on a file or directory that lasts until ``release``, or until this process ends.

    Attributes:
        held: False if somebody else has it.
        sure: whether it is a real lock, on what the path still stands for.
        works: whether there are locks here at all.
    """

    def __init__(self, path: Path, flags: int = os.O_RDONLY, wait: bool = False) -> None:
        self._handle: int | None = None
        self.held, self.sure, self.works = True, False, False
        if fcntl is None:
            return
        self._handle = os.open(path, flags, 0o666)
        _holds.add(self)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            self.works = True
            self.sure = self._is(path)
        except OSError as error:
            self.held = error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # else there are no locks here
        except BaseException:
            self.release()
            raise

    def _is(self, path: Path) -> bool:
        assert self._handle is not None
        with suppress(OSError):
            return os.path.samestat(os.fstat(self._handle), os.stat(path, follow_symlinks=False))
        return False

    def release(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)


_holds: weakref.WeakSet[Hold] = weakref.WeakSet()


def _let_go() -> None:
    """A child, such as one that reads images, must not keep the locks of its parent alive."""
    for hold in list(_holds):
        hold.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def new(path: Path, directory: bool) -> Iterator[Path]:
    """A new file or directory beside ``path``, gone at the end unless it was renamed."""
    while True:
        temporary = path.with_name(f".{stem(path.name)}.comcat-{_host()}-{secrets.token_hex(6)}.tmp")
        if directory:
            temporary.mkdir()
        else:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        with suppress(FileNotFoundError):
            hold = Hold(temporary)
            if hold.sure or (hold.held and not hold.works):
                break
            hold.release()  # another process took it for one that was left behind
    place = Path(os.path.realpath(temporary))  # as is asked for
    if directory:
        _stages.add(place)
    try:
        yield temporary
    finally:
        _stages.discard(place)
        remove(temporary)
        hold.release()


def is_staged(path: Path) -> bool:
    """Whether ``path`` is, or lies in, a directory that appears as a whole later on."""
    return any(place in _stages for place in (path, *path.parents))


def sweep(folder: Path) -> None:
    """Remove what processes of this host have left half-written in ``folder`` when they were killed."""
    if fcntl is None:
        return
    with suppress(OSError):
        for path in [Path(entry.path) for entry in os.scandir(folder) if _is_ours(entry.name)]:
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                continue
            with suppress(OSError):
                hold = Hold(path)
                if hold.held and hold.sure:
                    remove(path)
                hold.release()


def remove(path: Path) -> None:
    """Remove a file or a directory that may be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def claimed(path: Path, lock: Path | None = None, wait: bool = False) -> Iterator[None]:
    """Nobody else works on ``path`` meanwhile.

    Args:
        lock: the lock file, by default one beside ``path``. wait: for the other one to finish.

    Raises:
        CheckpointError: somebody does. OSError: there can be no lock file.
    """
    lock = lock or path.with_name(f".{stem(path.name)}.comcat.lock")
    while True:
        hold = Hold(lock, os.O_RDWR | os.O_CREAT, wait)
        if not hold.held:
            hold.release()
            raise CheckpointError(
                f"another process is writing to '{path}'; wait until it has ended, or choose another place"
            )
        if hold.sure or not hold.works:
            break
        hold.release()  # its owner removed it in between
    try:
        yield
    finally:
        if hold.sure:
            with suppress(OSError):
                lock.unlink()
        hold.release()


def stem(name: str) -> str:
    """``name``, or its beginning and a digest if a temporary name made of it would be too long."""
    raw = os.fsencode(name)
    if len(raw) <= _LONGEST:
        return name
    return f"{raw[: _LONGEST // 2].decode(errors='ignore')}-{hashlib.sha256(raw).hexdigest()[:12]}"


def _is_ours(name: str) -> bool:
    match = _NAME.fullmatch(name)
    return match is not None and match[1] == _host()


@functools.cache
def _host() -> str:
    """This machine, in eight digits."""
    identity = platform.node()
    with suppress(OSError):
        identity += Path("/etc/machine-id").read_text()
    return hashlib.sha256(identity.encode()).hexdigest()[:8]
