"""Arguments of ``timm.create_model``: which ones describe an architecture, and which ones a model was made with.

``create_model`` also takes arguments that open files, reach for the network or choose where to compute. None of them
belongs to an architecture, so none is ever passed on, whether it comes from a file, the command line or a caller.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, get_args, get_type_hints

import timm
from torch import nn

from ..errors import ComcatError, ModelError
from .unfilled import building

#: Not of the architecture: files, network, placement, code.
_NEVER = frozenset({
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn",
    "pretrained_model_args", "checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit", "model_cfg",
    "feature_cfg", "kwargs_filter", "pruned", "device", "dtype", "cfg", "self", "args", "kwargs", "model_name",
})  # fmt: skip
#: Of every architecture, beside the parameters of its class.
_ALWAYS = frozenset({"features_only", "out_indices", "feature_cls", "output_fmt", "num_classes", "in_chans"})
#: A name such as "gelu" or "avg"; never a path, an address or a dotted name of code.
_WORD = re.compile(r"[\w+-]{0,40}", re.ASCII)
#: More layers than any transformer has; keeps a damaged number from building for hours.
_MOST_LAYERS = 1000


def check_args(name: str, args: Mapping[str, Any], error: type[ComcatError] = ModelError) -> None:
    """Raise unless all arguments are ones that the class of timm's architecture ``name`` takes, with plain values."""
    known = allowed(name)
    for key, value in args.items():
        if key in _NEVER or (known is not None and key not in known):
            fix = (
                "give weights as a checkpoint"
                if "pretrained" in str(key) or key == "checkpoint_path"
                else "leave it out"
            )
            raise error(f"timm cannot build '{name}' with {key!r}, which is no argument of its architecture; {fix}")
        check_value(key, value, error)


def check_value(key: str, value: Any, error: type[ComcatError]) -> None:
    if isinstance(value, str) and not _WORD.fullmatch(value):
        raise error(f"the argument {key} is {value[:60]!r}; a text must be one word, such as 'gelu' or 'avg'")
    if isinstance(value, Mapping):
        for inner, item in value.items():
            check_value(f"{key}.{inner}", item, error)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_value(key, item, error)
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**31:
        raise error(f"the argument {key} is {value}, which no architecture has")
    if "depth" in key:
        layers = value if isinstance(value, (list, tuple)) else [value]
        if sum(n for n in layers if isinstance(n, int)) > _MOST_LAYERS:
            raise error(f"the argument {key} is {value}; no architecture has more than {_MOST_LAYERS} layers")


@lru_cache(maxsize=256)
def allowed(name: str) -> frozenset[str] | None:
    """Arguments of the architecture's class; None where it is not known before the model is there (Hub names)."""
    if ":" in name or not timm.is_model(name.partition(".")[0]):
        return None
    try:
        with building():
            kind = type(timm.create_model(name.partition(".")[0], pretrained=False))
    except Exception:  # a few architectures cannot be built on meta: then only the names above are refused
        return None
    names: set[str] = set(_ALWAYS)
    for cls in inspect.getmro(kind):
        if cls is nn.Module:
            break
        parameters = inspect.signature(vars(cls)["__init__"]).parameters if "__init__" in vars(cls) else {}
        names.update(parameters)
        for hint in _hints(cls):  # a configuration, whose fields the class takes as arguments
            names.update(field.name for field in fields(hint))
        if parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return frozenset(names) - _NEVER


def _hints(cls: type) -> list[Any]:
    try:
        hints: Any = get_type_hints(vars(cls)["__init__"]).values() if "__init__" in vars(cls) else []
    except (NameError, TypeError):
        return []
    return [option for hint in hints for option in (hint, *get_args(hint)) if is_dataclass(option)]


def recorded(model: nn.Module, name: str) -> dict[str, Any] | None:
    """What timm itself remembers of the call that made the model; None from versions that do not."""
    args = getattr(model, "_model_args", None)
    if not isinstance(args, dict):
        return None
    known = allowed(name)
    return {key: value for key, value in args.items() if (known is None or key in known) and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def structure(model: nn.Module) -> dict[str, Any]:
    """Arguments that shape the tensors of a dense ViT or Swin, read off its layers."""
    args: dict[str, Any] = {}
    embed = getattr(model, "patch_embed", None)
    if isinstance(getattr(model, "embed_dim", None), int):
        args["embed_dim"] = model.embed_dim
    projection = getattr(embed, "proj", None)
    if isinstance(projection, nn.Conv2d):
        args["in_chans"] = projection.in_channels
        if hasattr(model, "layers"):
            args["embed_dim"] = projection.out_channels
    stages = [stage.blocks for stage in getattr(model, "layers", []) if hasattr(stage, "blocks")]
    if stages:
        args["depths"] = tuple(len(blocks) for blocks in stages)
        args["num_heads"] = tuple(blocks[0].attn.num_heads for blocks in stages)
        first = stages[0][0]
    elif len(getattr(model, "blocks", [])):
        first = model.blocks[0]  # type: ignore[index]
        args["depth"] = len(model.blocks)  # type: ignore[arg-type]
        args["num_heads"] = getattr(getattr(first, "attn", None), "num_heads", None)
    else:
        return args
    fc1 = getattr(getattr(first, "mlp", None), "fc1", None)
    if isinstance(fc1, nn.Linear):
        width, hidden = fc1.in_features, fc1.out_features
        # timm truncates the product of width and ratio
        args["mlp_ratio"] = hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width
    return args


def _classes(model: nn.Module) -> int | None:
    """Outputs of a classifier that somebody has put there, whatever ``num_classes`` says; None if that is right."""
    head, said = getattr(model, "head", None), getattr(model, "num_classes", None)
    width = getattr(head, "out_features", None)
    plain = isinstance(head, nn.Linear) and isinstance(said, int) and said > 0
    return width if plain and isinstance(width, int) and width != said else None


def behaviour(model: nn.Module) -> dict[str, Any]:
    """Arguments that can be read off a ViT or Swin, compressed or not, and that may change after it is built."""
    args: dict[str, Any] = {}
    embed = getattr(model, "patch_embed", None)
    blocks = [block for stage in getattr(model, "layers", []) for block in getattr(stage, "blocks", [])]
    blocks = blocks or list(getattr(model, "blocks", []))
    attention = getattr(blocks[0], "attn", None) if blocks else None
    places = {
        model: ("num_classes", "global_pool", "no_embed_class", "dynamic_img_size", "pool_include_prefix"),
        embed: ("img_size", "patch_size", "strict_img_size", "dynamic_img_pad"),
        blocks[0] if blocks else None: ("window_size", "always_partition"),
    }
    for place, names in places.items():
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, (bool, int, str, tuple)):
                args[name] = value
    classes = _classes(model)
    if classes is not None:
        args["num_classes"] = classes
    drops = {
        "drop_rate": getattr(model, "head_drop", None) or getattr(getattr(model, "head", None), "drop", None),
        "pos_drop_rate": getattr(model, "pos_drop", None),
        "patch_drop_rate": getattr(model, "patch_drop", None),
        "proj_drop_rate": getattr(attention, "proj_drop", None),
        "attn_drop_rate": getattr(attention, "attn_drop", None),
    }
    for name, module in drops.items():
        if module is not None:
            args[name] = float(getattr(module, "p", getattr(module, "prob", 0.0)) or 0.0)
    rates = [getattr(m, "drop_prob", 0.0) or 0.0 for block in blocks for m in block.modules()]
    if blocks:
        args["drop_path_rate"] = float(max(rates, default=0.0))
    return args
