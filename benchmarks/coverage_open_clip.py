"""open_clip's models, for ``coverage.py``: towers of its own, and of timm, each built once per kind."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import open_clip
from open_clip.factory import get_model_config
from open_clip.model import CLIP, CustomTextCLIP
from torch import nn

from coverage import Case

NOT_SOFTMAX: dict[str, str] = {}
TOGETHER = True
#: Of both towers.
_TINY = {"layers": 2, "width": 24, "heads": 3, "head_width": 8, "patch_size": 7, "image_size": 28}


def families() -> list[str]:
    """The kinds of image towers."""
    return ["vit", "modified_resnet", "timm"]


def cases(family: str) -> Iterator[Case]:
    """Models that differ in their sizes alone are one case; towers of Hugging Face are those of transformers."""
    groups: dict[Any, list[str]] = {}
    for name in open_clip.list_models():
        config: Any = get_model_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        kind = "timm" if "timm_model_name" in vision else "modified_resnet" if _resnet(vision) else "vit"
        if kind != family or "hf_model_name" in text or "multimodal_cfg" in config:
            continue
        sizes = {"layers", "width", "heads", "head_width", "patch_size", "image_size", "vocab_size", "mlp_ratio"}
        flags = [(k, str(v)) for part in (vision, text) for k, v in part.items() if k not in sizes and _flag(k)]
        groups.setdefault((*flags, "custom_text" in config), []).append(name)
    for names in groups.values():
        yield Case(names, lambda name=names[0]: (build(name), None))  # type: ignore[misc]


def _resnet(vision: dict[str, Any]) -> bool:
    return isinstance(vision["layers"], list)


def _flag(key: str) -> bool:
    return key not in ("timm_model_name", "timm_model_pretrained", "hf_tokenizer_name", "tokenizer_kwargs")


def build(name: str) -> nn.Module:
    """With few, narrow blocks where the tower is open_clip's own."""
    logging.disable(logging.WARNING)
    config: Any = get_model_config(name)
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    elif not _resnet(vision):
        vision |= {k: v for k, v in _TINY.items() if k != "heads"}
    text |= {"layers": 2, "width": 24, "heads": 3, "vocab_size": 97, "context_length": 13}
    if text.get("pool_type") == "last" or "eos_id" in text:
        text["eos_id"] = 96
    cls = CustomTextCLIP if "custom_text" in config else CLIP
    made: nn.Module = cls(24, vision, text)
    return made
