"""Streaming second moments of the activations, in one forward pass over unlabelled images.

Per attention layer: moments of queries and of keys (centred over the keys that a query sees: image, or window in
Swin) per head, and the covariance of the concatenated head outputs. Per linear layer: mean and covariance of the
input. Memory is O(d^2) per head and O(D^2) per linear layer, whatever the number of images; a bounded random sample
of the images themselves is kept for probing, and some more, which the statistics do not see, to judge plans by.
Optionally second moments of the output gradients (true Fisher: labels sampled from the model's own prediction).
"""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..evaluation.outputs import Draw, Forward, Outputs
from ..layers.recording import Recorder, recording
from ..models.modes import exclusive, frozen
from ..models.running import exact, explained, images_of
from ..prepared import Prepared, prepared
from ..progress import Progress
from .fingerprint import fingerprint
from .statistics import Calibration


class Reservoir:
    """A uniform random sample of bounded size from a stream of unknown length (algorithm R)."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.items: list[Tensor] = []
        self.seen = 0
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, batch: Tensor) -> None:
        for item in batch:
            self.seen += 1
            if len(self.items) < self.size:
                self.items.append(item.cpu().clone())
            else:
                place = int(torch.randint(self.seen, (), generator=self.generator))
                if place < self.size:
                    self.items[place] = item.cpu().clone()


class HeldOut:
    """Images that are kept from the statistics: of those after the first 256 every fourth, up to ``size``."""

    FIRST, EVERY = 256, 4

    def __init__(self, size: int) -> None:
        self.size = size
        self.items: list[Tensor] = []
        self.seen = 0

    def take(self, batch: Tensor) -> Tensor:
        """Keep some images of a batch; what is left of it is for the statistics."""
        places = [
            place
            for place in range(max(self.FIRST - self.seen, 0), len(batch))
            if (self.seen + place - self.FIRST) % self.EVERY == 0
        ][: self.size - len(self.items)]
        self.seen += len(batch)
        if not places:
            return batch
        self.items += [batch[place].cpu().clone() for place in places]
        rest = torch.ones(len(batch), dtype=torch.bool, device=batch.device)
        rest[places] = False
        return batch[rest]


def calibrate(
    model: nn.Module | Prepared,
    batches: Iterable[Any],
    *,
    fisher: bool = False,
    probe_images: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
    outputs: str | None = None,
    held_out: int | None = None,
    forward: Forward | None = None,
) -> Calibration:
    """Collect the statistics from which any number of plans and compressed models can be made.

    Activations are those of the model in its own dtype: a caller's autocast is switched off, and float32 products are
    computed in float32. Statistics are summed in float64.

    Args:
        model: a model whose layers comcat knows (see :func:`comcat.hosts.find_layers`); run in evaluation mode.
        batches: iterable of (B, 3, H, W) tensors, of (images, labels) whose labels are not used, or of dictionaries
            with ``pixel_values``.
        fisher: also collect output-gradient moments, with one backward pass per batch.
        probe_images: how many images to keep for probing, a random sample of all.
        progress: called as ``progress("calibrate", batches done, batches in all or None)``.
        outputs: what the model returns, one of :data:`comcat.evaluation.outputs.KINDS`; by default inferred from it,
            which cannot tell ``labels`` (several of which may apply) or several ``values`` from ``classes``.
        held_out: how many images at most to keep from the statistics, of those after the first 256 every fourth;
            plans are compared on them (method ``auto``). Default half of ``probe_images``.
        forward: called as ``forward(model, images)`` where ``model(images)`` is not what is wanted, such as
            ``lambda model, images: model.encode_image(images)``. Planning by measurement wants the same one.

    Raises:
        CalibrationError: no images, images of differing sizes, or non-finite images or activations.
        ModelError: nothing to compress, non-finite weights, or outputs that comcat cannot read.
    """
    ready = prepared(model)
    with exclusive(ready.model), torch.inference_mode(False):
        held = HeldOut(probe_images // 2 if held_out is None else held_out)
        return _calibrate(ready, batches, fisher, Reservoir(probe_images, seed), held, seed, progress, outputs, forward)


def _calibrate(
    ready: Prepared,
    batches: Iterable[Any],
    fisher: bool,
    sample: Reservoir,
    held: HeldOut,
    seed: int,
    progress: Progress | None,
    kind: str | None,
    forward: Forward | None,
) -> Calibration:
    model = ready.model
    recorders = [Recorder(layer, fisher) for layer in ready.inventory.layers]
    parameter = next(model.parameters())
    outputs = Outputs(model, kind, forward=forward)
    draw = Draw(outputs, torch.Generator(device=parameter.device).manual_seed(seed))
    total = len(batches) if isinstance(batches, Sized) else None
    size: tuple[int, ...] | None = None
    with frozen(model), recording(model, recorders), torch.set_grad_enabled(fisher), exact(parameter.device):
        for done, batch in enumerate(batches):
            images = _images(batch, done, size)
            size = tuple(images.shape[1:])
            images = held.take(images)
            if not len(images):  # batches of a single image
                continue
            sample.add(images)
            for recorder in recorders:
                recorder.images, recorder.counting = len(images), done == 0
            images = images.to(parameter.device, parameter.dtype)
            with explained(images, CalibrationError):
                images.requires_grad_(fisher)
                found = outputs.run(images)
                if fisher:  # the gradients reach the hooks, nothing is stored
                    torch.autograd.grad(draw.loss(found), images)
            if progress:
                progress("calibrate", done + 1, total)
    if not sample.seen or size is None:
        raise CalibrationError("no calibration images: the iterable of batches is empty")
    shapes = {recorder.layer.name: recorder.shape(CalibrationError) for recorder in recorders}
    return Calibration(
        moments={recorder.layer.name: recorder.result(sample.seen) for recorder in recorders},
        shapes=shapes,
        images=torch.stack(sample.items) if sample.items else torch.empty(0, *size),
        num_images=held.seen,
        held_out=torch.stack(held.items) if held.items else None,
        input_size=size,
        fisher=fisher,
        outputs=outputs.kind,
        weights=fingerprint(model),
    )


def _images(batch: Any, index: int, size: tuple[int, ...] | None) -> Tensor:
    images = images_of(batch, f"batch {index}", CalibrationError)
    if size is not None and tuple(images.shape[1:]) != size:
        raise CalibrationError(f"batch {index} holds images {tuple(images.shape[1:])}, but the first held {size}")
    if not torch.isfinite(images).all():
        raise CalibrationError(f"batch {index} holds NaN or infinite pixels")
    return images
