"""The attention layers of ComfyUI's models under the names that adapter files have for them.

Files name layers as diffusers does. ComfyUI has the same layers, with the same projections, under other names; a UNet's
are in ``comfy.utils.unet_to_diffusers``, and those of CLIP differ by a prefix.
"""

from __future__ import annotations

from typing import Any

from comcat.errors import ModelError
from comcat.hosts.addable import AddableAttention, Kind
from comcat.hosts.clip import STREAM
from comcat.layers.heads import Heads, Stream

SAMPLE = Stream.separate("sample", "to_q", "to_k", "to_v", "to_out.0")

#: A file's name of a text encoder -> ComfyUI's names of it: SD 1.x and XL, SD 2.x.
ENCODERS = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",)}

#: (a file's name of the layer, the layer's path in ComfyUI's model) -> the layer
Attentions = dict[str, tuple[str, AddableAttention]]


def of_unet(model: Any) -> Attentions:
    """The attention layers of a MODEL (a ModelPatcher).

    Raises:
        ModelError: it is no UNet of Stable Diffusion.
    """
    import comfy.utils

    config = getattr(getattr(model.model, "model_config", None), "unet_config", {})
    names = comfy.utils.unet_to_diffusers(config)
    ends = {".attn1.to_q.weight": "self", ".attn2.to_q.weight": "cross"}
    found: Attentions = {}
    for theirs, ours in names.items():
        kind: Kind | None = next((kind for end, kind in ends.items() if theirs.endswith(end)), None)  # type: ignore[misc]
        if kind is None:
            continue
        name, path = (key.removesuffix(".to_q.weight") for key in (theirs, f"diffusion_model.{ours}"))
        attn = model.model.get_submodule(path)
        heads = Heads.of(attn.heads, attn.dim_head)
        found[name] = path, AddableAttention(name, attn, kind, heads, (SAMPLE,))
    if not found:
        what = type(getattr(model.model, "diffusion_model", model.model)).__name__
        raise ModelError(
            f"comcat adapters are added in ComfyUI to the UNets of SD 1.x, 2.x and XL, and this model is a {what}. "
            "Turn the adapter into a LoRA, comcat adapter convert, and load it with the node Load LoRA"
        )
    return found


def of_clip(clip: Any, component: str) -> Attentions:
    """The attention layers of one text encoder of a CLIP.

    Raises:
        ModelError: there is no such encoder in it.
    """
    encoder = encoder_name(clip, component)
    model = clip.patcher.model
    prefix = f"{encoder}.transformer.text_model."
    found: Attentions = {}
    for i, layer in enumerate(model.get_submodule(f"{prefix}encoder.layers")):
        name = f"encoder.layers.{i}.self_attn"
        attn = layer.self_attn
        heads = Heads.of(attn.heads, attn.q_proj.out_features // attn.heads)
        found[name] = prefix + name, AddableAttention(name, attn, "text", heads, (STREAM,))
    return found


def encoder_name(clip: Any, component: str) -> str:
    """ComfyUI's name of a text encoder, e.g. clip_l."""
    model = clip.patcher.model
    for name in ENCODERS.get(component, ()):
        if hasattr(model, name):
            return name
    raise ModelError(
        f"the adapter changes {component}, and this CLIP has no such encoder; connect the CLIP of the checkpoint that "
        "the adapter was made for"
    )
