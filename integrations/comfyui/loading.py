"""Adapters on a MODEL and a CLIP of ComfyUI: clones that carry the products as patches of their attention layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comcat.customize.adapter.components import architecture_digest
from comcat.customize.adapter.masking import as_mask
from comcat.customize.files.adapter_file import read_adapter
from comcat.customize.files.header import Part
from comcat.errors import CheckpointError, ModelError
from comcat.nn.added import AddedLayer, Strength
from comcat.nn.masks import Mask

from . import words
from .attention import ClipAttention, PatchedAttention, UnetAttention, UnetCanvas
from .layers import Attentions, of_clip, of_unet

#: Under which a ModelPatcher keeps what it carries.
KEY = "comcat"


@dataclass(frozen=True)
class Chosen:
    """One adapter as a node names it.

    Attributes:
        word: for the learned one, if it is to be another.
        mask: (1, H, W) of ComfyUI, or None.
    """

    path: Path
    strength: float = 1.0
    mask: Tensor | None = None
    word: str = ""


@dataclass
class Read:
    """An adapter's file as layers, not yet anywhere."""

    name: str
    layers: dict[str, dict[str, AddedLayer]] = field(default_factory=dict)  # component -> layer -> products
    word: str | None = None
    vectors: dict[str, Tensor] = field(default_factory=dict)


def apply(model: Any, clip: Any, chosen: list[Chosen]) -> tuple[Any, Any]:
    """Clones of a MODEL and of a CLIP (or None) that draw with these adapters, beside those that are on them.

    Raises:
        CheckpointError: a file is no adapter, or was made for another model.
        ModelError: the model cannot take products; a text encoder is needed and none is connected; another node has
            replaced attention layers.
        DataError: a mask is none.
    """
    found = [read(model, clip, one) for one in chosen]
    model = model.clone()
    _put(model, of_unet(model), [r.layers.get("unet", {}) for r in found], UnetAttention)
    _watch(model)
    if clip is not None:
        clip = clip.clone()
        components = sorted({key for r in found for key in r.layers if key != "unet"})
        for component in components:
            layers = [r.layers.get(component, {}) for r in found]
            _put(clip.patcher, of_clip(clip, component), layers, ClipAttention)
        for r in found:
            if r.word is not None:
                words.learn(clip, r.word, r.vectors)
    return model, clip


def read(model: Any, clip: Any, chosen: Chosen) -> Read:
    """The file of an adapter, as layers that fit this MODEL and CLIP; raises as :func:`apply` does."""
    header, tensors = read_adapter(chosen.path)
    needs = [key for key in header.components if key != "unet"] + (["a learned word"] if header.token else [])
    if needs and clip is None:
        raise ModelError(
            f"'{chosen.path.name}' has {' and '.join(needs)}: connect the CLIP too, and encode prompts by the one that "
            "comes out"
        )
    if "transformer" in header.components:
        raise ModelError(
            f"'{chosen.path.name}' was made for a {header.components['transformer'].model}; in ComfyUI adapters are "
            "added to the UNets of SD 1.x, 2.x and XL. Turn it into a LoRA, comcat adapter convert, and load that"
        )
    strength, found = Strength(float(chosen.strength) * header.scale), Read(header.name)
    for component, part in header.components.items():
        attentions = of_unet(model) if component == "unet" else of_clip(clip, component)
        found.layers[component] = _layers(part, attentions, component, tensors, strength, chosen.path)
    if chosen.mask is not None:
        mask = Mask(as_mask(chosen.mask), UnetCanvas(), header.name)
        for layer in found.layers.get("unet", {}).values():
            layer.mask = mask
    if header.token is not None:
        found.word = chosen.word or header.token["text"]
        found.vectors = {k.removeprefix("token."): t.float() for k, t in tensors.items() if k.startswith("token.")}
    return found


def _layers(
    part: Part, attentions: Attentions, component: str, tensors: dict[str, Tensor], strength: Strength, path: Path
) -> dict[str, AddedLayer]:
    found = {}
    for name, entry in part.layers.items():
        if name not in attentions or _signature(attentions[name][1]) != entry.signature:
            raise CheckpointError(
                f"'{path.name}' does not fit this {component}: {name} is not there, or has other heads or widths. It "
                f"was made for {part.model}; connect a checkpoint of that base"
            )
        with torch.device("cpu"):
            layer = attentions[name][1].new_layer(entry.rank, strength, entry.biases, torch.float32).cpu()
        stored = {
            key.removeprefix(f"{component}.{name}."): tensor
            for key, tensor in tensors.items()
            if key.startswith(f"{component}.{name}.")
        }
        try:
            layer.streams.load_state_dict(stored)
        except RuntimeError as error:
            raise CheckpointError(f"'{path.name}' is damaged: the tensors of {name} do not fit together") from error
        found[name] = layer.requires_grad_(False)
    return found


def _signature(attention: Any) -> str:
    return architecture_digest({attention.name: attention})[:16]


def _put(
    patcher: Any, attentions: Attentions, added: list[dict[str, AddedLayer]], kind: type[PatchedAttention]
) -> None:
    for name, (path, attention) in attentions.items():
        layers = [layers[name] for layers in added if name in layers]
        if not layers:
            continue
        key = f"{path}.forward"
        there = patcher.object_patches.get(key)
        if there is not None and not isinstance(there, PatchedAttention):
            raise ModelError(f"another node has replaced the attention layer {path}, which comcat would change too")
        before = [] if there is None else there.layers
        patcher.add_object_patch(key, kind(attention.module, [*before, *layers]))


def _watch(model: Any) -> None:
    """Say so where a node behind this one goes around the layers that carry products."""
    import comfy.patcher_extension

    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    if not model.get_wrappers(kind, KEY):
        model.add_wrapper_with_key(kind, KEY, _refuse_replacements)


def _refuse_replacements(executor: Any, *args: Any, **kwargs: Any) -> Any:
    options = kwargs.get("transformer_options") or next((a for a in args if isinstance(a, dict) and "sigmas" in a), {})
    replaced = [name for name in ("attn1", "attn2") if options.get("patches_replace", {}).get(name)]
    if replaced:
        raise ModelError(
            f"another node replaces {' and '.join(replaced)} of this model (patches_replace), where comcat's products "
            "would not act; use one of the two"
        )
    return executor(*args, **kwargs)
