"""The adapter file: one safetensors with named tensors and versioned JSON metadata.

    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.sample.query.weight      (H r, D)
    token.text_encoder                                                                  (n, D)

The metadata entry ``comcat`` says what the tensors are for: base model, fingerprint of its attention layers, ranks,
strength, token, prompt, training. How numbers are stored: :mod:`comcat.customize.files.encoding`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, ModelError
from ...hosts.addable import AddableAttention
from ...hosts.placement import place, precision
from ...nn.added import AddedLayer
from ...storage.atomic import atomic_file
from ...storage.reader import digest, read_tensors
from ...wording import some
from ..adapter import attached as adapters_
from ..adapter.attached import Adapter
from ..adapter.components import DENOISERS, architecture_digest, components, denoiser, find_addable, text_encoders
from ..adapter.tokens import Token, check_new
from .contents import check_checksum
from .encoding import decode, file_content
from .header import KEY, STORAGES, Entry, Header, Part, Storage


def save_adapter(pipe: Any, path: str | Path, *, name: str | None = None, storage: Storage = "float32") -> Path:
    """Write an adapter to one safetensors file; the file appears whole or not at all.

    Args:
        name: which one; may be left out where there is only one.
        storage: int8 takes a quarter of float32, nf4 an eighth; docs/customize.md says what that changes.

    Raises:
        ModelError: there is no such adapter. CheckpointError: the file cannot be written.
    """
    handle = the_adapter(pipe, name)
    return write_adapter(handle, Path(path), storage)


def the_adapter(pipe: Any, name: str | None) -> Adapter:
    """The named adapter, or the only one."""
    if name is not None:
        return adapters_.get_adapter(pipe, name)
    found = list(adapters_.adapters(pipe).values())
    if len(found) != 1:
        raise ModelError(
            f"this pipeline has {len(found)} adapters"
            + (f", {', '.join(a.name for a in found)}; say which with name" if found else "; add one first")
        )
    return found[0]


def write_adapter(handle: Adapter, path: Path, storage: Storage = "float32", overwrite: bool = True) -> Path:
    """:func:`save_adapter` for a handle."""
    if handle.left_out:
        raise CheckpointError(
            f"adapter {handle.name!r} is not whole: this pipeline has no place for its {', '.join(handle.left_out)}. "
            "Save it from a pipeline that has, or keep the file it came from"
        )
    if storage not in STORAGES:
        raise CheckpointError(f"storage is {storage!r}; choose one of {', '.join(STORAGES)}")
    content = file_content(header(handle, storage), handle.state_dict())
    with atomic_file(path, overwrite) as file:
        file.write(content)
    return path


def header(handle: Adapter, storage: Storage = "float32") -> Header:
    """The metadata of an adapter as it is now."""
    pipe = handle.pipe
    models = components(pipe)
    parts = {}
    for component, layers in handle.ranks.items():
        attentions, _ = find_addable(component, models[component])
        entries = {
            name: Entry(rank, _signature(attentions[name]), _biases(handle.layers[component, name]))
            for name, rank in layers.items()
        }
        parts[component] = Part(type(models[component]).__name__, architecture_digest(attentions), entries)
    token = handle.token
    name = getattr(pipe, "name_or_path", None) or getattr(models[denoiser(pipe)[0]], "name_or_path", None)
    base = str(handle.info.get("base") or name or "")
    return Header(
        name=handle.name,
        scale=handle.scale,
        storage=storage,
        # The bytes of a directory's name may be no text, which no reader would take.
        base={"name": base.encode(errors="replace").decode(), "class": type(pipe).__name__, **_compressed(handle)},
        components=parts,
        token=None if token is None else {"text": token.text, "vectors": token.count},
        prompt=handle.info.get("prompt"),
        training=handle.info.get("training"),
    )


def _compressed(handle: Adapter) -> dict[str, str]:
    """The fingerprint of the plan by which the base's denoiser was compressed, where it was when this was taught."""
    made = getattr(denoiser(handle.pipe)[1], "comcat", None)
    own = None if made is None else digest(made.plan.as_dict())[:16]
    known = handle.info.get("compressed", own)
    return {} if known is None else {"compressed": known}


def _biases(layer: AddedLayer) -> list[str]:
    return [key.removesuffix(".bias") for key, _ in layer.streams.named_parameters() if key.endswith(".bias")]


def read_adapter(path: str | Path) -> tuple[Header, dict[str, Tensor]]:
    """Metadata and tensors of a file; no network, no pickle.

    Raises:
        CheckpointError: the file is missing, damaged, a pickle, of a newer version, or no adapter of comcat.
    """
    path = Path(path)
    metadata, tensors = read_tensors(path)
    if KEY not in metadata:
        lora = any("lora" in name for name in tensors)
        raise CheckpointError(
            f"'{path}' is a LoRA, not an adapter of comcat; turn it into one: comcat adapter convert"
            if lora
            else f"'{path}' is no adapter of comcat: its metadata lack the entry '{KEY}'"
        )
    found = Header.from_json(metadata[KEY], path)
    check_checksum(metadata, tensors, path)
    return found, decode(found, tensors, path)


