"""A copy of a dense model on gated weights: a whole distribution over widths in one forward pass."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..evaluation.outputs import Forward, Outputs
from ..layers.base import Layer
from ..layers.factors import Factors
from ..models.running import explained


class GatedModel(nn.Module):
    """A copy of a dense model on the weights of the mixture; called with (images, masks).

    ``masks`` has one dictionary per layer, part -> (full,), as :meth:`masks` makes them of probabilities. Gates and the
    model's other parameters are trainable. Evaluation mode: ranks are judged without dropout and dropped paths.

    Args:
        parts: (layer, part, candidates) per row of the distribution, the rows of a layer together.

    Attributes:
        kind: of the outputs; how: the model is called, ``model(images)`` where it is None.
    """

    def __init__(
        self, model: nn.Module, factors: Mapping[str, Factors[Any]], parts: Sequence[tuple[Layer, str, list[int]]]
    ) -> None:
        super().__init__()
        self.kind = "classes"
        self.how: Forward | None = None
        self.model = copy.deepcopy(model).eval()
        layers = {layer.name: layer for layer, _, _ in parts}
        for name, layer in layers.items():
            if layer.running is not layer.module:
                self.model.set_submodule(name, copy.deepcopy(layer.running).eval())
        self.rows = [(layer.name, part) for layer, part, _ in parts]
        self.gates = nn.ModuleDict()
        for name, layer in layers.items():
            own = tuple(part for other, part in self.rows if other == name)
            self.gates[name.replace(".", "/")] = nn.ModuleList(layer.gates(factors[name], own))
        dtype = next(model.parameters()).dtype
        for row, (_, _, candidates) in enumerate(parts):
            kept = torch.stack([torch.arange(candidates[-1]) < width for width in candidates])
            self.register_buffer(f"kept_{row}", kept.to(dtype), persistent=False)  # (A, full)
        self._release()

    def _release(self) -> None:
        """What the gates stand in for is not trained; a bias that only the compressed layer has is made."""
        ones = torch.ones(len(self.rows), 1, device=next(self.model.parameters()).device)
        for name, value in self.weights(self.masks(ones, dense=True)).items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, nn.Parameter(value.detach(), requires_grad=False))

    def masks(self, probabilities: Tensor, dense: bool = False) -> dict[str, dict[str, Tensor]]:
        """Gates per layer and part, ``m_j = sum_{a: r_a > j} p_a``; ``dense`` takes the last candidates alone."""
        masks: dict[str, dict[str, Tensor]] = {}
        for row, (name, part) in enumerate(self.rows):
            kept: Tensor = getattr(self, f"kept_{row}")
            mask = kept[-1] if dense else probabilities[row, : kept.shape[0]].to(kept.dtype) @ kept
            masks.setdefault(name, {})[part] = mask
        return masks

    def weights(self, masks: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """Values of the gated parameters by their names in the model."""
        values: dict[str, Tensor] = {}
        for name, mask in masks.items():
            for gate in self.gates[name.replace(".", "/")].children():
                values |= gate(mask)
        return values

    def forward(self, images: Tensor, probabilities: Tensor) -> Any:
        """(B, C, H, W) to the outputs, e.g. logits (B, classes), or a tuple of features.

        Two classifiers are averaged, as in evaluation.
        """
        with torch.autocast(images.device.type, enabled=False):  # the weights are few; they stay exact
            weights = self.weights(self.masks(probabilities))
        with explained(images):
            found = Outputs(self.model, self.kind)(self._called(weights, images), len(images))
        return found if self.kind == "features" else found[0]

    def _called(self, weights: dict[str, Tensor], images: Tensor) -> Any:
        if self.how is None:
            return functional_call(self.model, weights, (images,))
        named = {f"model.{name}": value for name, value in weights.items()}
        return functional_call(_Called(self.model, self.how), named, (images,))


class _Called(nn.Module):
    """A model whose own ``forward`` is not what is wanted."""

    def __init__(self, model: nn.Module, how: Forward) -> None:
        super().__init__()
        self.model, self.how = model, how

    def forward(self, images: Tensor) -> Any:
        return self.how(self.model, images)
