"""Renames that the standard library does not have: two names exchanged in one step, and a name that must be free.

Linux has both as ``renameat2`` (ext4, XFS, Btrfs, tmpfs, ...), macOS as ``renamex_np`` (APFS). Elsewhere, such as on
NFS, ``exchange`` says that it cannot and ``onto_nothing`` takes a hard link.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

_AT_FDCWD = -100
#: Function, and the flag that forbids to replace.
_LINUX, _MACOS = ("renameat2", 1), ("renamex_np", 4)
_EXCHANGE = 2  # on both
_NOT_THERE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


def exchange(a: Path, b: Path) -> bool:
    """Exchange what two names stand for, in one step; False where the file system cannot.

    Raises:
        OSError: it could, and did not, e.g. for want of permission.
    """
    return _call(a, b, exchanged=True)


def onto_nothing(source: Path, target: Path) -> None:
    """Rename a file to a name that is free.

    Raises:
        FileExistsError: it is not.
    """
    if _call(source, target, exchanged=False):
        return
    os.link(source, target)
    os.unlink(source)


def _call(a: Path, b: Path, exchanged: bool) -> bool:
    found = _function()
    if found is None:
        return False
    function, exclusive = found
    if function(os.fsencode(a), os.fsencode(b), _EXCHANGE if exchanged else exclusive) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_THERE:
        return False
    raise OSError(number, os.strerror(number), str(a), None, str(b))


@functools.cache
def _function() -> tuple[Callable[[bytes, bytes, int], int], int] | None:
    if sys.platform not in ("linux", "darwin"):
        return None
    name, flag = _LINUX if sys.platform == "linux" else _MACOS
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):  # an older libc
        return None
    function.restype = ctypes.c_int
    if sys.platform == "linux":
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
        return lambda a, b, flags: function(_AT_FDCWD, a, _AT_FDCWD, b, flags), flag
    function.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint)
    return lambda a, b, flags: function(a, b, flags), flag
