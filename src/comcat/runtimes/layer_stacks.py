"""Layers at many widths as small models of their own, to be timed where the whole model will run.

    x ── layer ──(+)── layer ──(+)──            two layers at one width, each with the residual around it
     └────────────┘└────────────┘

Two in a row, so that what a session does once (taking the input, giving the output) is a small share, and so that what
a runtime fuses around a layer is fused here too. What is left of it is the same at every width and falls out of the
differences, which are all that a plan goes by. The second layer has weights of its own, as in the model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..layers.base import Choice, Layer
from ..models.example import example_for
from ..models.modes import copied, evaluating
from ..models.running import explained, still, tensors_in
from ..prepared import Prepared
from .registry import FORMATS

#: Layers in a row.
DEPTH = 2


class _Input:
    """Stands for the layer's input in a call that was noted."""


@dataclass(frozen=True)
class LayerCall:
    """How a model calls one of its layers; the input, wherever it was given, is left open.

    Attributes:
        x: the input, the first floating-point tensor of the call.
    """

    x: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LayerCall:
        x = next(a for a in [*args, *kwargs.values()] if isinstance(a, Tensor) and a.is_floating_point())

        def opened(value: Any) -> Any:
            return _Input if value is x else value.detach().clone() if isinstance(value, Tensor) else value

        return cls(x.detach().clone(), tuple(map(opened, args)), {key: opened(v) for key, v in kwargs.items()})

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """The first tensor that the layer returns."""

        def given(value: Any) -> Any:
            if value is _Input:
                return x
            return value.to(x.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        output = module(*map(given, self.args), **{key: given(value) for key, value in self.kwargs.items()})
        return next(tensors_in(output))


class Stack(nn.Module):
    """Layers of one width in a row; of a classifier, side by side."""

    def __init__(self, layers: Sequence[nn.Module], call: LayerCall) -> None:
        super().__init__()
        self.layers, self.call = nn.ModuleList(layers), call
        with torch.no_grad():
            self.in_a_row = call.run(self.layers[0], call.x).shape == call.x.shape

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) as the layer takes it, to the same, or to the sum of what the layers put out."""
        if not self.in_a_row:
            first, *others = (self.call.run(layer, x) for layer in self.layers)
            return sum(others, first)
        for layer in self.layers:
            x = x + self.call.run(layer, x)
        return x


class Side(nn.Module):
    """Several stacks on one input, each with an output; one graph is traced and converted sooner than many."""

    def __init__(self, stacks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stacks = nn.ModuleList(stacks)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(stack(x) for stack in self.stacks)


def float_copy(ready: Prepared, runtime: str) -> Prepared:
    """The model in float32 and evaluation mode, with what is known of its layers; for files on the processor."""
    with torch.inference_mode(False):
        made = copied(ready.model).float().eval().requires_grad_(False)
        return ready.of_copy(made.cpu() if runtime in FORMATS else made)


@torch.no_grad()
def layer_calls(ready: Prepared, batch_size: int, size: Sequence[int]) -> dict[str, LayerCall]:
    """How the model calls every one of its layers for a batch of random images of a size (C, H, W).

    Raises:
        ModelError: it does not run on them, or does not call one of its layers.
    """
    model = ready.model
    found: dict[str, LayerCall] = {}
    layers = ready.inventory.layers

    def note(name: str) -> Any:
        return lambda _, args, kwargs: found.setdefault(name, LayerCall.of(args, kwargs))

    handles = [
        model.get_submodule(one.name).register_forward_pre_hook(_silent(note(one.name)), with_kwargs=True)
        for one in layers
    ]
    example = example_for(model, size, batch_size, seed=0)
    try:
        with evaluating(model), still(model), explained(example.pixels):
            example.run(model)
    finally:
        for handle in handles:
            handle.remove()
    missing = [one.name for one in layers if one.name not in found]
    if missing:
        raise ModelError(f"the model runs without calling its layer '{missing[0]}', so that it cannot be timed alone")
    return found


def _silent(note: Any) -> Any:
    """A hook whose result changes nothing."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        note(module, args, kwargs)

    return hook


def stack_of(layer: Layer, choice: Choice, call: LayerCall) -> Stack:
    """A layer at a choice of widths, twice, with random weights."""
    return Stack([_at(layer, choice, seed) for seed in range(DEPTH)], call).eval()


@torch.no_grad()
def _at(layer: Layer, choice: Choice, seed: int) -> nn.Module:
    made = copy.deepcopy(layer.module)
    for name, module in layer.empty(choice).items():
        inside = name[len(layer.name) :].lstrip(".")
        module = copy.deepcopy(module)
        for parameter in module.parameters():
            parameter.zero_()  # it was not initialized
        if not inside:
            made = module
        else:
            made.set_submodule(inside, module)
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        # Numbers of one kind at all widths, and others in every layer: equal weights would be stored only once.
        parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return made.eval().requires_grad_(False)
