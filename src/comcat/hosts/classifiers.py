"""The final linear layer of a classifier, whichever library it comes from."""

from __future__ import annotations

from typing import Any

from torch import nn

#: Where libraries keep it, where they do not say so: transformers, torchvision.
_NAMES = ("classifier", "cls_classifier", "distillation_classifier", "head", "heads.head", "fc")


def classifiers(model: Any) -> list[tuple[str, nn.Linear]]:
    """Names and layers; two for distilled DeiT."""
    if hasattr(model, "get_classifier"):  # timm
        found = model.get_classifier()
        heads = list(found) if isinstance(found, (tuple, list)) else [found]
    else:
        places = [(model.get_submodule(name) if _has(model, name) else None) for name in _NAMES]
        classes = getattr(getattr(model, "config", None), "num_labels", None)
        heads = [one for one in places if classes is None or getattr(one, "out_features", None) == classes]
    wanted = {id(head) for head in heads if isinstance(head, nn.Linear)}
    return [(name, module) for name, module in model.named_modules() if id(module) in wanted]


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