def load_adapter(
    pipe: Any,
    path: str | Path,
    *,
    scale: float | None = None,
    name: str | None = None,
    token: str | None = None,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Put a saved adapter on a pipeline.

    A pipeline without text encoders, whose prompts are encoded elsewhere, gets the products of the denoiser alone, and
    a warning where the file has more.

    Args:
        scale: strength; the one in the file by default.
        name: the one in the file by default.
        token: another word for the learned one, where two adapters were taught the same; the file's by default.
        dtype: of the products; the one in which the model computes by default.

    Raises:
        CheckpointError: the file is no adapter, or belongs to another model; the layers that do not match are named.
        ModelError: the name is taken, or a layer holds a processor that products cannot run in.
    """
    path = Path(path)
    found, tensors = read_adapter(path)
    handle = adapters_.new_adapter(pipe, name or found.name, found.scale if scale is None else scale)
    known = {"base": found.base.get("name"), "compressed": found.base.get("compressed")}
    handle.info = {**known, "prompt": found.prompt, "training": found.training}
    bare = isinstance(pipe, nn.Module)  # it has no prompt
    encoders = text_encoders(pipe)
    parts = dict(found.components)
    if not bare and not encoders:
        handle.left_out = [key for key in parts if hasattr(pipe, key) and getattr(pipe, key) is None]
        parts = {key: part for key, part in parts.items() if key not in handle.left_out}
    for component, part in parts.items():
        _add_layers(handle, component, part, path, dtype)
    if found.token is not None and not encoders:
        handle.left_out.append("token")
    if token is not None and found.token is None:
        raise ModelError(f"'{path}' has no learned word that could be called {token!r}; leave token out")
    expected = dict(handle.named_parameters())
    if found.token is not None and encoders:
        handle.token = _read_token(pipe, found, token, tensors, path, dtype)
        expected.update({f"token.{encoder}": v for encoder, v in handle.token.vectors.items()})
    tensors = {key: v for key, v in tensors.items() if key.partition(".")[0] not in handle.left_out}
    if handle.left_out and not bare:
        warnings.warn(
            f"this pipeline has no text encoder: of '{path}', {', '.join(handle.left_out)} cannot be used. "
            "Encode its prompts by a pipeline that has them",
            stacklevel=2,
        )
    _check_tensors(tensors, expected, path)
    with torch.no_grad():
        for key, parameter in expected.items():
            if not key.startswith("token.") and not parameter.is_meta:
                parameter.copy_(tensors[key])
    handle.requires_grad_(False)
    adapters_.attach(handle)
    return handle


def _add_layers(handle: Adapter, component: str, part: Part, path: Path, dtype: torch.dtype | None) -> None:
    models = components(handle.pipe)
    if component not in models:
        kind = "denoiser" if component in DENOISERS else "text encoder"
        raise CheckpointError(
            f"'{path}' is for another kind of model: it has products for the {kind} '{component}' ({part.model}), and "
            f"this one has {', '.join(models)}"
        )
    attentions, refused = find_addable(component, models[component])
    missing = [layer for layer in part.layers if layer not in attentions]
    if missing:
        reasons = [f"{layer} (it is {refused[layer].what})" if layer in refused else layer for layer in missing]
        raise CheckpointError(
            f"'{path}' does not fit this {component}: {len(missing)} of its {len(part.layers)} layers are not there "
            f"({some(reasons)}). It was made for {part.model} of '{_base(handle)}'"
        )
    other = [name for name, entry in part.layers.items() if _signature(attentions[name]) != entry.signature]
    if other:
        raise CheckpointError(
            f"'{path}' does not fit this {component}: {len(other)} of its {len(part.layers)} layers have other heads "
            f"or widths ({some(other)}). It was made for {part.model} of '{_base(handle)}'"
        )
    for layer, entry in part.layers.items():
        width = attentions[layer].heads.width
        if not 1 <= entry.rank <= width:
            raise CheckpointError(f"'{path}' has rank {entry.rank!r} for '{layer}'; it must be 1 to {width}")
        handle.layers[component, layer] = attentions[layer].new_layer(entry.rank, handle.strength, entry.biases, dtype)


def _signature(attention: AddableAttention) -> str:
    return architecture_digest({attention.name: attention})[:16]


def _base(handle: Adapter) -> str:
    return str(handle.info.get("base") or "an unnamed base")


def _read_token(
    pipe: Any, found: Header, text: str | None, tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None
) -> Token:
    token = found.token
    assert token is not None
    text, count = token["text"] if text is None else text, token["vectors"]
    check_new(pipe, text, count)
    vectors = {}
    for encoder, module in text_encoders(pipe).items():
        stored = tensors.get(f"token.{encoder}")
        table: Any = module.get_input_embeddings()  # type: ignore[operator]
        if stored is None or stored.shape != (count, table.weight.shape[1]):
            shape = "missing" if stored is None else f"of shape {tuple(stored.shape)}"
            raise CheckpointError(
                f"the vectors of the token {text!r} for {encoder} are {shape} in '{path}', not "
                f"{(count, table.weight.shape[1])}"
            )
        vectors[encoder] = nn.Parameter(stored.to(place(table), dtype or precision(table)))
    return Token(text, vectors)


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    missing = [key for key in expected if key not in tensors]
    extra = [key for key in tensors if key not in expected]
    shapes = [
        f"{key} is {tuple(tensors[key].shape)}, not {tuple(value.shape)}"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    wrong = [
        f"{len(found)} tensors {what} ({some(found)})"
        for what, found in (("missing", missing), ("too many", extra), ("of another shape", shapes))
        if found
    ]
    if wrong:
        raise CheckpointError(f"'{path}' does not fit the model: {', '.join(wrong)}")
