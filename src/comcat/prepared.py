"""A model looked at once: its layers, their shapes, what it costs, and its factors; every step of a run shares them.

prepared = comcat.prepare(model)
calibration = comcat.calibrate(prepared, batches)
plan = comcat.plan(prepared, Budget(params=0.5), calibration)
comcat.compress_(prepared, plan, calibration)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from .calibration.statistics import Calibration
from .hosts import find_layers, proven_layers
from .layers.base import Inventory, check_finite
from .layers.cost import Shape
from .layers.factors import Factors
from .models.batches import Batch
from .models.example import given_example
from .models.profile import Profile, default_input_size, image_size, layer_shapes, profile
from .models.wrappers import check_plain

#: Images that a model is looked at with: a prime, so that what depends on them can be told from what does not.
_SHOWN = 3


class Prepared:
    """What does not change while a model stays as it is; each thing is computed when it is first asked for.

    Every function of comcat that takes a dense model takes this in its place. Do not change the model's weights or
    layers between two such calls; :meth:`forget` starts over. ``compress_`` does so itself.

    Args:
        example: one call of the model, where images alone do not run it: a dictionary of its inputs, or (args, kwargs).
            Models of transformers and open_clip are called with images, and with tokens of text where they want them.

    Attributes:
        model: the dense model; example: the one given, or None.

    Raises:
        ModelError: a wrapped or quantized model, nothing to compress, or non-finite weights.
    """

    def __init__(self, model: nn.Module, example: Any = None) -> None:
        check_plain(model)
        self.model, self.example = model, example
        self.forget()

    def forget(self) -> None:
        """The model was changed: look again when asked."""
        self._inventory: Inventory | None = None
        self._profiles: dict[tuple[int, ...], Profile] = {}
        self._shapes: dict[tuple[int, ...], dict[str, Shape]] = {}
        self._checked: Calibration | None = None
        self._factors: tuple[Calibration | None, dict[str, Factors[Any]]] | None = None

    @property
    def inventory(self) -> Inventory:
        """The layers, and what stays dense."""
        if self._inventory is None:
            check_finite(self.model)
            self._inventory = proven_layers(self.model, self.size(), self.example)
        return self._inventory

    def of_copy(self, model: nn.Module) -> Prepared:
        """What is known of this model, for a copy of it: nothing is proven, measured or factored again."""
        other = Prepared(model, self.example)
        found = {layer.name: layer for layer in find_layers(model).layers}
        layers = []
        for layer in self.inventory.layers:
            mine = found[layer.name]
            layers.append(mine if layer.conclusion is None else layer.conclusion(mine))
        other._inventory = Inventory(layers, self.inventory.dense)
        other._profiles, other._shapes, other._checked = self._profiles, self._shapes, self._checked
        if self._factors is not None:
            calibration, factors = self._factors
            made = {}
            for layer in layers:
                made[layer.name] = copy.copy(factors[layer.name])
                made[layer.name].layer = layer
            other._factors = calibration, made
        return other

    def size(self, *wanted: Sequence[int] | None) -> tuple[int, int, int]:
        """The first size that is given, else that of the example or of the model, as (C, H, W)."""
        return image_size(next((size for size in wanted if size), None) or self._own_size())

    def _own_size(self) -> Sequence[int]:
        if self.example is not None:
            pixels = given_example(self.example, self.model).pixels
            if pixels.dim() == 4:
                return pixels.shape[1:]
            if pixels.dim() == 3 and type(self.model).__module__.startswith("diffusers."):
                return (pixels.shape[2], 1, pixels.shape[1])  # a row of tokens
        return default_input_size(self.model)

    def profile(self, size: tuple[int, ...]) -> Profile:
        """What the dense model costs at an image size (C, H, W)."""
        if size not in self._profiles:
            self._profiles[size] = profile(self.model, size, self.example)
        return self._profiles[size]

    def shapes(self, size: tuple[int, ...], calibration: Calibration | None = None) -> dict[str, Shape]:
        """How much data one image of this size brings to every layer."""
        if calibration is not None and size == tuple(calibration.input_size):
            return calibration.shapes
        if size not in self._shapes:
            self._shapes[size] = layer_shapes(self.model, self.inventory, size, self.example)
        return self._shapes[size]

    def check(self, calibration: Calibration | None) -> None:
        """Raise CalibrationError unless these statistics are this model's; see :meth:`Calibration.check`."""
        if calibration is not None and calibration is not self._checked:
            calibration.check(self.inventory, self.model)
            self._checked = calibration

    def factors(self, calibration: Calibration | None) -> dict[str, Factors[Any]]:
        """The factors of every layer, from these statistics or from the weights alone."""
        if self._factors is None or self._factors[0] is not calibration:
            device = next(self.model.parameters()).device
            moments = calibration.to(device).moments if calibration is not None else {}
            made = {layer.name: layer.factors(moments.get(layer.name)) for layer in self.inventory.layers}
            self._factors = calibration, made
        return self._factors[1]


def prepare(model: nn.Module, example: Any = None) -> Prepared:
    """Look at a model once for several calls; see :class:`Prepared` for what it takes and raises."""
    return Prepared(model, example)


def prepared(model: nn.Module | Prepared, shown: Batch | Calibration | None = None) -> Prepared:
    """``model``, looked at.

    Args:
        shown: what it was calibrated with, which is the example where that is more than images and the model has none.
    """
    ready = model if isinstance(model, Prepared) else Prepared(model)
    batch = shown.sample if isinstance(shown, Calibration) else shown
    if batch and not batch.alone and ready.example is None and ready._inventory is None:
        ready.example = (batch if batch.rows is None else batch[:_SHOWN]).call
    return ready
