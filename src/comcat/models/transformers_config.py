"""Configurations of transformers from files that somebody may have sent: checked as plain data before any is built.

A configuration can name code (``auto_map``), kernels and backbones to be fetched from the network, and layers without
end. None of these is followed: what names code or a kernel is refused or left out, a backbone must be one of timm's own
architectures, and sizes are bounded.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ComcatError, ModelError
from ..storage.reader import shown
from .timm_arguments import check_args

#: Where a file may name code of its own.
_CODE = ("auto_map", "trust_remote_code", "custom_pipelines", "custom_generate")
#: How a model is run, which is chosen where it runs; some of these names lead to code on the Hub.
_SWITCHES = frozenset({
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal", "use_kernels",
    "kernel_config", "tp_plan", "base_model_tp_plan", "base_model_pp_plan", "base_model_fsdp_plan", "device_map",
})  # fmt: skip
#: Of the file or of the tensors, not of the architecture.
_VOLATILE = frozenset({"transformers_version", "_name_or_path", "dtype", "torch_dtype"})
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]{0,100}", re.ASCII)
_MOST_LAYERS = 1000
#: Attention implementations that need nothing but PyTorch.
ATTENTION = ("eager", "sdpa")


def model_class(name: Any, error: type[ComcatError] = ModelError) -> Any:
    """The class of this name that transformers itself exports.

    Raises:
        error: there is none, or it is no architecture.
    """
    import transformers

    found = getattr(transformers, name, None) if isinstance(name, str) and _NAME.fullmatch(name) else None
    if not (
        isinstance(found, type)
        and issubclass(found, transformers.PreTrainedModel)
        and found.__module__.startswith("transformers.models.")
        and getattr(found, "config_class", None) is not None
    ):
        raise error(
            f"transformers {transformers.__version__} has no architecture {shown(name)}; upgrade transformers if it is "
            "a newer one. Code that a repository brings along is never run"
        )
    return found


def configured(cls: Any, data: Mapping[str, Any], what: str, error: type[ComcatError] = ModelError) -> Any:
    """The configuration object of an architecture from plain data that :func:`check` has passed.

    Raises:
        error: it is that of another architecture, or its values are refused.
    """
    kind = cls.config_class
    if data.get("model_type") != kind.model_type:
        raise error(
            f"{what} is of the type {shown(data.get('model_type'))}, and {cls.__name__} needs {kind.model_type!r}"
        )
    try:
        return kind.from_dict(copy.deepcopy(dict(data)))
    except Exception as cause:  # every configuration has checks of its own
        raise error(f"{what} is none of {cls.__name__}: {' '.join(str(cause).split())[:300]}") from cause


def check(data: Any, what: str, error: type[ComcatError] = ModelError) -> None:
    """Raise unless a configuration is plain data that leads neither to code, nor to the network, nor out of bounds.

    Raises:
        error: names the entry and the way out.
    """
    for entry, value, inside in _entries(data):
        if entry in _CODE and value:
            raise error(
                f"{what} asks to run code that the repository brings along ({entry}); comcat never does, "
                "trust_remote_code included. Use an architecture that transformers has itself"
            )
        if entry == "quantization_config" and value:
            raise error(f"{what} is that of a quantized model; compress it in floating point, and quantize the result")
        if entry in _SWITCHES:
            raise error(f"{what} holds {entry!r}, which is chosen where a model runs; remove it")
        if entry.startswith("__") or callable(getattr(_base(), entry, None)):
            raise error(f"{what} holds {shown(entry)}, which is no setting; remove it")
        _check_number(entry, value, what, error)
        if entry in ("backbone", "architecture") and value is not None:
            _check_backbone(entry, value, inside, what, error)


def settings(data: Any) -> Any:
    """A configuration without what says how its model is run, in which type, and where it came from."""
    if isinstance(data, dict):
        return {key: settings(value) for key, value in data.items() if key not in _SWITCHES | _VOLATILE}
    return [settings(item) for item in data] if isinstance(data, list) else data


def plain(config: Any) -> dict[str, Any]:
    """A configuration object as plain data that JSON can hold; the same when it is built from that data."""
    data = _plain(config)
    with contextlib.suppress(Exception):  # what it says of values that it refuses is said when it is built
        return _plain(type(config).from_dict(copy.deepcopy(data)))
    return data


def _plain(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = settings(_json(config.to_dict()))
    return found


def attention(config: Any, path: str = "") -> dict[str, str]:
    """Which of PyTorch's attention implementations each configuration asks for, by its path; "" is the outermost."""
    found: dict[str, str] = {}
    for place, part in _configs(config, path):
        chosen = getattr(part, "_attn_implementation", None)
        if chosen in ATTENTION:
            found[place] = chosen
    return found


def set_attention(config: Any, chosen: Mapping[str, str]) -> None:
    """The inverse of :func:`attention`."""
    for place, part in _configs(config):
        if place in chosen:
            part._attn_implementation_internal = chosen[place]


def _configs(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, _base()):
            yield from _configs(value, f"{path}.{name}" if path else name)


def _base() -> Any:
    from transformers import PretrainedConfig

    return PretrainedConfig


def _entries(data: Any) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield str(key), value, data
            if key not in ("id2label", "label2id"):
                yield from _entries(value)
    elif isinstance(data, (list, tuple)):
        for item in data:
            yield from _entries(item)


def _check_number(entry: str, value: Any, what: str, error: type[ComcatError]) -> None:
    numbers = value if isinstance(value, (list, tuple)) else [value]
    numbers = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool)]
    if any(abs(n) > 2**31 for n in numbers):
        raise error(f"{what} has {entry} = {shown(value)}, which no architecture has")
    if ("layers" in entry or "depth" in entry) and sum(numbers) > _MOST_LAYERS:
        raise error(f"{what} has {entry} = {shown(value)}; no architecture has more than {_MOST_LAYERS} layers")


def _check_backbone(entry: str, value: Any, inside: Mapping[str, Any], what: str, error: type[ComcatError]) -> None:
    """A backbone by name is looked up on the network unless it is one of timm's architectures."""
    import timm

    kind = inside.get("model_type")
    own = (entry, kind) in (("backbone", "timm_backbone"), ("architecture", "timm_wrapper"))
    old = entry == "backbone" and inside.get("use_timm_backbone") and not inside.get("backbone_kwargs")
    if not (own or old or entry == "architecture") or not isinstance(value, str) or not timm.is_model(value):
        raise error(f"{what} has {entry} = {shown(value)}, which would be looked for on the network; it must be timm's")
    check_args(value, inside.get("model_args") or {}, error)


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, (list, tuple)) else value
