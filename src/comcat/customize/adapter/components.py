"""The parts of a text-to-image pipeline that an adapter touches, under diffusers' names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from ...errors import ModelError
from ...hosts.addable import AddableAttention, Refusal

DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def denoiser(pipe: Any) -> tuple[str, nn.Module]:
    """("unet" or "transformer", the module) of a pipeline or of a bare model.

    Raises:
        ModelError: there is none, e.g. after PEFT or torch.compile has wrapped it.
    """
    if isinstance(pipe, nn.Module):
        module: Any = getattr(pipe, "_orig_mod", pipe)
        return ("unet" if "UNet" in type(module).__name__ else "transformer"), module
    for name in DENOISERS:
        found: Any = getattr(pipe, name, None)
        if isinstance(found, nn.Module):
            return name, getattr(found, "_orig_mod", found)
    raise ModelError(
        f"{type(pipe).__name__} has neither a unet nor a transformer; give a text-to-image pipeline of diffusers or "
        "its model"
    )


def text_encoders(pipe: Any) -> dict[str, nn.Module]:
    """The CLIP text encoders of a pipeline: name -> module; none of a bare model."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    if isinstance(pipe, nn.Module):
        return {}
    found: dict[str, Any] = {name: getattr(pipe, name, None) for name in TEXT_ENCODERS}
    found = {name: getattr(module, "_orig_mod", module) for name, module in found.items()}
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    return {name: module for name, module in found.items() if isinstance(module, kinds)}


def tokenizer_name(encoder: str) -> str:
    """``text_encoder_2`` -> ``tokenizer_2``."""
    return encoder.replace("text_encoder", "tokenizer")


def find_addable(component: str, module: nn.Module) -> tuple[dict[str, AddableAttention], dict[str, Refusal]]:
    """(attention layers that take products, name -> why others do not) of one component, in the order of the model."""
    from ...hosts import clip, diffusers

    finder = diffusers.addable_layers if component in DENOISERS else clip.addable_layers
    attentions: dict[str, AddableAttention] = {}
    refused: dict[str, Refusal] = {}
    for name, attention in finder(module):
        if isinstance(attention, AddableAttention):
            attentions[name] = attention
        else:
            refused[name] = attention
    return attentions, refused


def components(pipe: Any) -> dict[str, nn.Module]:
    """Everything that an adapter can change: the denoiser, and the CLIP text encoders of a pipeline."""
    name, model = denoiser(pipe)
    return {name: model, **text_encoders(pipe)}


def architecture_digest(attentions: Mapping[str, AddableAttention]) -> str:
    """SHA-256 of the attention layers of a component: names, kinds, heads and widths."""
    content = json.dumps([attention.signature() for attention in attentions.values()], separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def host(component: str) -> Any:
    """The module of :mod:`comcat.hosts` that attaches products in this component."""
    from ...hosts import clip, diffusers

    return diffusers if component in DENOISERS else clip
