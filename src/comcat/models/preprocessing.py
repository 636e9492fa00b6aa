"""How images are prepared for a model: the data config, in the words of timm, whatever library the model is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import DataError
from .libraries import library_of
from .library import image_config
from .profile import default_input_size
from .source import Source, recorded_source


def configure(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """The model's data config with the values that are ``given``, which become its own and are saved with it.

    Returns:
        ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct`` and ``crop_mode``.

    Raises:
        DataError: the model does not say how its images are normalized, and nor does ``given``.
    """
    from timm.data import resolve_data_config, resolve_model_data_config

    size, home = default_input_size(model), library_of(model)
    if home is None or home.name == "timm":
        own = getattr(model, "pretrained_cfg", None)
        if isinstance(own, dict):
            model.pretrained_cfg = {**own, **given, "input_size": size}  # type: ignore[assignment]
        return {**resolve_model_data_config(model), **given, "input_size": size}
    source = recorded_source(model)
    config = {**said_config(model), **given, "input_size": size}
    missing = [name for name in ("mean", "std") if name not in config]
    if missing:
        raise DataError(
            f"the {type(model).__name__} does not say how its images are normalized: there is no preprocessor_config."
            "json beside its weights. Put it there, or give --mean and --std (and --interpolation, --crop-pct)"
        )
    _record(model, source, config)
    known = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    found = resolve_data_config({}, pretrained_cfg={k: config[k] for k in known if k in config})
    return {**found, "input_size": size}


def said_config(model: nn.Module) -> dict[str, Any]:
    """What the model says of its images and classes, in the words of timm, and nothing that is not said."""
    home, source = library_of(model), recorded_source(model)
    own = {} if home is None else image_config(model, home)
    recorded = source.config if source else {}
    if home is not None and home.name == "timm":
        recorded, own = own, recorded  # what the model itself says is what configure() has changed
    return {**own, **recorded, "input_size": default_input_size(model)}


def _record(model: nn.Module, source: Source | None, config: dict[str, Any]) -> None:
    made: Any = getattr(model, "comcat", None)
    if source is None:
        return  # somebody's own model; what it is saved with is read off it
    if made is not None and made.source is source:
        model.comcat = replace(made, source=replace(source, config=config))
    else:
        model.comcat_source = replace(source, config=config)  # type: ignore[assignment]
