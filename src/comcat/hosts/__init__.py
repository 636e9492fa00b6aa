"""What of a model can be compressed: layers of known classes, and layers recognised by their parts and proven.

A host never copies a model's forward; it swaps attention and FFN modules, or their projections, and says what it leaves
dense. A class that has a faster stand-in of its own is one entry of :data:`KNOWN`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..errors import ModelError
from ..layers.base import Inventory, Layer, LeftDense
from ..layers.classifier import ClassifierLayer
from ..nn import SMALL
from ..wording import some
from . import timm
from .changed import ALREADY, Sharing, changed
from .classifiers import classifiers
from .ffn_proof import CONVOLUTIONS
from .proof import prove
from .structure import structures

#: Layers of classes with a stand-in of their own: (name, module) to the layer, why it is none, or None.
KNOWN: list[Callable[[str, nn.Module], Layer | str | None]] = [timm.layer_of]


def find_layers(model: nn.Module) -> Inventory:
    """All layers of ``model``, in the order of ``model.named_modules()``, which is that of the forward pass.

    Layers that were recognised by their parts are not proven yet; :func:`proven_layers` runs the model for that.
    A module with several names is one layer, under the first of them. A layer whose weights also belong to another
    stays dense.

    Raises:
        ModelError: there is none; the message lists what was looked at.
    """
    shared = Sharing(model)
    found: dict[str, Layer] = {}
    reasons: dict[str, str] = {}
    taken: set[int] = set()
    for name, module in model.named_modules():
        layer = next((one for known in KNOWN if (one := known(name, module)) is not None), None)
        if isinstance(layer, str):
            reasons[name] = layer
            taken |= {id(part) for part in module.modules()}
        elif layer is not None:
            found[name] = layer
            taken |= {id(part) for part in module.modules()}
    heads = {name: module for name, module in classifiers(model) if id(module) not in taken}
    more, why = structures(model, taken, {id(module) for module in heads.values()})
    reasons |= why
    inside = {id(one) for layer in more.values() for one in layer.originals().values()}
    heads = {name: module for name, module in heads.items() if id(module) not in inside}
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    layers: list[Layer] = []
    for name, layer in sorted([*found.items(), *more.items()], key=lambda item: order[item[0]]):
        own = [] if layer.running is layer.module else [layer.module]
        reason = shared.reason(layer.module, [*own, *layer.originals().values()])
        if reason:
            reasons[name] = reason
        else:
            layers.append(layer)
    for name, linear in heads.items():
        reason = changed(linear) or shared.reason(linear, [linear])
        if reason:
            reasons[name] = reason
        else:
            layers.append(ClassifierLayer(name, linear))
    inventory = Inventory(layers, _dense(model, layers, reasons))
    if not layers:
        raise ModelError(_nothing(model, inventory))
    return inventory


def proven_layers(model: nn.Module, size: Sequence[int], example: Any = None) -> Inventory:
    """The layers of ``model`` as far as they compute what they were taken to compute, to rounding.

    Args:
        size: (C, H, W) of the images that the model is run on.
        example: what it is called with instead; see :func:`comcat.models.example.given_example`.

    Raises:
        ModelError: there is none, or the model does not run on images of this size.
    """
    found = find_layers(model)
    layers, failed = prove(model, found.layers, size, example)
    inventory = Inventory(layers, _dense(model, layers, {entry.name: entry.reason for entry in found.dense} | failed))
    if not layers:
        raise ModelError(_nothing(model, inventory))
    return inventory


def _dense(model: nn.Module, layers: Sequence[Layer], reasons: dict[str, str]) -> list[LeftDense]:
    """Parts of layers, and modules that own linear layers which belong to no layer, one entry each."""
    dense = [
        LeftDense(f"{layer.name} ({part})", type(layer.module).__name__, why)
        for layer in layers
        if layer.kind == "attention" or layer.conclusion is not None
        for part, why in layer.dense_parts.items()
    ]
    whole = {layer.name for layer in layers}
    covered = {id(linear) for layer in layers for linear in layer.originals().values()}
    owners: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) not in covered:
            owner = name if name in reasons else name.rpartition(".")[0] or name
            while owner not in reasons and "." in owner and _is_part(model.get_submodule(owner)):
                owner = owner.rpartition(".")[0]
            owners[owner] = model.get_submodule(owner)
    for name, module in model.named_modules():  # such as hold convolutions alone
        if reasons.get(name, CONVOLUTIONS) != CONVOLUTIONS:
            owners.setdefault(name, module)
    rest = [
        LeftDense(name, type(module).__name__, reasons.get(name) or _reason(module)) for name, module in owners.items()
    ]
    return dense + [entry for entry in rest if entry.name not in whole]


def _is_part(module: nn.Module) -> bool:
    """Whether its linear layers are listed under the layer that it is a part of."""
    parts = ("LowRankLinear", "HeadProjection", "HeadOutput", "ParametrizedLinear", "ParametrizationList", "ModuleDict")
    return type(module).__name__ in parts


def _reason(module: nn.Module) -> str:
    return ALREADY if isinstance(module, SMALL) else "not a layer that comcat knows to factor"


def _nothing(model: nn.Module, inventory: Inventory) -> str:
    seen = sorted({f"{d.cls} ({d.reason})" for d in inventory.dense if "." in d.name})
    left = f". Left dense: {some(seen, '; ')}" if seen else ""
    if any("already low-rank" in d.reason for d in inventory.dense):
        return f"every layer of this {type(model).__name__} that comcat can reduce is {ALREADY}"
    return (
        f"{type(model).__name__} has no layer that comcat can compress exactly: no attention, FFN or classifier{left}"
    )
