"""Attention layers of diffusers models: which can take products, and how these get in and out.

What runs them is in :mod:`comcat.hosts.added_processors`.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator
from typing import Any, cast

from diffusers.models import attention_processor as ap
from diffusers.models.attention import AttentionModuleMixin
from torch import nn

from ..errors import ModelError
from ..layers.heads import Heads, Stream
from ..nn.added import AddedLayer
from ..nn.carries import Carries, carry, drop
from ..nn.projections import dense_width
from .addable import AddableAttention, Kind, Refusal
from .added_processors import AddedProcessor, ClassicProcessor, FluxProcessor, family_of_processor

SAMPLE = Stream.separate("sample", "to_q", "to_k", "to_v", "to_out.0")
CONTEXT = Stream.separate("context", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class KeepsProducts(Carries):
    """Mixin for an attention module. Diffusers sees and sets the base's processor; none throws the products away."""

    place: str  # its name in its model

    def get_processor(self, *args: Any, **kwargs: Any) -> Any:
        return cast(Any, self).processor.base

    def __setattr__(self, name: str, value: Any) -> None:
        held = self.__dict__.get("processor")
        if name == "processor" and isinstance(held, AddedProcessor) and not isinstance(value, AddedProcessor):
            check_processor(held, value)
            held.base = value  # e.g. attention slicing switched on or off
        else:
            super().__setattr__(name, value)

    def fuse_projections(self, *args: Any, **kwargs: Any) -> None:
        raise ModelError(
            f"the projections of a layer with the products of {', '.join(self.extras)} cannot be fused; remove these "
            "adapters first, or do without fused projections"
        )

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        if not prefix.endswith(f"{self.place}."):  # a part of the model alone, for another model
            warnings.warn(
                f"weights are copied out of a model that carries {', '.join(self.extras)}: they are the base's alone. "
                "Load the adapter on the new model too where it is meant to draw with it",
                stacklevel=2,
            )
        return super().state_dict(*args, prefix=prefix, **kwargs)  # type: ignore[misc]


def check_processor(held: AddedProcessor, processor: Any) -> None:
    """Raise ModelError for a processor that cannot run the products of a layer."""
    if type(processor) not in held.bases:
        raise ModelError(
            f"{type(processor).__name__} would replace the products of {', '.join(held.adapters)}, and cannot run "
            "them; remove these adapters first, or do without it"
        )


def guard(model: Any) -> None:
    """While layers carry products, processors are set on all layers of a model or on none."""
    if not any(isinstance(module, KeepsProducts) for module in model.modules()):
        model.__dict__.pop("set_attn_processor", None)
    elif hasattr(model, "set_attn_processor") and "set_attn_processor" not in model.__dict__:
        model.set_attn_processor = functools.partial(_set_attn_processor, model)


def _set_attn_processor(model: Any, processor: Any, *args: Any, **kwargs: Any) -> None:
    for name, module in model.named_modules():
        if isinstance(module, KeepsProducts):
            given = processor.get(f"{name}.processor") if isinstance(processor, dict) else processor
            if given is not None and not isinstance(given, AddedProcessor):
                check_processor(cast(Any, module).processor, given)
    type(model).set_attn_processor(model, processor, *args, **kwargs)


def addable_layers(model: nn.Module) -> Iterator[tuple[str, AddableAttention | Refusal]]:
    """(name, description, or why nothing can be added) of every attention layer."""
    for name, module in model.named_modules():
        if isinstance(module, (ap.Attention, AttentionModuleMixin)) and hasattr(module, "processor"):
            yield name, _described(name, module)


def _described(name: str, attn: Any) -> AddableAttention | Refusal:
    processor = attn.processor
    family = type(processor) if isinstance(processor, AddedProcessor) else family_of_processor(attn, processor)
    kind: Kind = "cross" if getattr(attn, "is_cross_attention", False) else "self"
    if family is None:
        joint = getattr(attn, "added_kv_proj_dim", None) is not None or getattr(attn, "pre_only", False)
        return Refusal("joint" if joint else kind, f"{type(attn).__name__} with {type(processor).__name__}")
    heads = attn.heads
    if attn.to_k is None or attn.to_q.out_features != attn.to_k.out_features:
        return Refusal(kind, f"{type(attn).__name__} with fewer key heads than query heads")
    streams = [SAMPLE]
    if family is FluxProcessor and getattr(attn, "pre_only", False):
        streams = [dataclasses.replace(SAMPLE, output=None, inner=True)]
        kind = "joint"  # text and image tokens in one stream
    elif family is not ClassicProcessor and attn.added_kv_proj_dim is not None:
        used = attn.to_add_out is not None
        streams = [SAMPLE, CONTEXT if used else dataclasses.replace(CONTEXT, output=None)]
        kind = "joint"
    # Those of the dense layer, also where it has been compressed: what is added does not depend on its factors.
    described = Heads.of(heads, dense_width(attn.to_q, heads), value_width=dense_width(attn.to_v, heads))
    return AddableAttention(name, attn, kind, described, tuple(streams), attn.norm_q is not None)


def attach(attention: AddableAttention, name: str, layer: AddedLayer) -> None:
    """Put the products of adapter ``name`` into an attention layer."""
    attn: Any = attention.module
    first = not isinstance(attn, KeepsProducts)
    carry(attn, KeepsProducts, name, layer)
    if first:
        attn.place = attention.name
        family = family_of_processor(attn, attn.processor)
        assert family is not None
        attn.processor = family(attn.processor, attn.extras)


def detach(module: nn.Module, name: str) -> None:
    """Take adapter ``name`` out again; after the last one the layer is what it was."""
    attn: Any = module
    base = attn.processor.base
    drop(attn, KeepsProducts, name)
    if not isinstance(attn, KeepsProducts):
        del attn.place
        attn.processor = base
