"""An ordinary LoRA as added products, with the error of every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, ModelError
from ...hosts.addable import AddableAttention
from ...layers.heads import flatten_heads
from ...models.running import double
from ...storage.reader import FLOAT8, PLAIN, read_tensors
from ...wording import some
from ..adapter.attached import Adapter, attach, new_adapter
from ..adapter.components import components, find_addable
from .algebra import LoraWeights, lora_to_product
from .exporting import Conversion, LayerError
from .forms import PRODUCTS, Form, ProductName, form_of, has_key_biases, update_of
from .keys import is_pefts_own, read_lora
from .lora_config import config_beside


def import_lora(
    pipe: Any,
    path: str | Path,
    *,
    rank: int,
    name: str = "lora",
    scale: float = 1.0,
    partial: bool = False,
    lora_alpha: float | None = None,
) -> tuple[Adapter, Conversion]:
    """Put an ordinary LoRA on a pipeline as added products of ``rank`` per head.

    Exact where the rank reaches twice the LoRA's; otherwise the nearest in the Frobenius norm of each product.
    Strengths are then those of adapters: unlike a LoRA's, the scores are linear in them.

    Args:
        partial: leave out what added products cannot express (feed-forward layers, convolutions, queries and keys that
            are normalized); without it, such a file is refused.
        lora_alpha: of a file that does not say what its alpha is, nor has an ``adapter_config.json`` beside it.

    Raises:
        CheckpointError: no LoRA, one of another model, one whose alpha nothing states, or, without ``partial``, parts
            that cannot be expressed.
        ModelError: the rank is below 1 or above a head width; the name is taken.
    """
    if rank < 1:
        raise ModelError(f"the rank is {rank}, but must be a whole number from 1 to the head width")
    if lora_alpha is not None and not (math.isfinite(lora_alpha) and lora_alpha):
        raise ModelError(f"lora_alpha is {lora_alpha}, but must be a finite number other than 0")
    metadata, tensors = read_tensors(path, dtypes=PLAIN | FLOAT8)
    models = components(pipe)
    modules = {c: dict(m.named_modules()) for c, m in models.items()}
    beside = config_beside(Path(path)) if any(is_pefts_own(key, tensors) for key in tensors) else None
    lora = read_lora(tensors, modules, metadata, config=beside, lora_alpha=lora_alpha)
    left_out = list(lora.unmatched)
    handle = new_adapter(pipe, name, scale)
    errors: list[LayerError] = []
    for component, found in lora.factors.items():
        model = models[component]
        found = {
            key.removeprefix("text_model."): _fitting(f"{component}.{key}", modules[component][key], *pair)
            for key, pair in found.items()
        }
        used: set[str] = set()
        for attention in find_addable(component, model)[0].values():
            if attention.unfolded:  # what changes its weights is told with the rest that has no place
                continue
            used |= _import_layer(handle, component, attention, model, found, rank, errors, left_out)
        left_out += [f"{component}.{key}" for key in found if key not in used]
    if left_out and not partial:
        raise CheckpointError(
            f"'{path}' changes what added products cannot express: {some(left_out)} ({len(left_out)} in all); take "
            "the rest alone with --partial"
        )
    if not handle.layers:
        raise CheckpointError(f"'{path}' changes no attention layer of this model")
    handle.requires_grad_(False)
    attach(handle)
    return handle, Conversion(errors, left_out, lora.notes)


def _fitting(name: str, module: Any, down: Tensor, up: Tensor) -> LoraWeights:
    """Factors of a layer's own shape; those of a linear layer may be stored as 1 x 1 convolutions."""
    if isinstance(module, nn.Linear):
        down, up = down.flatten(1), up.flatten(1)
    shapes = [
        (getattr(module, f"{way}_features", None), getattr(module, f"{way}_channels", None)) for way in ("in", "out")
    ]
    for found, wanted in zip((down.shape[1], up.shape[0]), shapes, strict=True):
        size = wanted[0] if wanted[0] is not None else wanted[1]
        if size is not None and found != size and getattr(module, "groups", 1) == 1:
            raise CheckpointError(
                f"the factors of {name} are for a layer of {down.shape[1]} inputs and {up.shape[0]} outputs, not for "
                "this one; the LoRA was made for another base model"
            )
    return LoraWeights(down, up)


