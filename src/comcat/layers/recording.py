"""Streaming second moments of what passes a layer: memory is O(d^2), whatever the number of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, ComcatError
from ..models.running import wide
from ..nn.swap import swapped
from .base import Layer
from .cost import Shape


class Moment:
    """Mean and covariance of rows (..., rows, n), shifted by the first batch's mean against cancellation.

    Products run in the activations' dtype (at least float32), sums over batches in float64.
    """

    shift: Tensor  # (..., 1, n)
    sum: Tensor  # (..., n) of the shifted rows
    outer: Tensor  # (..., n, n)

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows: Tensor, centred: bool = False) -> None:
        """``centred`` rows have a mean of zero by construction."""
        rows = at_least_float32(rows)
        if not self.count:
            n = rows.shape[-1]
            self.shift = torch.zeros_like(rows[..., :1, :]) if centred else rows.mean(-2, keepdim=True)
            home = wide(rows.device)
            self.sum = rows.new_zeros(*rows.shape[:-2], n, dtype=torch.float64, device=home)
            self.outer = rows.new_zeros(*rows.shape[:-2], n, n, dtype=torch.float64, device=home)
        rows = rows - self.shift
        self.count += rows.shape[-2]
        # In place: a new sum per batch would leave the heap full of holes, and memory grow with the images.
        self.sum += rows.sum(-2).to(self.sum.device)
        self.outer += (rows.mT @ rows).to(self.sum.device)

    @property
    def mean(self) -> Tensor:
        return self.shift.to(self.sum).squeeze(-2) + self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        mean = self.sum / self.count
        return self.outer / self.count - mean[..., :, None] * mean[..., None, :]

    @property
    def second(self) -> Tensor:
        mean = self.mean
        return self.covariance + mean[..., :, None] * mean[..., None, :]


def at_least_float32(rows: Tensor) -> Tensor:
    """Half precision is too coarse to sum products in."""
    return rows if rows.dtype == torch.float64 else rows.float()


def as_rows(x: Tensor, channels: int = -1) -> Tensor:
    """(B, ..., n), or (B, n, H, W) with the channels in axis 1, to (sequences, tokens, n)."""
    if channels == 1:
        return x.flatten(2).mT
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


class ShapeCounter:
    """How much data one image brings to a layer, read off the linear layers inside while the model runs.

    Attributes:
        images: how many the current batch has; counting: whether it counts, as the first batch alone does.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.images = 1
        self.counting = True
        self._tokens = 0
        self._keys = 0
        self._sequence: int | None = None
        self._seen: dict[str, int] = {}

    def rows(self, channels: int = -1) -> Callable[..., None]:
        """A hook for the linear layer through which every token passes, as often as a pass calls it."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if self.counting:
                rows = as_rows(args[0], channels)
                self._tokens += rows.shape[0] * rows.shape[1] // self.images
                self._sequence = self._sequence or rows.shape[1]

        return hook

    def keys(self, channels: int = -1, stream: str = "") -> Callable[..., None]:
        """A hook for the linear layer that makes the keys of a stream, which a query sees all of."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if self.counting:
                rows = as_rows(out, channels)
                self._keys += rows.shape[0] * rows.shape[1] // self.images
                self._seen[stream] = rows.shape[1]

        return hook

    def shape(self, error: type[ComcatError]) -> Shape:
        """What was counted; raises ``error`` if the layer was never reached."""
        if not self._tokens or self._sequence is None:
            raise error(f"module '{self.layer.name}' was never called in the forward pass; is it in use?")
        sequence = sum(self._seen.values()) or self._sequence
        return Shape(self._tokens, sequence, self._keys if self._keys not in (0, self._tokens) else None)


@contextmanager
def recording(model: nn.Module, counters: Sequence[ShapeCounter]) -> Iterator[None]:
    """Layers in the form whose linear layers are called, with hooks on these that fill the counters."""
    lifted = {c.layer.name: c.layer.running for c in counters if c.layer.running is not c.layer.module}
    with swapped(model, lifted), ExitStack() as stack:
        for counter in counters:
            for handle in counter.layer.shape_hooks(counter):
                stack.callback(handle.remove)
            if isinstance(counter, Recorder):
                for handle in counter.layer.record(counter):
                    stack.callback(handle.remove)
        yield


class Recorder(ShapeCounter):
    """The moments of one layer, filled by hooks (see :meth:`comcat.layers.base.Layer.record`).

    Attributes:
        fisher: whether the outputs' gradients are recorded too, which :meth:`add_product` sums.
    """

    def __init__(self, layer: Layer, fisher: bool) -> None:
        super().__init__(layer)
        self.fisher = fisher
        self.moments: dict[str, Moment] = {}
        self.sums: dict[str, Tensor] = {}
        self.seconds: set[str] = set()

    def add(self, name: str, rows: Tensor, centred: bool = False, second: bool = False) -> None:
        """Rows (..., rows, n) of a moment: its covariance and mean, or with ``second`` its second moment alone."""
        if second:
            self.seconds.add(name)
        moment = self.moments.setdefault(name, Moment())
        moment.add(rows.detach(), centred)
        if not torch.isfinite(moment.sum).all():
            raise CalibrationError(
                f"module '{self.layer.name}' produced NaN or infinite activations; check the checkpoint and the "
                "images, or calibrate in a wider dtype"
            )

    def add_product(self, name: str, value: Tensor) -> None:
        """A sum over images, such as of gradients' products."""
        if name not in self.sums:
            self.sums[name] = torch.zeros_like(value, dtype=torch.float64, device=wide(value.device))
        self.sums[name] += value.to(self.sums[name].device)

    @staticmethod
    def precise(product: Tensor) -> Tensor:
        """In float64, on the host where the device has no such type."""
        return product.to(wide(product.device)).double()

    def inputs(
        self, name: str | None, grad_name: str, channels: int = -1, order: Callable[[Tensor], Tensor] | None = None
    ) -> Callable[..., None]:
        """A hook for a linear layer: moments of its inputs (where they have a name), and of its outputs' gradients.

        ``order`` brings the inputs' features into the order that the moments have.
        """

        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if name is not None:
                rows = as_rows(args[0].detach(), channels).flatten(0, -2)
                self.add(name, rows if order is None else order(rows))
            if self.fisher and out.requires_grad:
                out.register_hook(lambda g: self._add_grad(grad_name, as_rows(g, channels)))

        return hook

    def _add_grad(self, name: str, grad: Tensor) -> None:
        rows = at_least_float32(grad.flatten(0, -2))
        self.add_product(name, rows.mT @ rows)

    def result(self, images: int) -> dict[str, Tensor]:
        """The moments by name, on the CPU."""
        out: dict[str, Tensor] = {}
        for name, moment in self.moments.items():
            if name in self.seconds:
                out[name] = moment.second
            else:
                out |= {name: moment.covariance, f"{name}_mean": moment.mean}
        # Gradients of one image's loss; summed over its tokens they estimate the loss increase of that image.
        out |= {name: total / images for name, total in self.sums.items()}
        return {name: tensor.cpu() for name, tensor in out.items()}
