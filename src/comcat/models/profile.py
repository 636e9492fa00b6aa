"""Parameters and multiply-accumulates of a model, per module, counted by PyTorch's own operator counter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..errors import ModelError
from ..layers.base import Inventory
from ..layers.cost import Shape
from ..layers.recording import ShapeCounter, recording
from .example import example_for, given_example
from .modes import evaluating, frozen
from .running import explained


class ModuleCost(NamedTuple):
    params: int
    macs: int


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *others: Any, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


#: PyTorch before 2.15 counts fused attention on GPUs alone: the same model would be cheaper on the CPU.
FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


@dataclass(frozen=True)
class Profile:
    """Counts for one image; ``modules`` holds every submodule, children included in their parents.

    A MAC is one multiply-add of a matrix product, convolution or attention; norms, activations and softmax are
    not counted.
    """

    params: int
    macs: int
    input_size: tuple[int, ...]
    modules: dict[str, ModuleCost]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"modules": {name: cost._asdict() for name, cost in self.modules.items()}}


#: What configurations of transformers call the size of an image.
_CONFIGURED = ("image_size", "input_size", "crop_size", "max_img_size")


def default_input_size(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) that the model was built for.

    What was recorded with a model of another library than timm; else the size of its patch embedding, else
    ``config.image_size`` or a like name (transformers) or ``image_size`` (torchvision, open_clip), else that of
    ``pretrained_cfg`` (timm), each of the outermost module that has one; (3, 224, 224) where none does. Of a denoiser
    of diffusers the latents of its ``config.sample_size``, of one pixel where it says no size.
    """
    made: Any = getattr(getattr(model, "comcat", None), "source", None) or getattr(model, "comcat_source", None)
    if made is not None and made.library != "timm" and len(size := _sizes(made.config.get("input_size"))) == 3:
        return (size[0], size[1], size[2])
    if type(model).__module__.startswith("diffusers."):
        config: Any = getattr(model, "config", None) or {}
        size = _sizes(config.get("sample_size")) or (1,)
        return (next(iter(_sizes(config.get("in_channels"))), 1), size[0], size[-1])
    modules = list(model.modules())
    embeds: list[Any] = [
        one for one in (getattr(module, "patch_embed", None) for module in modules) if isinstance(one, nn.Module)
    ]
    # Images enter by the first convolution of a patch embedding, of its stem or backbone; stages inside have others.
    outer = [one for one in modules if isinstance(one, nn.Conv2d)][:1]
    inside = [one for one in (embeds[0].modules() if embeds else ()) if isinstance(one, nn.Conv2d)][:1]
    channels = inside[0].in_channels if inside and inside == outer else 3
    for embed in embeds:
        if len(size := _sizes(getattr(embed, "img_size", None))) in (1, 2):
            return (channels, size[0], size[-1])
    for config, name in product([getattr(module, "config", None) for module in modules], _CONFIGURED):
        if len(size := _sizes(getattr(config, name, None))) in (1, 2):
            return (getattr(config, "num_channels", channels), size[0], size[-1])
    for module in modules:
        if len(size := _sizes(getattr(module, "image_size", None))) in (1, 2):
            first = next((inner for inner in modules if isinstance(inner, nn.Conv2d)), None)
            return (channels if first is None else first.in_channels, size[0], size[-1])
    for config in [getattr(module, "pretrained_cfg", None) for module in modules]:
        if isinstance(config, dict) and len(size := _sizes(config.get("input_size"))) == 3:
            return (channels if channels != 3 else size[0], size[1], size[2])
    return (channels, 224, 224)


def _sizes(value: Any) -> tuple[int, ...]:
    """Pixels from a number, a pair or a triple; empty for anything else."""
    found = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(found) if all(type(n) is int and n > 0 for n in found) else ()


def image_size(size: Any) -> tuple[int, int, int]:
    """``size`` as (C, H, W).

    Raises:
        ModelError: it is anything else than three positive whole numbers.
    """
    found = _sizes(tuple(size) if isinstance(size, (tuple, list, torch.Size)) else size)
    if len(found) != 3:
        raise ModelError(f"an input size is (channels, height, width) in pixels, such as (3, 224, 224), not {size!r}")
    return (found[0], found[1], found[2])


def profile(model: nn.Module, input_size: Sequence[int] | None = None, example: Any = None) -> Profile:
    """Count parameters and MACs with one forward pass of a single image.

    Args:
        model: any module that takes (B, C, H, W); its mode is kept.
        input_size: (C, H, W), default what the model was built for.
        example: what the model is called with, where that is not images of this size alone
            (:func:`comcat.models.example.given_example`); counts are then per image of it.

    Raises:
        ModelError: the model does not run on an input of this size.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"a model is a torch.nn.Module, not {type(model).__name__}; make one with timm.create_model")
    size = image_size(input_size or default_input_size(model))
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ModelError(f"{type(model).__name__} has no parameters to count")
    shown = example_for(model, size) if example is None else given_example(example, model)
    counter = FlopCounterMode(display=False, custom_mapping=FUSED)
    # The counter trips over leaves passed as inputs.
    with explained(shown.pixels), frozen(model), counter, torch.no_grad():
        shown.run(model)
    per = 2 * shown.images
    counts = {name.partition(".")[2]: sum(ops.values()) // per for name, ops in counter.get_flop_counts().items()}
    modules = {
        name: ModuleCost(sum(p.numel() for p in module.parameters()), counts.get(name, 0))
        for name, module in model.named_modules()
        if name
    }
    return Profile(
        params=sum(p.numel() for p in model.parameters()),
        macs=counter.get_total_flops() // per,
        input_size=size,
        modules=modules,
    )


def layer_shapes(
    model: nn.Module, inventory: Inventory, input_size: Sequence[int], example: Any = None
) -> dict[str, Shape]:
    """Tokens and sequence length that one image brings to every layer, from one forward pass.

    Raises:
        ModelError: a layer that the forward pass does not reach.
    """
    shown = example_for(model, input_size) if example is None else given_example(example, model)
    counters = [ShapeCounter(layer) for layer in inventory.layers]
    for counter in counters:
        counter.images = shown.images
    with recording(model, counters), explained(shown.pixels), evaluating(model), torch.no_grad():
        shown.run(model)
    return {counter.layer.name: counter.shape(ModelError) for counter in counters}
