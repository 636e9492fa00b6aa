"""diffusers: denoisers (UNets and transformers) by their class and configuration."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import CheckpointError, ModelError
from .library import Library, Wanted
from .source import Source
from .timm_arguments import check_value
from .traits import is_plain

_MOST_LAYERS = 1000


class DiffusersModels(Library):
    """``name`` is a class of diffusers, ``args`` its ``config`` as a dictionary."""

    name: ClassVar = "diffusers"
    advice: ClassVar = "its configuration must be the one that it was built from"

    def owns(self, model: nn.Module) -> bool:
        return type(model).__module__.startswith("diffusers.models.") and hasattr(model, "config")

    def describe(self, model: nn.Module) -> Source | None:
        if _class(type(model).__name__) is not type(model):
            return None  # a part of a model, or a class that somebody derived
        config: Any = model.config
        plain = {key: _listed(value) for key, value in dict(config).items() if not key.startswith("_")}
        return Source(type(model).__name__, {"config": plain}, library=self.name)

    def following(self, source: Source, model: nn.Module, dense: bool) -> Source:
        """The configuration is the model's own, and changes with it."""
        now = self.describe(model)
        return source if now is None else replace(source, name=now.name, args=now.args)

    def check(self, source: Source) -> None:
        cls, what = _class(source.name), f"the configuration of '{source.name}'"
        if cls is None:
            raise CheckpointError(f"diffusers has no model {source.name[:60]!r}; upgrade diffusers")
        config = source.args.get("config")
        if not isinstance(config, dict) or set(source.args) != {"config"}:
            raise CheckpointError(f"{what} is damaged: a model of diffusers has 'config'")
        known = inspect.signature(cls.__init__).parameters
        for key, value in config.items():
            if key not in known or key == "self":
                raise CheckpointError(f"{what} has {key[:60]!r}, which is no argument of its class")
            if not _is_data(value):
                raise CheckpointError(f"{what} is damaged: {key} is not plain data")
            check_value(key, value, CheckpointError)
            if "layers" in key and sum(_numbers(value)) > _MOST_LAYERS:
                raise CheckpointError(f"{what} has {key} {value}; no architecture has more than {_MOST_LAYERS} layers")

    def make(self, source: Source) -> nn.Module:
        cls: Any = _class(source.name)
        model: nn.Module = cls(**source.args["config"])
        return model

    def num_classes(self, model: nn.Module) -> int | None:
        return None

    def open(self, wanted: Wanted) -> nn.Module:
        raise ModelError(
            f"'{wanted.name}' of diffusers is opened as a part of its pipeline: comcat compress BASE --component unet"
        )


LIBRARY = DiffusersModels()


def _class(name: str) -> type[Any] | None:
    """A model class that diffusers exports; no code of anybody else."""
    import diffusers

    found = getattr(diffusers, name, None) if name.isidentifier() else None
    is_model = inspect.isclass(found) and issubclass(found, (diffusers.ModelMixin, torch.nn.Module))
    return found if is_model and hasattr(found, "load_config") else None


def _listed(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, (list, tuple)):
        return [_listed(one) for one in value]
    return {key: _listed(one) for key, one in value.items()} if isinstance(value, dict) else value


def _is_data(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_data(one) for key, one in value.items())
    return is_plain(value)


def _numbers(value: Any) -> list[int]:
    """All whole numbers in it."""
    if isinstance(value, (list, tuple)):
        return [n for one in value for n in _numbers(one)]
    return [value] if type(value) is int else []
