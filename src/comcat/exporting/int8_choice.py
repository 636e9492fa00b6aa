"""Which layers compute in int8 in an int8 file: by what quantizing them does to the outputs on the calibration images.

Int8 is simulated in PyTorch: weights are rounded by output channel, inputs of layers as the runtime will do it, by
tensor over the range that the calibration images have, or by token. Rounded weights alone hardly change what a model
says, rounded inputs may; so there are three kinds of layers in a file: int8, int8 weights with inputs in float, and
float. The loss of a group of layers (an attention module, an MLP, the patch embedding, the classifier) is the
divergence of the outputs when it alone is quantized. Groups are spared by loss per weight, largest first, until all
others together stay within the tolerance: the fewest that do, found by bisection, first for weights, then for inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..evaluation.outputs import Outputs, divergence
from ..nn.linear import LowRankLinear
from ..nn.projections import HeadOutput, HeadProjection
from ..progress import Progress

#: Images that the choice is measured on; ranges are taken over all that are given.
_MEASURED = 64
_BATCH = 32


@dataclass(frozen=True)
class Int8:
    """What an int8 file is made with.

    Attributes:
        images: (N, C, H, W), normalized, to calibrate on.
        weights_only: layers of int8 weights that compute in float; floats: layers that stay float.
        divergence: of the outputs by the simulation, in the unit of their kind (nats per image for classes).
    """

    images: Tensor
    weights_only: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()
    divergence: float = 0.0


class FloatChoice:
    """The choice for one model; what has been measured is measured once.

    Args:
        model: in float32 and evaluation mode; it is left as it was.
        by_token: inputs get a scale of their own for every token, as PyTorch's dynamic quantization has it.

    Raises:
        ExportError: there is nothing to quantize.
    """

    def __init__(self, model: nn.Module, images: Tensor, by_token: bool, progress: Progress | None = None) -> None:
        self._simulated = _Simulation(model, images, by_token)
        self._images, self._progress = images, progress
        self._orders: dict[bool, list[str]] = {}
        if not self._simulated.groups:
            raise ExportError("the model has no linear layers or convolutions that could be int8")

    def within(self, tolerance: float) -> Int8:
        """As many layers in int8 as diverge together by at most ``tolerance`` by the simulation.

        Weights get half of it at most.

        Raises:
            ExportError: not even the weights of one group of layers can be int8.
        """
        groups = self._simulated.groups
        with self._simulated.hooked():
            spared, lost = self._spared(list(groups), tolerance / 2, inputs=False)
            if len(spared) == len(groups):
                everything = self._simulated.loss(set(groups), set())
                raise ExportError(
                    f"no layer can be int8 within a divergence of {tolerance:.2g}; rounding all weights alone makes "
                    f"one of {everything:.2g}: give a larger int8_tolerance (--int8-tolerance)"
                )
            rounded = [group for group in groups if group not in spared]
            kept, lost = self._spared(rounded, tolerance, inputs=True)
        weights_only, floats = (tuple(name for group in some for name in groups[group]) for some in (kept, spared))
        return Int8(self._images, weights_only, floats, lost)

    def _spared(self, groups: list[str], tolerance: float, inputs: bool) -> tuple[list[str], float]:
        """The fewest of these groups whose weights (or inputs) are not rounded, and what rounding the rest loses."""

        def loss(rounded: Collection[str]) -> float:
            return self._simulated.loss(set(groups) if inputs else set(rounded), set(rounded) if inputs else set())

        found = loss(groups)
        if found <= tolerance:
            return [], found
        order = [group for group in self._ordered(inputs) if group in groups]
        # Sparing `high` of them is enough, sparing `low` is not.
        low, high, found = 0, len(order), loss(()) if inputs else 0.0
        while high - low > 1:
            middle = (low + high) // 2
            lost = loss(order[middle:])
            low, high, found = (low, middle, lost) if lost <= tolerance else (middle, high, found)
        return order[:high], found

    def _ordered(self, inputs: bool) -> list[str]:
        """Groups by what rounding one alone costs per weight, the dearest first."""
        if inputs not in self._orders:
            losses: dict[str, float] = {}
            for group in self._simulated.groups:
                loss = self._simulated.loss({group}, {group} if inputs else set())
                losses[group] = loss / self._simulated.weights(group)
                if self._progress:
                    self._progress("int8: loss of every layer", len(losses), len(self._simulated.groups))
            self._orders[inputs] = sorted(losses, key=losses.__getitem__, reverse=True)
        return self._orders[inputs]


def groups_of(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)) -> dict[str, list[str]]:
    """Layers of these kinds by the module that holds them; a layer that comcat made of two counts as one."""
    ours = LowRankLinear, HeadProjection, HeadOutput
    one = {name for name, module in model.named_modules() if isinstance(module, ours)}
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            parent = name.rpartition(".")[0]
            if parent in one:
                parent = parent.rpartition(".")[0] or parent
            found.setdefault(parent or name, []).append(name)
    return found


class _Simulation:
    """A model whose groups can be quantized one by one."""

    def __init__(self, model: nn.Module, images: Tensor, by_token: bool) -> None:
        self.model, self.by_token = model, by_token
        self.images = images
        self.groups = groups_of(model, (nn.Linear,)) if by_token else groups_of(model)
        self.outputs = Outputs(model)
        self.inputs: set[str] = set()  # groups whose inputs are rounded
        self.ranges: dict[str, tuple[float, float]] = {}
        self.original: dict[str, Tensor] = {}
        self.wanted: list[tuple[Tensor, ...]] = []

    def weights(self, group: str) -> int:
        return sum(self._layer(name).weight.numel() for name in self.groups[group])

    def _layer(self, name: str) -> Any:
        return self.model.get_submodule(name)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside, :meth:`loss` works; the weights are the model's own again afterwards."""
        handles = []
        try:
            for group, names in self.groups.items():
                for name in names:
                    layer = self._layer(name)
                    self.original[name] = layer.weight.data
                    handles.append(layer.register_forward_pre_hook(self._input_hook(group, name)))
            if not self.wanted:
                self.wanted = [self._outputs(batch, observe=True) for batch in self.images.split(_BATCH)]
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, weight in self.original.items():
                self._layer(name).weight.data = weight

    def _input_hook(self, group: str, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self.observing:
                low, high = self.ranges.get(name, (0.0, 0.0))
                self.ranges[name] = min(low, float(args[0].min())), max(high, float(args[0].max()))
                return None
            if group not in self.inputs:
                return None
            return (_by_token(args[0]) if self.by_token else _by_tensor(args[0], *self.ranges[name]), *args[1:])

        return hook

    @torch.no_grad()
    def _outputs(self, batch: Tensor, observe: bool = False) -> tuple[Tensor, ...]:
        self.observing = observe
        return self.outputs.run(batch)

    def loss(self, weights: set[str], inputs: set[str]) -> float:
        """The divergence when the weights, and the inputs, of these groups are rounded."""
        self.inputs = inputs
        for group, names in self.groups.items():
            for name in names:
                weight = self.original[name]
                self._layer(name).weight.data = _by_channel(weight) if group in weights else weight
        total = count = 0.0
        for batch, wanted in zip(self.images.split(_BATCH), self.wanted, strict=True):
            if count >= _MEASURED:
                break
            total += divergence(str(self.outputs.kind), wanted, self._outputs(batch)) * len(batch)
            count += len(batch)
        return total / count


def _by_channel(weight: Tensor) -> Tensor:
    scale = weight.flatten(1).abs().amax(1).clamp_min(1e-12).view(-1, *[1] * (weight.dim() - 1)) / 127
    return (weight / scale).round().clamp(-127, 127) * scale


def _by_token(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (x / scale).round() * scale


def _by_tensor(x: Tensor, low: float, high: float) -> Tensor:
    scale = max(high - low, 1e-12) / 255
    zero = round(-low / scale)
    return ((x / scale + zero).round().clamp(0, 255) - zero) * scale


@torch.no_grad()
def diverging(model: nn.Module, other: nn.Module, images: Tensor) -> float:
    """The divergence of another model's outputs on the images that the choice was measured on."""
    outputs = Outputs(model)
    total = 0.0
    batches = images[:_MEASURED].split(_BATCH)
    for batch in batches:
        wanted = outputs.run(batch)
        total += divergence(str(outputs.kind), wanted, outputs(other(batch), len(batch))) * len(batch)
    return total / sum(map(len, batches))


def image_batches(images: Tensor, size: int) -> Sequence[Tensor]:
    """Whole batches alone, which is what a file of a fixed batch takes."""
    return [batch for batch in images.split(size) if len(batch) == size]
