"""What makes two modules alike beyond their tensors: the classes of their parts, and plain attributes of these.

A dropout rate, an epsilon or "takes images of any size" leaves no trace in one evaluation, so comparing outputs does
not find that it was lost. Switches of a run that are plain attributes, such as timm's ``grad_checkpointing``, count too
and come back; training mode and ``requires_grad`` do not, since a loaded model is in evaluation mode and all of it can
be trained.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import FunctionType
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..storage.reader import shown

#: Of the object, not of what it computes; ``feature_info`` tells of the layers what they themselves tell.
_OWN = frozenset({
    "training", "comcat", "comcat_source", "pretrained_cfg", "default_cfg", "pretrained_model_args", "feature_info",
    "name_or_path", "preprocess_cfg", "image_mean", "image_std",
})  # fmt: skip
#: Of a configuration object, not of what its model computes; the dtype is that of the tensors.
_OWN_CONFIG = frozenset({"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype"})
_MISSING = object()
#: Classes that compute the same from the same attributes; `norm_layer=partial(nn.LayerNorm, eps=...)` is common.
_ALIKE: dict[type, type] = {timm.layers.LayerNorm: nn.LayerNorm}


class Difference(NamedTuple):
    """``attribute`` is empty where the modules themselves differ; ``value`` is None unless it can be carried."""

    module: str
    attribute: str
    there: str
    built: str
    value: Any = None
    plain: bool = False

    def __str__(self) -> str:
        where = ".".join(part for part in (self.module, self.attribute) if part) or "the model"
        return f"'{where}' is {self.there}, but {self.built} when it is built anew"


def differences(model: nn.Module, built: nn.Module) -> list[Difference]:
    """What ``built`` lacks to be ``model``, module by module; attributes that only one of them has are left out."""
    found: list[Difference] = []
    there, here = (dict(m.named_modules(remove_duplicate=False)) for m in (model, built))
    for name in dict.fromkeys([*there, *here]):
        a, b = there.get(name), here.get(name)
        if a is None or b is None or _kind(a) is not _kind(b):
            full = a is not None and b is not None and type(a).__name__ == type(b).__name__
            old, new = (_class_name(module, full) for module in (a, b))
            found.append(Difference(name, "", old, new))
            continue
        for attribute in vars(a):
            if attribute in vars(b) and not attribute.startswith("_") and attribute not in _OWN:
                mine, other = vars(a)[attribute], vars(b)[attribute]
                configs = _is_config(mine) and _is_config(other)
                x, y = map(_comparable, _settings(mine, other) if configs else (mine, other))
                if x is not _MISSING and y is not _MISSING and (type(x), x) != (type(y), y):
                    plain = is_plain(mine) and is_plain(other)
                    found.append(Difference(name, attribute, shown(mine), shown(other), mine if plain else None, plain))
    return found


def restore_attributes(built: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Set plain attributes that a file holds.

    Raises:
        CheckpointError: there is no such module, or it has no plain attribute of that name.
    """
    modules = dict(built.named_modules(remove_duplicate=False))
    for name, values in attributes.items():
        own = vars(modules[name]) if name in modules else {}
        for attribute, value in values.items():
            old = own.get(attribute, _MISSING)
            if attribute.startswith("_") or attribute in _OWN or not is_plain(old) or not is_plain(value):
                raise CheckpointError(f"the architecture has no attribute '{name}.{attribute}' that could be set")
            setattr(modules[name], attribute, _as(old, value))


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are not saved, such as masks and tables that follow from the architecture."""
    saved = set(model.state_dict(keep_vars=True))
    return {name: tensor for name, tensor in model.named_buffers(remove_duplicate=False) if name not in saved}


def is_plain(value: Any) -> bool:
    """Whether JSON can hold it (a tuple comes back from a list)."""
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _as(old: Any, value: Any) -> Any:
    """JSON makes lists of tuples: ``value`` as the attribute that it replaces, a tuple unless that is a list."""
    if not isinstance(value, (list, tuple)):
        return value
    items = [_as(None, item) for item in value]
    return items if isinstance(old, list) else tuple(items)


def _kind(module: nn.Module) -> type:
    return _ALIKE.get(type(module), type(module))


def _class_name(module: nn.Module | None, full: bool) -> str:
    if module is None:
        return "missing"
    return f"a {type(module).__module__ + '.' if full else ''}{type(module).__qualname__}"


def _comparable(value: Any) -> Any:
    """A value that compares by content, or ``_MISSING`` for what cannot be compared."""
    if isinstance(value, (tuple, list, torch.Size)):
        items = tuple(map(_comparable, value))
        return _MISSING if any(item is _MISSING for item in items) else items
    if isinstance(value, dict):
        items = tuple((key, _comparable(item)) for key, item in value.items())
        return _MISSING if any(item is _MISSING for _, item in items) else items
    if isinstance(value, (type, FunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, enum.Enum) or is_plain(value):
        return value
    return _MISSING


def _is_config(value: Any) -> bool:
    return hasattr(type(value), "to_dict") and not isinstance(value, nn.Module)


def _settings(mine: Any, other: Any) -> tuple[Any, Any]:
    """What two configurations say of the architecture, whatever JSON made of them; entries of only one are left out."""
    if _is_config(mine) and _is_config(other):
        eager = [getattr(config, "_attn_implementation", None) == "eager" for config in (mine, other)]
        mine, other = _settings(mine.to_dict(), other.to_dict())
        return (mine, eager[0]), (other, eager[1])
    if isinstance(mine, dict) and isinstance(other, dict):
        mine, other = ({str(key): value for key, value in config.items()} for config in (mine, other))
        both = [key for key in mine if key in other and key not in _OWN_CONFIG]
        pairs = [_settings(mine[key], other[key]) for key in both]
        return dict(zip(both, (a for a, _ in pairs), strict=True)), dict(zip(both, (b for _, b in pairs), strict=True))
    if isinstance(mine, (list, tuple)) and isinstance(other, (list, tuple)) and len(mine) == len(other):
        pairs = [_settings(*pair) for pair in zip(mine, other, strict=True)]
        return tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
    return mine, other
