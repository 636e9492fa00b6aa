"""transformers' vision architectures, built from tiny configurations, for ``coverage.py``.

A family is a package of ``transformers.models`` with a model that takes pixels. Of each, one model is built that holds
most of it: the vision tower of a language model, the whole of everything else.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers.models
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from coverage import Case
from transformers_settings import CLASSES, ENTRIES, IMAGES, MADE

#: Classes that are called attention and have no softmax over scores of queries and keys.
NOT_SOFTMAX: dict[str, str] = {
    "PoolFormerPooling": "pooling in place of attention",
    "MobileViTV2LinearSelfAttention": "linear attention",
    "SwiftFormerEfficientAdditiveAttention": "additive attention",
    "Florence2VisionChannelAttention": "attention between channels",
    **dict.fromkeys(
        ["DFineMultiscaleDeformableAttention", "Deimv2MultiscaleDeformableAttention"],
        "sums of samples of the image, without projections of values or of their sum",
    ),
}

#: Sizes, by the names that configurations give them; what a name does not say stays as it is.
_WIDTH = 32
_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        [
            "hidden_size", "d_model", "embed_dim", "hidden_dim", "encoder_hidden_dim", "decoder_hidden_size",
            "projection_dim", "projection_dims", "out_hidden_size", "output_dim", "mask_feature_size",
            "vision_hidden_size", "conv_dim", "text_hidden_size", "fpn_hidden_size", "mm_hidden_size",
            "prompt_encoder_hidden_size", "encoder_hidden_size", "image_embed_dim", "neck_hidden_size",
            "fusion_hidden_size", "decoder_dim", "output_channels", "width", "vision_embed_dim", "input_hidden_size",
        ],
        _WIDTH,
    ),
    **dict.fromkeys(
        [
            "num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "num_heads", "n_head",
            "num_key_value_heads", "decoder_num_attention_heads", "attention_heads", "text_num_attention_heads",
        ],
        4,
    ),
    **dict.fromkeys(
        [
            "intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "mlp_dim", "dim_feedforward",
            "encoder_feedforward_dim", "decoder_intermediate_size", "vision_intermediate_size", "feedforward_dim",
        ],
        44,
    ),
    **dict.fromkeys(
        [
            "num_hidden_layers", "encoder_layers", "decoder_layers", "depth", "num_layers", "num_encoder_layers",
            "num_decoder_layers", "decoder_num_hidden_layers", "vision_num_hidden_layers", "n_layer",
        ],
        2,
    ),
    "head_dim": 8, "attention_head_size": 8, "vocab_size": 99, "max_position_embeddings": 64, "image_size": 32,
    "patch_size": 8, "num_frames": 2, "frames_per_clip": 2, "num_queries": 7, "num_labels": 5,
    "max_num_patches": 64, "num_patches": 16,
}  # fmt: skip
#: Of models with several resolutions.
_STAGED = {"image_size": 64, "patch_size": 2, "window_size": 4}
_TOKEN = ("_token_id", "_token_index", "_token_ids")
#: Lists with an entry per stage: depths, heads and widths.
_DEPTHS = ("depths", "blocks_per_stage", "stage_depths", "layers_per_stage")
_WIDTHS = ("hidden_sizes", "embed_dims", "dims", "embed_dim_per_stage", "channels", "neck_hidden_sizes")

_PIXELS = ("pixel_values", "pixel_values_videos", "grid_thw")
_TOWER = ("Model", "Transformer", "Encoder")
#: Packages that build no model of their own: wrappers around those of timm, or of other packages.
_OTHER = ("timm_backbone", "timm_wrapper", "vision_encoder_decoder", "vision_text_dual_encoder")
#: One process for all families: they take less time than starting it.
TOGETHER = True


def families() -> list[str]:
    """Packages with a model that takes pixels."""
    names = [one.name for one in pkgutil.iter_modules(transformers.models.__path__) if one.ispkg]
    return [name for name in names if name not in _OTHER and _classes(name)]


def cases(family: str) -> Iterator[Case]:
    """The one model of a family, unless nothing in it is attention."""
    model = build(family)
    if any(re.search("ttn|ttention", type(module).__name__) for module in model.modules()):
        images = torch.randn(IMAGES[family]) if family in IMAGES else None
        yield Case([f"{family} ({type(model).__name__})"], lambda: (build(family), images))


@functools.cache
def _classes(package: str) -> dict[str, type[PreTrainedModel]]:
    """The models of a package that take pixels, by name."""
    found: dict[str, type[PreTrainedModel]] = {}
    base = f"transformers.models.{package}"
    for one in pkgutil.iter_modules(importlib.import_module(base).__path__):
        if not one.name.startswith("modeling_"):
            continue
        try:
            module = importlib.import_module(f"{base}.{one.name}")
        except ImportError:
            continue
        for name, cls in vars(module).items():
            own = inspect.isclass(cls) and issubclass(cls, PreTrainedModel) and cls.__module__ == module.__name__
            if own and cls.config_class is not None and "forward" in vars(cls) and _takes(cls, *_PIXELS):
                found[name] = cls
    return found


def _takes(cls: type[PreTrainedModel], *names: str) -> bool:
    return any(name in inspect.signature(cls.forward).parameters for name in names)


def _chosen(package: str) -> tuple[type[PreTrainedModel], bool]:
    """(The class that is built, whether what counts is the vision tower inside)."""
    found = _classes(package)
    if package in CLASSES:
        return found[CLASSES[package]], False
    config: Any = vars(next(iter(found.values())).config_class)
    speaks = any("ForConditionalGeneration" in name or "ForCausalLM" in name for name in found)
    towers = [cls for name, cls in found.items() if re.search("Vision|Visual", name) and name.endswith(_TOWER)]
    if speaks or (any("Retrieval" in name for name in found) and "sub_configs" in config):
        whole = next((cls for name, cls in found.items() if name.endswith("Model") and cls not in towers), None)
        return (towers[0], False) if towers else (whole or next(iter(found.values())), True)
    whole = [cls for name, cls in found.items() if name.endswith("Model") and cls not in towers]
    named = [cls for name, cls in found.items() if "For" in name]
    heads = [cls for cls in named if "Classification" in cls.__name__ or "Detection" in cls.__name__]
    return next(iter([*heads, *whole, *named, *towers, *found.values()])), False


def build(package: str) -> nn.Module:
    """A tiny model, with weights as initialized."""
    cls, tower = _chosen(package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = MADE.get(package, {})
        config: Any = cls.config_class(**made)  # type: ignore[misc]
        shrink(config)
        for name in made:
            setattr(config, name, getattr(cls.config_class(**made), name))  # type: ignore[misc]
        for path, value in ENTRIES.get(package, {}).items():
            *inner, last = path.split(".")
            place = config
            for name in inner:
                place = getattr(place, name)
            setattr(place, last, AutoConfig.for_model(**value) if last == "backbone_config" else value)
        if not tower:
            return cls(config)
        return AutoModel.from_config(config.vision_config)  # type: ignore[no-any-return]


def shrink(config: Any) -> None:
    """Write small sizes into a configuration and the ones inside."""
    staged = any(name in vars(config) for name in _DEPTHS)
    deep = max([2, *(one for one in getattr(config, "out_indices", None) or () if type(one) is int)])
    for name, value in list(vars(config).items()):
        if name == "backbone_config" and hasattr(config, "encoder_in_channels"):
            continue  # the sizes of one are listed in the other
        if name == "window_size" and staged and type(value) is int:
            setattr(config, name, _STAGED[name])
        elif name == "num_hidden_layers" and deep > 2:
            continue
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrink(value)
        elif name in _DEPTHS and isinstance(value, (list, tuple)):
            setattr(config, name, type(value)(1 for _ in value))
        elif name in _WIDTHS and isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
            setattr(config, name, type(value)(_stage(config, i, v) for i, v in enumerate(value)))
        elif name.endswith(_TOKEN) and type(value) is int and value >= 99:
            setattr(config, name, 98)
        elif name in _SIZES and type(value) is int:
            size = _STAGED.get(name, _SIZES[name]) if staged else _SIZES[name]
            setattr(config, name, _swin(config) if name == "embed_dim" and staged else size)
        elif name in ("image_size", "patch_size") and isinstance(value, (list, tuple)):
            size = _STAGED[name] if staged else _SIZES[name]
            setattr(config, name, type(value)(size for _ in value))


def _stage(config: Any, index: int, width: int) -> int:
    """A width that the heads of its stage divide."""
    for name in ("num_attention_heads", "num_heads", "num_attention_heads_per_stage"):
        heads = getattr(config, name, None)
        if isinstance(heads, (list, tuple)) and index < len(heads):
            return 8 * int(heads[index])
    return max(16, width // 8)


def _swin(config: Any) -> int:
    """The first width of stages that double it."""
    for name in ("num_heads", "num_attention_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, (list, tuple)) and heads:
            return 8 * int(heads[0])
    return _WIDTH
