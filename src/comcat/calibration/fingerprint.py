"""A sketch of a model's weights, from which the distance to another model's weights can be told.

Every parameter w is multiplied by random signs and summed into 64 buckets, S(w). S is linear and keeps lengths:
``E |S(w) - S(v)|² = |w - v|²`` with a relative standard deviation of sqrt(2 / 64) (the sketch of Charikar, Chen and
Farach-Colton, 2002, with bucket = index mod 64). The signs come from a generator whose stream is frozen, and sums are
those of float64, so that dtype, device and threads change no more than rounding does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..layers.base import Inventory

BUCKETS = 64
OTHERS = "the parameters outside the layers that are compressed"
#: Parameter name -> (65,) float64: the sketch, and the squared length.
Fingerprint = dict[str, Tensor]


class Distance(NamedTuple):
    """Length of the difference over the length of the weights, of the layer where it is largest."""

    relative: float
    layer: str


def fingerprint(model: nn.Module) -> Fingerprint:
    """The sketches of all parameters, on the CPU."""
    signs: dict[int, Tensor] = {}
    found: Fingerprint = {}
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten().cpu()
        if len(flat) not in signs:
            bits = np.random.RandomState(0).randint(0, 2, len(flat), dtype=np.int8)
            signs[len(flat)] = torch.from_numpy(2 * bits - 1)
        flat = flat.double()
        square = flat.square().sum()
        flat = nn.functional.pad(flat * signs[len(flat)], (0, -len(flat) % BUCKETS))
        found[name] = torch.cat([flat.view(-1, BUCKETS).sum(0), square[None]])
    return found


def distance(of: Mapping[str, Tensor], model: nn.Module, inventory: Inventory) -> Distance:
    """How far the weights of ``model`` are from those that ``of`` is the fingerprint of.

    Parameters that only one of the two has are left out: layers may have been replaced since.
    """
    layers = {id(parameter): layer.name for layer in inventory.layers for parameter in layer.module.parameters()}
    owners = {name: layers[id(parameter)] for name, parameter in model.named_parameters() if id(parameter) in layers}
    now = fingerprint(model)
    differences: dict[str, float] = {}
    lengths: dict[str, float] = {}
    for name, sketch in now.items():
        if name not in of or of[name].shape != sketch.shape:
            continue
        owner = owners.get(name, OTHERS)
        before = of[name]
        differences[owner] = differences.get(owner, 0) + float((sketch - before)[:-1].square().sum())
        lengths[owner] = lengths.get(owner, 0) + max(float(before[-1]), float(sketch[-1]))
    found = [Distance((differences[o] / max(lengths[o], 1e-300)) ** 0.5, o) for o in differences]
    return max(found, default=Distance(0.0, OTHERS))
