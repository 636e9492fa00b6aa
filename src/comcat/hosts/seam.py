"""What the attention hosts of diffusion models share: how a layer is described, and how products get into it."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..added import AddedLayer, AddedProduct, Strength

Kind = Literal["self", "cross", "joint", "text"]


@dataclass(frozen=True)
class Stream:
    """The projections of one stream of tokens, as names inside the attention module.

    Attributes:
        output: None where the stream's result is not used, or the layer has no output projection.
        inner: the layer leaves its output projection to its block; the added output then has the heads' width and
            goes through the same projection.
    """

    name: str
    query: str
    key: str
    value: str
    output: str | None
    inner: bool = False


@dataclass(frozen=True)
class Site:
    """An attention layer that products can be added to.

    Attributes:
        name: of the module inside its component.
        normalized: queries and keys are normalized or rotated before their product, so that the added product cannot
            be folded into their weights.
    """

    name: str
    module: nn.Module
    kind: Kind
    num_heads: int
    head_dim: int
    streams: tuple[Stream, ...]
    normalized: bool = False

    def linear(self, name: str) -> Any:
        """A projection by its name; the base layer's dimensions also where PEFT has wrapped it."""
        return self.module.get_submodule(name)

    def dims(self, stream: Stream) -> tuple[int, int, int | None]:
        """(D of queries, D of keys and values, D of the output or None)."""
        output: int | None = None
        if stream.output is not None:
            output = self.linear(stream.output).out_features
        elif stream.inner:
            output = self.num_heads * self.head_dim
        return self.linear(stream.query).in_features, self.linear(stream.key).in_features, output

    def signature(self) -> list[Any]:
        """What a file's tensors have to fit: plain data for the fingerprint."""
        return [self.name, self.kind, self.num_heads, self.head_dim, *[[s.name, *self.dims(s)] for s in self.streams]]

    def new_layer(self, rank: int, strength: Strength, biases: Sequence[str] = (), dtype: Any = None) -> AddedLayer:
        """Products of ``rank`` for every stream, on this layer's device; ``biases``: e.g. "sample.query"."""
        weight = self.linear(self.streams[0].query).weight
        hook: Any = getattr(self.linear(self.streams[0].query), "_hf_hook", None)
        offloaded = weight.is_meta and hook is not None  # Accelerate brings the weights when they are needed
        streams = {
            stream.name: AddedProduct(
                *self.dims(stream),
                self.num_heads,
                rank,
                f"{stream.name}.query" in biases,
                f"{stream.name}.key" in biases,
                f"{stream.name}.value" in biases,
                device=hook.execution_device if offloaded else weight.device,
                dtype=dtype or weight.dtype,
            )
            for stream in self.streams
        }
        return AddedLayer(streams, rank, strength)


@dataclass(frozen=True)
class Refusal:
    """An attention layer that products cannot be added to, and what it is."""

    kind: Kind
    what: str


Run = Callable[[Sequence[AddedLayer]], Any]


def run_layers(layers: Sequence[AddedLayer], run: Run, plain: Callable[[], Any]) -> Any:
    """The output of an attention layer with what its adapters add.

    Args:
        run: computes the layer with these products; plain: the host's own way, without any.
    """
    on = [layer for layer in layers if layer.strength.value != 0]
    started = [layer for layer in on if not layer.is_identity()]
    if len(started) == len(on) or not torch.is_grad_enabled():
        return run(started) if started else plain()
    # A new adapter is trained from exactly the base model: its values, the gradients of the widened attention.
    with torch.no_grad():
        values = run(started) if started else plain()
    outputs = run(on)
    if isinstance(outputs, Tensor):
        return values + (outputs - outputs.detach())
    return tuple(v + (o - o.detach()) for v, o in zip(values, outputs, strict=True))


def derived(base: Any, mixin: type) -> type:
    """``base`` with methods of ``mixin`` before its own, under its own name: what a host looks up stays true."""
    return _derived(base, mixin)


@functools.cache
def _derived(base: type, mixin: type) -> type:
    return type(base.__name__, (mixin, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})


def change_class(module: nn.Module, cls: type) -> None:
    """Give a module another class; a ``forward`` that Accelerate's hooks have bound to it follows."""
    old, own = type(module), module.__dict__
    module.__class__ = cls
    for key in ("forward", "_old_forward"):
        if getattr(own.get(key), "__func__", None) is cast(Any, old).forward:
            own[key] = types.MethodType(cast(Any, cls).forward, module)


def original_class(module: nn.Module, mixin: type) -> type:
    """The class that a module had before :func:`derived`."""
    cls = type(module)
    return cls.__mro__[2] if issubclass(cls, mixin) else cls
