"""How a model's own library builds it narrower: the settings that its constructor offers, found by trying them.

A setting counts where the model that it builds has exactly the shapes that are wanted: those of the dense model, with
every attention layer, or every FFN, at the one width. What the constructor ignores, rounds or refuses does not.

transformers: ``config.head_dim``, ``config.intermediate_size`` and the like, here or in a part of the configuration.
timm: ``head_dim`` and ``mlp_ratio`` of ``create_model``, which a directory in the layout of its hub keeps.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..errors import ComcatError, ModelError
from ..layers.base import Choice, Layer
from .source import Source, describe
from .unfilled import building

Shapes = dict[str, tuple[int, ...]]
#: Names of settings for the width of a head, and for the hidden units of an FFN: their number, or a ratio.
_WIDTHS = {
    "attention": ("head_dim", "attn_head_dim"),
    "ffn": ("intermediate_size", "mlp_dim", "ffn_dim", "mlp_ratio"),
}


class Constructor(ABC):
    """What builds a model of somebody's library, with some settings changed."""

    #: For messages: what the settings are.
    settings: str

    @abstractmethod
    def build(self, changed: Mapping[str, Any], meta: bool = False) -> nn.Module:
        """A fresh model, or its shapes alone; may raise anything."""

    @abstractmethod
    def names(self, wanted: tuple[str, ...]) -> Iterator[str]:
        """The names among ``wanted`` that may be set."""

    def shapes(self, changed: Mapping[str, Any]) -> Shapes | None:
        """Of what is built; None where it refuses."""
        try:
            return shapes_of(self.build(changed, meta=True))
        except Exception:  # whatever a constructor raises for values that it does not take
            return None


class TimmConstructor(Constructor):
    """``timm.create_model`` with the arguments that the model was made with."""

    settings = "arguments of timm.create_model"

    def __init__(self, source: Source) -> None:
        self.source = source

    def build(self, changed: Mapping[str, Any], meta: bool = False) -> nn.Module:
        return replace(self.source, args={**self.source.args, **changed}).build(meta)

    def names(self, wanted: tuple[str, ...]) -> Iterator[str]:
        yield from wanted


class ConfigConstructor(Constructor):
    """A class of transformers with its configuration."""

    settings = "settings of its configuration"

    def __init__(self, model: nn.Module) -> None:
        self.cls, self.config = type(model), model.config

    def build(self, changed: Mapping[str, Any], meta: bool = False) -> nn.Module:
        config: Any = copy.deepcopy(self.config)
        for name, value in changed.items():
            part, _, own = name.rpartition(".")
            setattr(getattr(config, part) if part else config, own, value)
        with building(meta):
            return self.cls(config)

    def names(self, wanted: tuple[str, ...]) -> Iterator[str]:
        parts = [key for key in getattr(self.config, "sub_configs", {}) if getattr(self.config, key, None) is not None]
        for part in ["", *(f"{key}." for key in parts)]:
            yield from (f"{part}{name}" for name in wanted)


@dataclass(frozen=True)
class Group:
    """The layers of one kind, which get one width.

    Attributes:
        name: of the setting; value: what it is set to for a width of the first layer, None where no value gives that.
    """

    layers: list[Layer]
    name: str = ""
    value: Callable[[int], Any] = field(default=lambda width: None, repr=False)

    @property
    def full(self) -> int:
        """The width of the first layer."""
        return self.layers[0].full[self.layers[0].one_width[0]]

    def width(self, layer: Layer, width: int) -> int | None:
        """That of another layer, where the first has this one; None where there is none."""
        own = layer.full[layer.one_width[0]]
        scaled, rest = divmod(own * width, self.full)
        return None if rest else scaled

    def choice(self, layer: Layer, width: int) -> Choice:
        """The choice of a layer; empty at its full width."""
        own = self.width(layer, width)
        return {} if own in (None, layer.full[layer.one_width[0]]) else dict.fromkeys(layer.one_width, int(own or 0))

    def widths(self, multiple: int = 1) -> list[int]:
        """What the first layer can have, below its full width."""
        return [
            width
            for width in range(multiple, self.full, multiple)
            if self.value(width) is not None and None not in (self.width(layer, width) for layer in self.layers)
        ]

    def shapes(self, width: int) -> Shapes:
        """Of the layers' own weights."""
        found: Shapes = {}
        for layer in self.layers:
            found |= layer.shapes_at(int(self.width(layer, width) or 0))
        return found


def constructor_of(model: nn.Module) -> Constructor:
    """What builds this model again.

    Raises:
        ModelError: nothing does, or it builds another one.
    """
    import transformers

    made: Constructor | None = None
    if getattr(transformers, type(model).__name__, None) is type(model):
        made = ConfigConstructor(model)
    else:
        source = describe(model)
        if source is not None and source.library == "timm":
            made = TimmConstructor(source)
    cls = type(model).__name__
    if made is None:
        raise ModelError(f"{cls} is no class of transformers or timm, so there is no stock form of it")
    try:
        there = shapes_of(made.build({}, meta=True))
    except ComcatError:
        raise
    except Exception as error:
        raise ModelError(f"{cls} cannot be built again, so it has no stock form: {error}") from error
    if there != shapes_of(model):
        raise ModelError(f"{cls} is not what the {made.settings} build: it was changed since, and has no stock form")
    return made


def offered(constructor: Constructor, model: nn.Module, layers: list[Layer]) -> Group | None:
    """The layers of one kind with the setting that narrows all of them, and nothing else; None where there is none."""
    kind, dense = layers[0].kind, shapes_of(model)
    full = [layer.full[layer.one_width[0]] for layer in layers]
    if kind == "attention" and len(set(full)) > 1:
        return None
    base = layers[full.index(min(full))]
    ordered = [base, *(layer for layer in layers if layer is not base)]
    for name in constructor.names(_WIDTHS[kind]):
        for value in _values(name, ordered):
            group = Group(ordered, name, value)
            tried = group.widths()
            if tried and constructor.shapes({name: value(tried[-1])}) == dense | group.shapes(tried[-1]):
                return group
    return None


def _values(name: str, layers: list[Layer]) -> list[Callable[[int], Any]]:
    """What a setting may be for a number of units: that number, or a ratio to the features, real or whole."""
    if not name.endswith("ratio"):
        return [lambda width: width]
    features = next(shape[1] for shape in layers[0].shapes_at(1).values() if len(shape) == 2)
    # int(features * ratio) is the wanted number in every stage, whichever way the product is rounded.
    times = max(layer.full["neurons"] for layer in layers) / layers[0].full["neurons"]
    return [
        lambda width: (width + 0.25 / times) / features,
        lambda width: None if width % features else width // features,
    ]


def shapes_of(model: nn.Module) -> Shapes:
    """Shapes of everything that a model is saved with."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
