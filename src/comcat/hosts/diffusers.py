"""Attention layers of diffusers models: which can take products, and how these get in and out.

No class is known by its name. A layer's own forward is looked at on a stand-in (:mod:`comcat.hosts.meeting_structure`),
what was seen is held against Eq. 8 in float64 (:mod:`comcat.hosts.added_proof`), and the same forward then runs with
the products (:mod:`comcat.hosts.meeting`). Layers of one structure share one look.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn

from ..errors import ModelError
from ..layers.heads import Heads
from ..nn.added import AddedLayer, run_layers
from ..nn.carries import Carries, carry, drop
from ..nn.derived import original_class
from ..nn.projections import HeadOutput, HeadProjection
from .addable import AddableAttention, Kind, Refusal
from .added_proof import Proof, prove
from .attention_replica import is_linear
from .meeting import AddedPass, Meeting
from .meeting_structure import probed
from .seam import Seam


class KeepsProducts(Carries):
    """Mixin for an attention module. Its own forward runs, with products where queries and keys meet."""

    place: str  # its name in its model
    meeting: Meeting
    seam: Seam

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = cast(Any, self)
        plain = super().forward  # type: ignore[misc]
        return run_layers(
            [cast(AddedLayer, layer) for layer in module.extras.values()],
            lambda layers: module.seam.run(AddedPass(module.meeting, layers), module, args, kwargs),
            lambda: plain(*args, **kwargs),
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Another processor (attention slicing, xFormers) runs the products too, or is refused."""
        if name != "processor":
            super().__setattr__(name, value)
            return
        meeting = check_processor(self, value)
        super().__setattr__(name, value)
        self.meeting, self.seam = meeting, _seam(self)

    def fuse_projections(self, *args: Any, **kwargs: Any) -> None:
        raise ModelError(
            f"the projections of a layer with the products of {', '.join(self.extras)} cannot be fused; remove these "
            "adapters first, or do without fused projections"
        )

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        if not prefix.endswith(f"{self.place}."):  # a part of the model alone, for another model
            warnings.warn(
                f"weights are copied out of a model that carries {', '.join(self.extras)}: they are the base's alone. "
                "Load the adapter on the new model too where it is meant to draw with it",
                stacklevel=2,
            )
        return super().state_dict(*args, prefix=prefix, **kwargs)  # type: ignore[misc]


def _seam(module: Any) -> Seam:
    return Seam(original_class(module, KeepsProducts), getattr(module, "processor", None))


def check_processor(module: KeepsProducts, processor: Any) -> Meeting:
    """Where queries and keys meet with another processor; ModelError where the products cannot be run there."""
    held = cast(Any, module)
    before = _described(held.place, held)
    after = _described(held.place, held, processor)
    both = isinstance(before, AddableAttention) and isinstance(after, AddableAttention)
    if both and before.signature() == after.signature():  # type: ignore[union-attr]
        return cast(Meeting, after.meeting)  # type: ignore[union-attr]
    raise ModelError(
        f"{type(processor).__name__} would replace the products of {', '.join(held.extras)}, and cannot run "
        "them; remove these adapters first, or do without it"
    )


def guard(model: Any) -> None:
    """While layers carry products, processors are set on all layers of a model or on none."""
    if not any(isinstance(module, KeepsProducts) for module in model.modules()):
        model.__dict__.pop("set_attn_processor", None)
    elif hasattr(model, "set_attn_processor") and "set_attn_processor" not in model.__dict__:
        model.set_attn_processor = functools.partial(_set_attn_processor, model)


def _set_attn_processor(model: Any, processor: Any, *args: Any, **kwargs: Any) -> None:
    for name, module in model.named_modules():
        if isinstance(module, KeepsProducts):
            given = processor.get(f"{name}.processor") if isinstance(processor, dict) else processor
            if given is not None:
                check_processor(module, given)
    type(model).set_attn_processor(model, processor, *args, **kwargs)


def addable_layers(model: nn.Module) -> Iterator[tuple[str, AddableAttention | Refusal]]:
    """(name, description, or why nothing can be added) of every attention layer."""
    for name, module in model.named_modules():
        if _is_attention(module):
            yield name, _described(name, module)


def _is_attention(module: nn.Module) -> bool:
    if isinstance(module, (Attention, AttentionModuleMixin)):
        return True
    return "Attention" in type(module).__name__ and hasattr(module, "processor")


def _crossing(name: str, module: Any) -> bool:
    """Whether a layer takes its keys from elsewhere, as it says itself, or its name does."""
    return bool(getattr(module, "is_cross_attention", "cross" in name.rpartition(".")[2]))


