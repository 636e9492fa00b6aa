"""The text side of dual encoders of transformers: the class with both towers, and its tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ModelError
from ..storage.reader import read_json

#: Where transformers' dual encoders keep what their image tower alone lacks.
_PROJECTIONS = ("visual_projection", "vision_proj", "vision_projection", "image_projection")


def whole_class(data: Mapping[str, Any]) -> str | None:
    """The name of the class with both towers that a configuration is of; None where it has no text tower."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    named = data.get("architectures") or []
    usual = MODEL_MAPPING_NAMES.get(str(data.get("model_type")))
    for name in [*named, *([usual] if isinstance(usual, str) else usual or ())]:
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if hasattr(found, "get_text_features") and hasattr(found, "get_image_features"):
            return str(name)
    return None


def has_own_projection(model: nn.Module) -> bool:
    """Whether the image tower that is opened alone returns what the whole model compares with text."""
    import transformers

    family = type(model).__name__.removesuffix("Model")
    alone = hasattr(transformers, f"{family}VisionModelWithProjection")
    return alone or not any(hasattr(model, name) for name in _PROJECTIONS)


def tokenizer_of(model: nn.Module, folder: Path | None, name: str) -> Callable[[list[str]], Any]:
    """Prompts to the arguments of ``get_text_features``, by the tokenizer in a directory.

    Raises:
        ModelError: there is none, or it brings code of its own.
    """
    from transformers import AutoTokenizer

    file = None if folder is None else folder / "tokenizer_config.json"
    if file is not None and file.is_file():
        said = read_json(file, what="tokenizer", error=ModelError)
        if not isinstance(said, dict) or said.get("auto_map"):
            raise ModelError(f"the tokenizer '{file}' is damaged, or asks to run code of its own; comcat never does")
    there = (
        [] if folder is None else [path for part in ("tokenizer*", "vocab*", "*.model") for path in folder.glob(part)]
    )
    if not there:
        raise ModelError(
            f"'{name}' has no tokenizer beside its weights; put its files there (tokenizer.json, or those of "
            "AutoTokenizer.save_pretrained), or name a model that has them"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer raises for its files
        raise ModelError(f"the tokenizer in '{folder}' cannot be read: {' '.join(str(error).split())[:300]}") from error
    config: Any = model.config
    text = getattr(config, "text_config", config)
    longest = min(tokenizer.model_max_length, int(getattr(text, "max_position_embeddings", 77)))
    taken = inspect.signature(model.get_text_features).parameters  # type: ignore[arg-type]

    def tokens(prompts: list[str]) -> dict[str, Any]:
        # Models with a bias on their scores (SigLIP) were trained on padded text, without a mask.
        padding = "max_length" if hasattr(model, "logit_bias") else True
        found = tokenizer(prompts, padding=padding, truncation=True, max_length=longest, return_tensors="pt")
        return {key: value for key, value in found.items() if key in taken}

    return tokens
