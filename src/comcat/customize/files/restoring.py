"""An adapter file in another storage, without its base model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...storage.atomic import atomic_file
from ...storage.reader import read_tensors
from ..adapter.attached import check_scale
from .adapter_file import read_adapter
from .contents import check_contents
from .encoding import file_content, products_error
from .header import KEY, Storage


def is_adapter(path: str | Path) -> bool:
    """Whether a file is an adapter of comcat; raises CheckpointError where it is missing, damaged or a pickle."""
    return KEY in read_tensors(path)[0]


def restore_adapter(path: str | Path, out: str | Path, storage: Storage, scale: float | None = None) -> float:
    """Write the same adapter with other numbers: float32, float16, bfloat16, int8 or nf4, perhaps at another strength.

    Returns:
        How far the products are from what they were (:func:`comcat.customize.files.encoding.products_error`).
    """
    header, tensors = read_adapter(path)
    check_contents(header, tensors, Path(path))
    other = replace(header, storage=storage, scale=header.scale if scale is None else check_scale(scale))
    content = file_content(other, tensors)
    with atomic_file(out) as file:
        file.write(content)
    return products_error(header, tensors, read_adapter(out)[1])
