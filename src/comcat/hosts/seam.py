"""What the attention hosts of diffusion models share: how a layer is described, and how products get into it."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..nn.added import AddedLayer, AddedProduct, Strength

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
        query = self.linear(self.streams[0].query)
        device = place(query)
        streams = {
            stream.name: AddedProduct(
                *self.dims(stream),
                self.num_heads,
                rank,
                f"{stream.name}.query" in biases,
                f"{stream.name}.key" in biases,
                f"{stream.name}.value" in biases,
                device=device,
                dtype=dtype or precision(query),
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
    """Give a module another class; a ``forward`` that Accelerate's or diffusers' hooks have bound to it follows."""
    old, own = type(module), module.__dict__
    module.__class__ = cls

    def rebound(forward: Any) -> Any:
        ours = getattr(forward, "__func__", None) is cast(Any, old).forward
        return types.MethodType(cast(Any, cls).forward, module) if ours else forward

    for key in ("forward", "_old_forward"):
        if key in own:
            own[key] = rebound(own[key])
    for call in getattr(own.get("_diffusers_hook"), "_fn_refs", ()):
        call.forward, call.original_forward = rebound(call.forward), rebound(call.original_forward)


def original_class(of: Any, mixin: type) -> Any:
    """The class that a module or tokenizer had before :func:`derived`."""
    cls = type(of)
    return cls.__bases__[1] if issubclass(cls, mixin) else cls


def place(module: nn.Module) -> torch.device:
    """Where a layer computes, also while Accelerate keeps its weights elsewhere."""
    hook: Any = getattr(module, "_hf_hook", None)
    tensors = [*module.parameters(), *module.buffers()]
    if tensors and tensors[0].is_meta and getattr(hook, "execution_device", None) is not None:
        return torch.device(cast(Any, hook).execution_device)
    return tensors[0].device if tensors else torch.get_default_device()


def values(root: nn.Module, module: nn.Module, name: str) -> Tensor:
    """A tensor of ``module`` inside ``root``, also while Accelerate or diffusers keep what it holds elsewhere."""
    tensor = cast(Tensor, getattr(module, name))
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        kept = getattr(one, "weights_map", None)
        if tensor.is_meta and kept is not None:
            return cast(Tensor, kept[name])
    for part in root.modules():  # group offloading to disk leaves uninitialized memory behind
        registry: Any = getattr(part, "_diffusers_hook", None)
        offloading = None if registry is None else registry.get_hook("group_offloading")
        group: Any = getattr(offloading, "group", None)
        if getattr(group, "_is_offloaded_to_disk", False) and tensor in group.tensor_to_key:
            # Written by diffusers in this process: nothing from outside, and one tensor of many is wanted.
            with safe_open(group.safetensors_file_path, "pt") as file:
                return cast(Tensor, file.get_tensor(group.tensor_to_key[tensor]))
    return tensor


def precision(module: nn.Module) -> torch.dtype:
    """In which dtype a layer computes: its weight's own, unless that is a form of storage (8 bit, packed 4 bit)."""
    if not _stored(weight := getattr(module, "weight", None)):
        return cast(Tensor, weight).dtype
    registry: Any = getattr(module, "_diffusers_hook", None)
    casting = None if registry is None else registry.get_hook("layerwise_casting")
    for dtype in (getattr(casting, "compute_dtype", None), getattr(module, "compute_dtype", None)):
        if dtype is not None:
            return cast(torch.dtype, dtype)
    bias = getattr(module, "bias", None)
    return torch.float32 if _stored(bias) else cast(Tensor, bias).dtype


def _stored(tensor: Any) -> bool:
    return not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype.itemsize < 2


class Carries:
    """Mixin for a module of the host: ``extras``, name -> what it carries, a module each.

    They move and are converted with the host, but are none of its submodules: what copies, saves, stores in 8 bit or
    offloads the host's tensors finds the base model alone. They are never stored in fewer than 16 bits.
    """

    extras: dict[str, Any]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def wide(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return tensor.to(found.device) if found.dtype.itemsize < 2 else found

        super()._apply(fn, recurse)  # type: ignore[misc]
        for extra in self.extras.values():
            extra._apply(wide)
        return self

    def train(self, mode: bool = True) -> Any:
        super().train(mode)  # type: ignore[misc]
        for extra in self.extras.values():
            extra.train(mode)
        return self


def carry(module: nn.Module, mixin: type[Carries], name: str, extra: nn.Module) -> None:
    """Let ``module`` carry ``extra``; the first one changes its class."""
    own: Any = module
    if not isinstance(module, mixin):
        own.extras = {}
        change_class(module, derived(type(module), mixin))
    extra.train(module.training)
    own.extras[name] = extra


def drop(module: nn.Module, mixin: type[Carries], name: str) -> None:
    """Take ``name`` out again; after the last one the module is what it was."""
    own: Any = module
    del own.extras[name]
    if not own.extras:
        change_class(module, original_class(module, mixin))
        del own.extras
