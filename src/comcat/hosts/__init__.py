"""One thin file per ecosystem: finds the sites of a model and builds their low-rank stand-ins.

A host never copies a model's forward; it swaps attention and FFN modules and says what it leaves dense.
"""

from __future__ import annotations

from torch import nn

from ..errors import ModelError
from ..sites import Inventory
from . import timm


def find_sites(model: nn.Module) -> Inventory:
    """All sites of ``model``.

    Raises:
        ModelError: there is none; the message lists what was looked at.
    """
    inventory = timm.find_sites(model)
    if not inventory.sites:
        seen = sorted({f"{d.cls} ({d.reason})" for d in inventory.dense if "." in d.name})[:4]
        raise ModelError(
            f"{type(model).__name__} has no layer that comcat can compress exactly; it knows timm models built on "
            f"Attention + Mlp and Swin v1" + (f". Left dense: {'; '.join(seen)}" if seen else "")
        )
    return inventory
