"""Files that are written by others' converters: under a temporary place first, then under their names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import CheckpointError
from ..storage import temporary
from ..storage.atomic import atomic_directory, atomic_file, check_free, check_place
from ..storage.owned import DirectoryKind

#: Core ML writes a directory.
PACKAGE = DirectoryKind(
    "a Core ML package",
    "Manifest.json",
    "rootModelIdentifier",
    {
        "Manifest.json": None,
        "*.json": None,  # where ExecuTorch is installed too, coremltools adds its table of operators
        "Data": {"com.apple.CoreML": {"model.mlmodel": None, "weights": {"weight.bin": None}}},
    },
    str,
)
PACKAGE_SUFFIX = ".mlpackage"


def check_target(path: Path, overwrite: bool) -> None:
    """Raise CheckpointError where ``path`` cannot be written, or holds something that is not to be replaced."""
    path = Path(os.path.realpath(path))
    if path.suffix == PACKAGE_SUFFIX:
        check_free(path, overwrite, PACKAGE)
    elif path.is_dir():
        raise CheckpointError(f"'{path}' is a directory; choose another name")
    elif path.exists() and not overwrite:
        raise CheckpointError(f"'{path}' exists already; choose another name or overwrite it (--overwrite)")
    check_place(path)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A directory beside ``path`` to write its files into, gone at the end.

    Raises:
        CheckpointError: a full disk.
    """
    path = Path(os.path.realpath(path))
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.sweep(path.parent)
        with temporary.new(path, directory=True) as stage:
            yield stage
    except OSError as error:
        raise CheckpointError(f"cannot write '{path}': {error.strerror or error}; nothing was written there") from error
    finally:
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def publish(stage: Path, path: Path, overwrite: bool) -> None:
    """Give the files in ``stage`` their names beside ``path``; that of ``path`` itself comes last.

    Raises:
        CheckpointError: one cannot be written.
    """
    main = stage / path.name
    if main.is_dir():
        with atomic_directory(path, overwrite, PACKAGE) as new:
            shutil.copytree(main, new, dirs_exist_ok=True)
    others = sorted(file for file in stage.iterdir() if file != main)
    files = others if main.is_dir() else [main, *others]
    with ExitStack() as stack:  # they are named in the opposite order, the first one last
        for file in files:
            out = stack.enter_context(atomic_file(path.with_name(file.name), overwrite or file != main))
            with open(file, "rb") as content:
                shutil.copyfileobj(content, out, 1 << 20)
