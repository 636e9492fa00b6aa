"""The formats that comcat writes. Each is imported when it is first asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import ExportError

if TYPE_CHECKING:
    from .file_format import FileFormat

#: Name -> the file here whose ``FORMAT`` it is.
_FORMATS = {
    "onnx": "onnx_format",
    "openvino": "openvino_format",
    "torch": "torch_format",
    "executorch": "executorch_format",
    "litert": "litert_format",
    "coreml": "coreml_format",
}
FORMAT_NAMES = tuple(_FORMATS)


@cache
def file_format(name: str) -> FileFormat:
    """The format of this name.

    Raises:
        ExportError: there is none.
    """
    if name not in _FORMATS:
        raise ExportError(f"unknown format {name!r}; choose from {', '.join(FORMAT_NAMES)}")
    found: FileFormat = import_module(f".{_FORMATS[name]}", __package__).FORMAT
    return found