def _described(name: str, attn: Any, processor: Any = None) -> AddableAttention | Refusal:
    processor = getattr(attn, "processor", None) if processor is None else processor
    crossing = _crossing(name, attn)
    found = looked_at(attn, processor, crossing)[0]
    if isinstance(found, str):
        joint = getattr(attn, "added_kv_proj_dim", None) is not None or getattr(attn, "pre_only", False)
        kind: Kind = "joint" if joint else "cross" if crossing else "self"
        what = original_class(attn, KeepsProducts).__name__
        what += "" if processor is None else f" with {type(processor).__name__}"
        return Refusal(kind, f"{what}: {found}", processor is None or _is_hosts_own(processor))
    joint = len(found.streams) > 1 or found.inner or found.parallel
    kind = "joint" if joint else "cross" if crossing or found.context else "self"
    unfolded, heads = _unfolded(attn, found), _dense_heads(attn, found)
    return AddableAttention(name, attn, kind, heads, found.streams, found.normalized, unfolded, found)


def _dense_heads(attn: Any, meeting: Meeting) -> Heads:
    """Those of the dense layer, also where it has been compressed: what is added does not depend on its factors."""
    widths = {"query": meeting.heads.width, "value": meeting.heads.value_width}
    for one in meeting.streams[0].inputs:
        linear = attn.get_submodule(one.path)
        if isinstance(linear, HeadProjection):
            widths |= dict(zip(one.roles, linear.full, strict=True))
    return Heads(meeting.heads.num, widths["query"], meeting.heads.groups, widths["value"])


def _unfolded(attn: Any, meeting: Meeting) -> str:
    """Why no matrix of each head's query, key, value and output can be told, or nothing."""
    heads = meeting.heads
    if any(isinstance(module, (HeadProjection, HeadOutput)) for module in attn.modules()):
        return "its heads have been compressed"
    if any(len(stream.inputs) < 3 for stream in meeting.streams):
        return "its projections are fused into one"
    if meeting.shaped:
        return "something lies between its heads and their output projection"
    widths = [(s.key, heads.num * heads.width) for s in meeting.streams]
    widths += [(s.value, heads.num * heads.value_width) for s in meeting.streams]
    if any(attn.get_submodule(path).out_features != width for path, width in widths):
        return "several of its heads share keys and values"
    return ""


def _is_hosts_own(processor: Any) -> bool:
    """Whether a processor is the model's, not one that somebody has loaded into it or written."""
    if isinstance(processor, nn.Module) and next(processor.parameters(), None) is not None:
        return False
    return type(processor).__module__.startswith("diffusers.")


def proof_of(attention: AddableAttention) -> Proof:
    """The differences by which a layer was proven."""
    module: Any = attention.module
    found = looked_at(module, getattr(module, "processor", None), _crossing(attention.name, module))[1]
    assert found is not None
    return found


#: What was found for a structure: it says all that the outcome depends on, so that nothing here ever gets old.
_LOOKED: dict[Any, tuple[Meeting | str, Proof | None]] = {}


def looked_at(attn: Any, processor: Any, crossing: bool) -> tuple[Meeting | str, Proof | None]:
    """Where the products of a layer go, or why there is no such place; proven once for each structure."""
    key = _structure(attn, processor, crossing)
    if key not in _LOOKED:
        _LOOKED[key] = _look(attn, processor, crossing)
    return _LOOKED[key]


def _look(attn: Any, processor: Any, crossing: bool) -> tuple[Meeting | str, Proof | None]:
    # Whatever the user has switched on, numbers are float64, on the CPU, with derivatives.
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        found = probed(attn, processor, crossing)
        if isinstance(found, str):
            return found, None
        try:
            proof = prove(found)
        except RuntimeError as error:  # shapes that do not go together
            return f"its proof does not run: {str(error).partition(chr(10))[0][:80]}", None
    return proof.reason() or found.meeting, proof


def _structure(attn: Any, processor: Any, crossing: bool) -> Any:
    """All that can change what a layer does with its inputs: classes, numbers and switches, and the shapes of parts."""
    parts = [
        (name, original_class(part, Carries).__qualname__, _numbers(part), *_shapes(part))
        for name, part in attn.named_modules()
    ]
    own = (type(processor), _numbers(processor)) if processor is not None else ()
    return original_class(attn, KeepsProducts), crossing, own, tuple(parts)


def _numbers(thing: Any) -> tuple[Any, ...]:
    plain = (bool, int, float, str, type(None))
    skipped = ("training", "place")
    found = vars(thing).items()
    return tuple((k, v) for k, v in found if isinstance(v, plain) and k not in skipped and not k.startswith("_"))


def _shapes(part: Any) -> tuple[Any, ...]:
    if is_linear(part):
        return (part.in_features, part.out_features, getattr(part, "bias", None) is None)
    return tuple((key, None if t is None else tuple(t.shape)) for key, t in part._parameters.items())


def attach(attention: AddableAttention, name: str, layer: AddedLayer) -> None:
    """Put the products of adapter ``name`` into an attention layer."""
    attn: Any = attention.module
    first = not isinstance(attn, KeepsProducts)
    carry(attn, KeepsProducts, name, layer)
    if first:
        attn.place = attention.name
        attn.meeting, attn.seam = attention.meeting, _seam(attn)


def detach(module: nn.Module, name: str) -> None:
    """Take adapter ``name`` out again; after the last one the layer is what it was."""
    attn: Any = module
    drop(attn, KeepsProducts, name)
    if not isinstance(attn, KeepsProducts):
        del attn.place, attn.meeting, attn.seam
