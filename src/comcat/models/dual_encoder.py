"""Models of images and text: their two towers, their scale and their tokenizer, whatever library they are of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from .hub import fetch
from .libraries import library_of
from .opening import load_model, reader_of

Tokenize = Callable[[list[str]], Any]
#: Of a tokenizer, in a Hub repository.
_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.spm", "spiece.model")


def open_dual_encoder(name: str, option: str = "--text") -> tuple[nn.Module, Tokenize]:
    """Both towers of a model, and what makes tokens of prompts for it.

    Args:
        name: a directory or a Hub repository of transformers or open_clip, or ``open_clip/NAME/TAG``.
        option: of the command line by which it was named, for messages.

    Raises:
        ModelError: it is no model of images and text, or has no tokenizer beside it.
    """
    folder = Path(name)
    if not folder.is_dir() and name.count("/") == 1 and not name.startswith((".", "/", "~", "open_clip/")):
        folder = fetch(name, ("*.json", *_FILES))
    home, files = reader_of(folder) if folder.is_dir() else (None, {})
    args = {"towers": "both"} if home is None else home.both_towers(files)
    if args is None or (home is None and not name.startswith("open_clip/")):
        raise ModelError(
            f"'{name}' is no model of images and text with a tokenizer; name the one whose text tower reads the "
            f"prompts: {option} MODEL"
        )
    model = load_model(name, model_args=args)
    found: Any = library_of(model)
    return model, found.tokenizer(model, folder if home is not None else None, name)


def has_text_tower(model: nn.Module) -> bool:
    """Whether a model embeds text beside images."""
    return hasattr(model, "get_text_features") or hasattr(model, "encode_text")


def text_features(model: Any, tokens: Mapping[str, Tensor]) -> Tensor:
    """(n, D) of the text tower, after its projection."""
    if hasattr(model, "encode_text"):
        return _features(model.encode_text(tokens["input_ids"]))
    return _features(model.get_text_features(**tokens))


def image_features(model: Any, images: Tensor) -> Tensor:
    """(B, D) of the image tower, after its projection; ``model`` may be the image tower alone."""
    for name in ("get_image_features", "encode_image"):
        if hasattr(model, name):
            return _features(getattr(model, name)(images))
    return _features(model(images))


def _features(found: Any) -> Tensor:
    if not isinstance(found, Tensor):
        names = ("image_embeds", "text_embeds", "pooler_output")
        found = next((found[name] for name in names if isinstance(found, Mapping) and name in found), found)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise ModelError(f"a tower returns {type(found).__name__}, which holds no features that classes could have")
    return found


def scale_of(model: Any) -> float:
    """What cosines are multiplied by."""
    scale = getattr(model, "logit_scale", None)
    if isinstance(scale, Tensor):
        return float(scale.detach().float().exp())
    temperature = getattr(model, "temperature", None)  # ALIGN
    return 1 / float(temperature.detach()) if isinstance(temperature, Tensor) else 1.0


def projected(model: Any) -> bool:
    """Whether the image tower of a model, opened alone, returns what the whole compares with text."""
    home = library_of(model)
    return home is not None and home.tower_is_projected(model)