def _import_layer(
    handle: Adapter,
    component: str,
    attention: AddableAttention,
    model: nn.Module,
    found: Mapping[str, LoraWeights],
    rank: int,
    errors: list[LayerError],
    left_out: list[str],
) -> set[str]:
    """Add a layer's products if the LoRA touches it; the paths that this used."""
    results: dict[ProductName, tuple[Form, Tensor, Tensor]] = {}
    used: set[str] = set()
    for part in PRODUCTS:
        form = form_of(attention, model, part, key_bias=part == "qk" and has_key_biases(attention))
        paths = {b.path for b in form.left_blocks + form.right_blocks} & set(found)
        if not paths:
            continue
        if part == "qk" and attention.normalized:
            left_out.append(
                f"{component}.{attention.name}: queries and keys, which are normalized before their product"
            )
            used |= paths
            continue
        left = update_of(form.left_blocks, found, form.left)
        right = update_of(form.right_blocks, found, form.right)
        product = lora_to_product(form.left, left, form.right, right, rank)
        used |= paths
        effect = float(product.singular_values.norm())
        error = float((product.error * product.singular_values.norm(dim=-1)).norm())
        errors.append(LayerError(component, attention.name, part, error / effect if effect else 0.0, effect))
        results[part] = (form, product.left_added, product.right_added)
    if results:
        if rank > (width := attention.heads.width):
            raise ModelError(f"rank {rank} is above the head width {width} of '{attention.name}'; use at most {width}")
        biased = {b.path for form, _, _ in results.values() for b in form.left_blocks + form.right_blocks if b.bias}
        kinds = [(s, kind) for s in attention.streams for kind in ("query", "key", "value")]
        biases = [f"{s.name}.{kind}" for s, kind in kinds if f"{attention.name}.{getattr(s, kind)}" in biased]
        layer = attention.new_layer(rank, handle.strength, biases)
        for stream in layer.streams.values():
            for parameter in stream.parameters():
                nn.init.zeros_(parameter)
        for part, (form, left_added, right_added) in results.items():
            _fill(attention, model, layer, part, form, left_added, right_added)
        handle.layers[component, attention.name] = layer
    return used


@torch.no_grad()
def _fill(
    attention: AddableAttention,
    model: nn.Module,
    layer: Any,
    part: ProductName,
    form: Form,
    left: Tensor,
    right: Tensor,
) -> None:
    """Copy per-head factors (H, D, r) into the linear layers of the products."""
    names = ("query", "key") if part == "qk" else ("value", "output")
    lefts = dict(zip([s.name for s in attention.streams], form.left_blocks, strict=True))
    owners = [s for s in attention.streams if part == "qk" or attention.output(s, model)]
    for stream, block in lefts.items():
        linear = getattr(layer[stream], names[0])
        linear.weight.copy_(flatten_heads(left[:, block.start : block.start + block.rows].mT))
        if block.bias:
            linear.bias.copy_(left[:, block.start + block.rows].flatten())
    for owner, block in zip(owners, form.right_blocks, strict=True):
        rows = right[:, block.start : block.start + block.rows]  # (H, D, r)
        linear = getattr(layer[owner.name], names[1])
        if part == "qk":
            linear.weight.copy_(flatten_heads(rows.mT))
            if block.bias:
                linear.bias.copy_(right[:, block.start + block.rows].flatten())
            continue
        weight = rows.movedim(0, 1).flatten(1)  # (D_out, H r)
        if owner.inner:  # it goes through the block's projection: undo that
            projection = double(attention.weights(owner, model).output).flatten(0, 1)  # (H d, D_out)
            weight = torch.linalg.lstsq(projection.mT, weight).solution
        linear.weight.copy_(weight)
