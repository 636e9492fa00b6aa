"""How the numbers of an adapter are stored.

Format 1: every factor is a tensor of its own. float32, float16, bfloat16, or int8 with a scale per rank component, in
``NAME.scale``; biases and tokens stay float32 beside int8.
Format 2 (:mod:`comcat.customize.files.packing`): nf4, and any storage where components have gone, such as after
:func:`comcat.customize.shrink_adapter`.

What is stored in 8 or 4 bits is written as other factors of the same products, whose error is the smallest
(:func:`comcat.linalg.products.even_shares`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...linalg.products import even_shares, norm_of_product
from ...wording import some
from .contents import check_finite, not_finite, pack
from .header import Entry, Header, Part
from .layer_factors import PARTS, Named, alive, by_layer, set_side, sides
from .numbers import Storage
from .packing import pack_layer, plain, unpack_layer

_SCALE = ".scale"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_COARSE: tuple[Storage, ...] = ("int8", "nf4")


def file_content(header: Header, tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a file that holds ``tensors`` as ``header.storage`` says.

    Raises:
        CheckpointError: a number is not finite, perhaps because the storage does not reach so far.
    """
    check_finite(header, tensors)
    tensors = {name: t.detach().to("cpu") for name, t in tensors.items()}
    if header.storage in _COARSE:
        tensors = _evened(header, tensors)
    if header.storage == "nf4" or (header.training or {}).get("max_bytes") or _has_gaps(header, tensors):
        return _packed(header, tensors)
    header = replace(header, format=1, components={key: _unpacked(part) for key, part in header.components.items()})
    return pack(header, encode(tensors, header.storage))


def _layers(header: Header) -> list[tuple[str, str, Entry]]:
    return [(c, name, entry) for c, part in header.components.items() for name, entry in part.layers.items()]


def _has_gaps(header: Header, tensors: Mapping[str, Tensor]) -> bool:
    return not all(
        bool(alive(by_layer(tensors, component, layer), part, entry.rank).all())
        for component, layer, entry in _layers(header)
        for part in PARTS
    )


def _unpacked(part: Part) -> Part:
    return replace(part, layers={name: replace(entry, packing=None) for name, entry in part.layers.items()})


def _evened(header: Header, tensors: Mapping[str, Tensor]) -> Named:
    new = dict(tensors)
    for component, layer, entry in _layers(header):
        own = {name: t.float() for name, t in by_layer(tensors, component, layer).items()}
        check_finite(header, own)  # of float64
        for part, kinds in PARTS.items():
            evened = even_shares(*sides(own, part, entry.rank), alive(own, part, entry.rank))
            for kind, matrix in zip(kinds, evened, strict=True):
                set_side(own, kind, matrix, entry.rank)
        new.update({f"{component}.{layer}.{name}": t for name, t in own.items()})
    return new


def _packed(header: Header, tensors: Mapping[str, Tensor]) -> bytes:
    storage = header.storage
    stored = {name: t.to(getattr(torch, plain(storage))) for name, t in tensors.items() if name.startswith("token.")}
    components = {}
    for component, part in header.components.items():
        layers = {}
        for layer, entry in part.layers.items():
            found = pack_layer(by_layer(tensors, component, layer), entry.rank, storage)
            if found is not None:
                rank, packing, stored[f"{component}.{layer}"] = found
                layers[layer] = replace(entry, rank=rank, packing=packing)
        if layers:
            components[component] = replace(part, layers=layers)
    header = replace(header, format=2, components=components)
    check_finite(header, _unpack(header, stored))
    return pack(header, stored)


def encode(tensors: Mapping[str, Tensor], storage: Storage) -> dict[str, Tensor]:
    """Tensors as format 1 stores them."""
    if storage != "int8":
        return {name: t.to("cpu", getattr(torch, storage)) for name, t in tensors.items()}
    stored = {}
    for name, tensor in tensors.items():
        tensor = tensor.to("cpu", torch.float32)
        if name.endswith(".weight"):
            scale = tensor.abs().amax(0 if name.endswith("output.weight") else 1, keepdim=True) / 127
            stored[name + _SCALE] = scale
            tensor = (tensor / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        stored[name] = tensor
    return stored


def decode(header: Header, stored: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a file, in the precision in which they were stored; float32 for int8 and nf4.

    Raises:
        CheckpointError: they are not such as :func:`file_content` makes.
    """
    if header.format == 1:
        _check_stored(stored, path)
        tensors = {
            name: tensor.float() * stored[name + _SCALE] if name + _SCALE in stored else tensor
            for name, tensor in stored.items()
            if not name.endswith(_SCALE)
        }
    else:
        try:
            tensors = _unpack(header, stored)
        except CheckpointError as error:
            raise CheckpointError(f"'{path}' is damaged: {error}") from error
    bad = not_finite(tensors) or not_finite(stored)
    if bad:
        raise CheckpointError(f"'{path}' holds NaN or infinite values in {some(bad)}; use an intact file")
    return tensors


def _unpack(header: Header, stored: Mapping[str, Tensor]) -> Named:
    rest = dict(stored)
    tensors: Named = {}
    for component, layer, entry in _layers(header):
        key = f"{component}.{layer}"
        if key not in rest or entry.packing is None:
            raise CheckpointError(f"the bytes of {key} are missing")
        try:
            own = unpack_layer(rest.pop(key), entry.rank, entry.packing, entry.biases, header.storage)
        except CheckpointError as error:
            raise CheckpointError(f"{key}: {error}") from error
        tensors.update({f"{key}.{name}": t for name, t in own.items()})
    wrong = [name for name, t in rest.items() if t.dtype not in _FLOATS]
    if wrong:
        raise CheckpointError(f"its metadata do not speak of {some(wrong)}")
    return {**tensors, **rest}


def _check_stored(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError where format 1 would not have what :func:`encode` makes."""
    scales = {name: _scale_shape(name, t) for name, t in tensors.items() if t.dtype == torch.int8}
    lonely = [name for name in scales if name + _SCALE not in tensors]
    if lonely:
        raise CheckpointError(f"{len(lonely)} int8 tensors in '{path}' lack their scales ({some(lonely)})")
    wrong = [
        name
        for name, t in tensors.items()
        if name not in scales
        and (t.dtype not in _FLOATS or (name.endswith(_SCALE) and t.shape != scales.get(name.removesuffix(_SCALE))))
    ]
    if wrong:
        raise CheckpointError(f"'{path}' has tensors of a kind that comcat does not write ({some(wrong)})")


def _scale_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """One scale per rank component: a row of A_q, A_k, A_v and a column of A_o."""
    axis = 0 if name.endswith("output.weight") else 1
    return tuple(1 if i == axis else n for i, n in enumerate(tensor.shape))


def products_error(header: Header, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """How far products are from what they were: root mean square over layers and products of the relative error.

    Args:
        header: of ``before``; layers that ``after`` lacks are lost, and ranks may be smaller there.
    """
    errors = []
    for component, layer, entry in _layers(header):
        old, new = by_layer(before, component, layer), by_layer(after, component, layer)
        for part in PARTS:
            left, right = (t.double() for t in sides(old, part, entry.rank))
            size = norm_of_product(left, right).square().sum()
            if size == 0:
                continue
            if new:
                rank = next(t for name, t in new.items() if name.endswith("query.weight")).shape[0] // len(left)
                also = [t.double() for t in sides(new, part, rank)]
                left, right = torch.cat([also[0], -left], -1), torch.cat([also[1], right], -1)
            errors.append(norm_of_product(left, right).square().sum() / size)
    return float(torch.stack(errors).mean().sqrt()) if errors else 0.0
