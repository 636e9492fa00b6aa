"""One thin file per ecosystem: finds the layers of a model and builds their low-rank stand-ins.

A host never copies a model's forward; it swaps attention and FFN modules and says what it leaves dense.
"""

from __future__ import annotations

from torch import nn

from ..errors import ModelError
from ..layers.base import Inventory
from ..wording import some
from . import changed, timm


def find_layers(model: nn.Module) -> Inventory:
    """All layers of ``model``.

    Raises:
        ModelError: there is none; the message lists what was looked at.
    """
    inventory = timm.find_layers(model)
    if not inventory.layers:
        raise ModelError(_nothing(model, inventory))
    return inventory


def _nothing(model: nn.Module, inventory: Inventory) -> str:
    seen = sorted({f"{d.cls} ({d.reason})" for d in inventory.dense if "." in d.name})
    left = f". Left dense: {some(seen, '; ')}" if seen else ""
    if any("already low-rank" in d.reason for d in inventory.dense):
        return f"every layer of this {type(model).__name__} that comcat can reduce is {changed.ALREADY}"
    library = next((name for name, what in _LIBRARIES.items() if type(model).__module__.startswith(name)), None)
    advice = (
        ""
        if library is None
        else (
            f". This is a model of {_LIBRARIES[library]}: build the same architecture with timm.create_model and "
            "convert the weights to it"
        )
    )
    return (
        f"{type(model).__name__} has no layer that comcat can compress exactly; it knows timm models built on "
        f"Attention + Mlp and Swin v1{advice}{left}"
    )


#: Libraries whose models are often brought along, by the beginning of their modules' names.
_LIBRARIES = {
    "torchvision.": "torchvision",
    "transformers.": "transformers",
    "open_clip.": "open_clip",
    "diffusers.": "diffusers, which comcat.customize adapts but does not compress",
}
