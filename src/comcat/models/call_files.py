"""Arguments of a call that are the same for all images, in files: plain data, with tensors beside it.

A tensor is written as ``{"tensor": name}``, an argument with one entry for every image as ``{"each": value}``, and a
dictionary as ``{"dictionary": {...}}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import ComcatError
from .batches import Each
from .traits import is_plain


def packed(fixed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(Plain data for JSON, the tensors that it names)."""
    tensors: dict[str, Tensor] = {}

    def pack(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous()
            return {"tensor": name}
        if isinstance(value, Each):
            return {"each": pack(value.value)}
        if isinstance(value, Mapping):
            return {"dictionary": {key: pack(one) for key, one in value.items()}}
        return [pack(one) for one in value] if isinstance(value, (list, tuple)) else value

    return {name: pack(value) for name, value in fixed.items()}, tensors


def unpacked(
    data: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str, error: type[ComcatError]
) -> dict[str, Any]:
    """The inverse of :func:`packed`; lists come back as tuples.

    Raises:
        error: ``data`` is not what it writes; ``where`` names the file.
    """

    def unpack(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(map(unpack, value))
        if not isinstance(value, dict):
            return value
        ((kind, inside),) = value.items() if len(value) == 1 else ((None, None),)
        if kind == "tensor" and isinstance(inside, str) and inside in tensors:
            return tensors[inside]
        if kind == "each":
            return Each(unpack(inside))
        if kind == "dictionary" and isinstance(inside, dict):
            return {key: unpack(one) for key, one in inside.items()}
        raise error(f"{where} is damaged: it holds an argument that is none")

    return {name: unpack(value) for name, value in data.items()}


def storable(value: Any) -> bool:
    """Whether :func:`packed` can hold an argument."""
    if isinstance(value, Each):
        return storable(value.value)
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and storable(one) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(storable, value))
    return isinstance(value, Tensor) or is_plain(value)
