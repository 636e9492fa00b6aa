"""Reading a safetensors file that somebody has sent: whole, offline, and never as a pickle."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError


def read_safetensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors.

    Raises:
        CheckpointError: the file is missing, a directory, damaged, or a pickle under another name.
    """
    path = Path(path)
    _check(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            return file.metadata() or {}, tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{path}' is damaged or no safetensors file: {error}") from error


def _check(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"'{path}' is a directory; give an adapter file (.safetensors)")
    try:
        with open(path, "rb") as file:
            magic = file.read(10)
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror}") from error
    # A safetensors file begins with eight bytes of any value, then its JSON header.
    if magic[8:9] != b"{" and (magic[:4] == b"PK\x03\x04" or magic[:1] == b"\x80"):
        raise CheckpointError(
            f"'{path}' is a pickle, which could run any code when read; it is never unpickled. Ask for a real "
            "safetensors file"
        )
