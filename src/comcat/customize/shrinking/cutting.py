"""An adapter with fewer components, in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...linalg.products import norm
from ...models.running import double
from ..adapter.attached import Adapter, attach, remove_adapter
from ..adapter.components import components, find_addable
from ..files.layer_factors import PARTS, by_layer, set_side, sides, trimmed
from .choosing import Choice
from .worth import Key, Worth


@torch.no_grad()
def cut(handle: Adapter, worths: Mapping[Key, Worth], choice: Choice) -> None:
    """Turn the components as they were measured, and set those that are not kept to zero on both sides.

    Both sides zero is a place that gradients do not leave: what is cut stays cut in further training, and shapes stay
    what they are. Left columns keep their mean size, on which the learning rate depends.
    """
    state = handle.state_dict()
    for (component, layer), added in handle.layers.items():
        own: dict[str, Tensor] = by_layer(state, component, layer)
        for part, kinds in PARTS.items():
            found, kept = worths[component, layer, part], choice[component, layer, part]
            left, right = (double(t) for t in sides(own, part, added.rank))
            size = norm(left) / added.rank**0.5
            left, right = left @ found.left.to(left), right @ found.right.to(right)
            lengths = torch.linalg.vector_norm(left, dim=1, keepdim=True)
            scale = torch.where((lengths > 0) & (size > 0), size / lengths.clamp_min(1e-300), 1.0)
            mask = kept.to(left.device)[:, None]
            for kind, matrix in zip(kinds, (left * scale * mask, right / scale * mask), strict=True):
                set_side(own, kind, matrix, added.rank)
        for name, tensor in own.items():
            state[f"{component}.{layer}.{name}"].copy_(tensor)


@torch.no_grad()
def trim(handle: Adapter) -> None:
    """Make layers as narrow as their largest head, and take those that do nothing off; the token stays."""
    state = handle.state_dict()
    models = components(handle.pipe)
    attentions = {component: find_addable(component, models[component])[0] for component in handle.ranks}
    layers = {}
    for (component, name), layer in handle.layers.items():
        own, kept = trimmed(by_layer(state, component, name), layer.rank)
        rank = int(torch.stack(list(kept.values())).max())
        if not rank:
            continue
        biases = [key.removesuffix(".bias") for key in own if key.endswith(".bias")]
        dtype = next(iter(own.values())).dtype
        new = attentions[component][name].new_layer(rank, handle.strength, biases, dtype)
        for key, parameter in new.streams.named_parameters():
            parameter.copy_(own[key])
        layers[component, name] = new
    mask = handle.mask
    remove_adapter(handle.pipe, handle.name)
    handle.layers = layers
    attach(handle)
    handle.mask = mask
