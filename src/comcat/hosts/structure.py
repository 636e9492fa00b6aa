"""Layers of any model, recognised by their parts; what they are has to be proven (:mod:`comcat.hosts.proof`)."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ..layers.base import Layer
from ..nn import SMALL
from .attention_proof import prove_attention
from .attention_structure import attention_of
from .ffn_proof import prove_ffn
from .ffn_structure import ffn_of


def structures(
    model: nn.Module, taken: Collection[int], heads: Collection[int] = ()
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Layers by name that have to be proven, and why others that look like them are none.

    Args:
        taken: identities of linear layers that belong to layers already known.
        heads: of classifiers, which belong to an attention that pools the image where they are its output projection.
    """
    layers: dict[str, Layer] = {}
    reasons: dict[str, str] = {}
    owned = set(taken)
    for module in model.modules():
        if isinstance(module, SMALL):  # what comcat has made is no layer again
            owned |= {id(part) for part in module.modules()}
    for name, module in model.named_modules():
        found = None if id(module) in owned else attention_of(name, module)
        if isinstance(found, str):
            reasons[name] = found
        elif found is not None and not owned & {id(linear) for linear in found.originals().values()}:
            found.proof = prove_attention
            layers[name] = found
            owned |= {id(part) for part in module.modules()}
    for name in reasons:  # what belongs to a layer that stays as it is belongs to no other
        owned |= {id(module) for module in model.get_submodule(name).modules()}
    owned |= set(heads)
    deepest = sorted(model.named_modules(), key=lambda item: -item[0].count(".") if item[0] else 1)
    for name, module in deepest:
        ffn = ffn_of(name, module, owned) if name and id(module) not in owned else None
        if isinstance(ffn, str):
            reasons[name] = ffn
        elif ffn is not None:
            ffn.proof = prove_ffn
            layers[name] = ffn
            owned |= {id(linear) for linear in ffn.linears.values()}
    return layers, reasons
