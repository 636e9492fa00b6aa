"""Streaming second moments of the activations, in one forward pass over unlabelled images.

Per attention layer: moments of queries and of keys (centred over the keys that a query sees: image, or window in
Swin) per head, and the covariance of the concatenated head outputs. Per linear layer: mean and covariance of the
input. Memory is O(d^2) per head and O(D^2) per linear layer, whatever the number of images; a bounded random sample
of the images themselves is kept for probing, and some more, which the statistics do not see, to judge plans by.
Optionally second moments of the output gradients (true Fisher: labels sampled from the model's own prediction).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..evaluation.outputs import Draw, Forward, Outputs
from ..layers.recording import Recorder, recording
from ..models.batches import NOISY, Batch, batch_of, calling
from ..models.modes import exclusive, frozen
from ..models.running import exact, explained
from ..prepared import Prepared, prepared
from ..progress import Progress
from .fingerprint import fingerprint
from .sampling import HeldOut, Reservoir
from .statistics import Calibration


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
        batches: iterable of (B, 3, H, W) tensors, of (images, labels) whose labels are not used, of dictionaries
            (a BatchFeature of transformers, say) with images or with all inputs of the model's ``forward`` by name, or
            of (args, kwargs). Where images alone do not run the model, the first batch is also the example that it is
            looked at with, unless ``model`` was prepared with one.
        fisher: also collect output-gradient moments, with one backward pass per batch.
        probe_images: how many images to keep for probing, a random sample of all.
        progress: called as ``progress("calibrate", batches done, batches in all or None)``.
        outputs: what the model returns, one of :data:`comcat.evaluation.outputs.KINDS`; by default inferred from it,
            which cannot tell ``labels`` (several of which may apply) or several ``values`` from ``classes``.
        held_out: how many images at most to keep from the statistics, of those after the first 256 every fourth;
            plans are compared on them (method ``auto``). Default half of ``probe_images``.
        forward: called as ``forward(model, images)`` where ``model(images)`` is not what is wanted, such as
            ``lambda model, images: model.encode_image(images)``; with the dictionary where batches hold more than
            images. Planning by measurement wants the same one.

    Raises:
        CalibrationError: no images, images of differing sizes, inputs that do not fit the model's ``forward``, or
            non-finite images or activations.
        ModelError: nothing to compress, non-finite weights, or outputs that comcat cannot read.
    """
    with torch.inference_mode(False):
        stream = iter(batches)
        first = [_checked(batch, model, 0, None, forward) for batch in islice(stream, 1)]
        ready = prepared(model, first[0] if first else None)
        total = len(batches) if isinstance(batches, Sized) else None
        held = HeldOut(probe_images // 2 if held_out is None else held_out)
        sample = Reservoir(probe_images, seed)
        with exclusive(ready.model):
            return _calibrate(
                ready, chain(first, stream), total, fisher, sample, held, seed, progress, outputs, forward
            )


def _calibrate(
    ready: Prepared,
    batches: Iterable[Any],
    total: int | None,
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
    outputs = Outputs(model, kind, forward=calling(forward))
    draw = Draw(outputs, torch.Generator(device=parameter.device).manual_seed(seed))
    first: Batch | None = None
    with frozen(model), recording(model, recorders), torch.set_grad_enabled(fisher), exact(parameter.device):
        for done, delivered in enumerate(batches):
            given = _checked(delivered, model, done, first, forward)
            first = first or given
            batch = held.take(given)
            if batch is None:  # batches of a single image
                continue
            sample.add(batch)
            for recorder in recorders:
                recorder.images, recorder.counting = len(batch), done == 0
            batch = batch.to(parameter.device, parameter.dtype)
            linears = [one for layer in ready.inventory.layers for one in layer.linears.values()]
            with explained(batch.pixels, CalibrationError), _reached(model, batch, fisher, linears) as leaves:
                found = outputs.run(batch)
                if fisher:  # the gradients reach the hooks, nothing is stored
                    torch.autograd.grad(draw.loss(found), leaves, allow_unused=True)
            if progress:
                progress("calibrate", done + 1, total)
    if not sample.seen or first is None:
        raise CalibrationError("no calibration images: the iterable of batches is empty")
    shapes = {recorder.layer.name: recorder.shape(CalibrationError) for recorder in recorders}
    size = tuple(first.pixels.shape[-3:]) if first.pixels.dim() >= 4 else ready.size()
    made = Calibration(
        moments={recorder.layer.name: recorder.result(sample.seen) for recorder in recorders},
        shapes=shapes,
        images=torch.empty(0, *size),
        num_images=held.seen,
        input_size=size,
        fisher=fisher,
        outputs=outputs.kind,
        weights=fingerprint(model),
    )
    made.keep(sample.joined(), held.joined())
    return made


@contextmanager
def _reached(model: nn.Module, batch: Batch, wanted: bool, linears: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Tensors that every layer's output depends on, for gradients: the pixels, and a zero added to embedded tokens.

    Of what a denoiser is given besides (text, the time), to what its linear layers are given.
    """
    if not wanted:
        yield []
        return
    leaves = [batch.pixels.requires_grad_()]
    handles = []
    zero = torch.zeros((), device=batch.pixels.device, dtype=batch.pixels.dtype, requires_grad=True)
    if not set(NOISY).isdisjoint(batch.tensors):
        leaves.append(zero)
        handles = [
            one.register_forward_pre_hook(lambda module, args: (args[0] + zero.to(args[0].dtype), *args[1:]))
            for one in linears
        ]
    elif not all(tensor.is_floating_point() for tensor in batch.tensors.values()):
        leaves.append(zero)
        handles = [
            one.register_forward_hook(lambda module, args, out: out + zero.to(out.dtype))
            for one in model.modules()
            if isinstance(one, nn.Embedding)
        ]
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


def _checked(
    delivered: Any, model: nn.Module | Prepared, index: int, first: Batch | None, forward: Forward | None
) -> Batch:
    if isinstance(delivered, Batch):
        batch = delivered
    else:
        dense = model.model if isinstance(model, Prepared) else model
        batch = batch_of(delivered, dense, f"batch {index}", CalibrationError, forward is None)
    pixels = batch.pixels
    if first is not None and pixels.dim() >= 4 and pixels.shape[1:] != first.pixels.shape[1:]:
        size, before = tuple(pixels.shape[1:]), tuple(first.pixels.shape[1:])
        raise CalibrationError(f"batch {index} holds images {size}, but the first held {before}")
    if not torch.isfinite(pixels).all():
        raise CalibrationError(f"batch {index} holds NaN or infinite pixels")
    return batch
