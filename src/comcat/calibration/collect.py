"""Streaming second moments of the activations, in one forward pass over unlabelled images.

Per attention layer: moments of queries and of keys (centred over the keys that a query sees: image, or window in
Swin) per head, and the covariance of the concatenated head outputs. Per linear layer: mean and covariance of the
input. Memory is O(d^2) per head and O(D^2) per linear layer, whatever the number of images; a bounded random sample
of the images themselves is kept for probing. Optionally second moments of the output gradients (true Fisher:
labels sampled from the model's own prediction).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..evaluation.outputs import Draw, Outputs
from ..hosts import find_sites
from ..layers.sites import AttentionSite, FFNSite, Site, check_finite
from ..models.modes import exclusive, frozen
from ..models.running import exact, explained, images_of, wide
from ..models.wrappers import check_plain
from ..planning.cost import Shape
from ..progress import Progress
from .fingerprint import fingerprint
from .statistics import Calibration


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
        rows = rows if rows.dtype == torch.float64 else rows.float()
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


class _Recorder:
    """Hooks on the linear layers of one site, and the moments they fill."""

    def __init__(self, site: Site, fisher: bool) -> None:
        self.site = site
        self.fisher = fisher
        self.moments: dict[str, Moment] = {}
        self.sums: dict[str, Tensor] = {}
        self.images = 0  # of the current batch
        self.shape: Shape | None = None
        self.counting = True  # until the first batch is through

    def hooks(self) -> list[Any]:
        site = self.site
        if isinstance(site, AttentionSite):
            handles = [site.proj.register_forward_hook(self._output("z", "out_grad"))]
            if "qk" not in site.dense_parts:
                handles.append(site.qkv.register_forward_hook(self._qkv))
            return handles
        if isinstance(site, FFNSite):
            return [
                site.fc1.register_forward_hook(self._output("x", "fc1_grad")),
                site.fc2.register_forward_hook(self._output("h", "fc2_grad")),
            ]
        return [site.module.register_forward_hook(self._output("x", "grad"))]

    def _add(self, name: str, rows: Tensor, centred: bool = False) -> None:
        moment = self.moments.setdefault(name, Moment())
        moment.add(rows.detach(), centred)
        if not torch.isfinite(moment.sum).all():
            raise CalibrationError(
                f"module '{self.site.name}' produced NaN or infinite activations; check the checkpoint and the "
                "images, or calibrate in a wider dtype"
            )

    def _output(self, name: str, grad_name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            x = args[0].detach()
            if self.counting and name != "h":  # the first layer of a site, as often as a pass calls it
                tokens = x.numel() // x.shape[-1] // self.images
                before = self.shape.tokens if self.shape is not None else 0
                self.shape = Shape(before + tokens, x.shape[1] if x.dim() == 3 else tokens)
            self._add(name, x.flatten(0, -2))
            if self.fisher and out.requires_grad:
                out.register_hook(lambda g: self._add_grad(grad_name, g))

        return hook

    def _add_grad(self, name: str, grad: Tensor) -> None:
        rows = grad.flatten(0, -2)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        self._accumulate(name, rows.mT @ rows)

    def _accumulate(self, name: str, value: Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = torch.zeros_like(value, dtype=torch.float64, device=wide(value.device))
        self.sums[name] += value.to(self.sums[name].device)

    def _qkv(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(self.site, AttentionSite)
        H = self.site.num_heads
        q, k, _ = out.detach().unflatten(-1, (3, H, -1)).unbind(-3)  # (sequences, tokens, heads, d)
        self._add("q", q.permute(2, 0, 1, 3).flatten(1, 2))
        k = k - k.mean(1, keepdim=True)
        self._add("k", k.permute(2, 0, 1, 3).flatten(1, 2), centred=True)
        if self.fisher and out.requires_grad:
            out.register_hook(lambda g: self._add_qk_grad(q, g.unflatten(-1, (3, H, -1)).select(-3, 0)))

    def _add_qk_grad(self, q: Tensor, grad: Tensor) -> None:
        """``A = Q^T dL/dQ`` per image and head: the gradient of the loss in the product's own coordinates."""
        q, grad = (t.unflatten(0, (self.images, -1)).flatten(1, 2).transpose(1, 2) for t in (q, grad))
        A = q.mT @ grad
        A = A.to(wide(A.device)).double()  # (images, heads, d, d)
        self._accumulate("qk_rows", (A @ A.mT).sum(0))
        self._accumulate("qk_cols", (A.mT @ A).sum(0))

    def result(self, images: int) -> dict[str, Tensor]:
        m = self.moments
        out: dict[str, Tensor] = {}
        if "q" in m:
            out |= {"q": m["q"].second, "k": m["k"].covariance}
        for name in ("z", "x", "h"):
            if name in m:
                out |= {name: m[name].covariance, f"{name}_mean": m[name].mean}
        # Gradients of one image's loss; summed over its tokens they estimate the loss increase of that image.
        out |= {name: total / images for name, total in self.sums.items()}
        return {name: tensor.cpu() for name, tensor in out.items()}


@contextmanager
def _recording(recorders: list[_Recorder]) -> Any:
    with ExitStack() as stack:
        for recorder in recorders:
            for handle in recorder.hooks():
                stack.callback(handle.remove)
        yield


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


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    fisher: bool = False,
    probe_images: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
    outputs: str | None = None,
) -> Calibration:
    """Collect the statistics from which any number of plans and compressed models can be made.

    Activations are those of the model in its own dtype: a caller's autocast is switched off, and float32 products are
    computed in float32. Statistics are summed in float64.

    Args:
        model: a model whose layers comcat knows (see :func:`comcat.hosts.find_sites`); run in evaluation mode.
        batches: iterable of (B, 3, H, W) tensors, of (images, labels) whose labels are not used, or of dictionaries
            with ``pixel_values``.
        fisher: also collect output-gradient moments, with one backward pass per batch.
        probe_images: how many images to keep for probing, a random sample of all.
        progress: called as ``progress("calibrate", batches done, batches in all or None)``.
        outputs: what the model returns, one of :data:`comcat.evaluation.outputs.KINDS`; by default inferred from it,
            which cannot tell ``labels`` (several of which may apply) or several ``values`` from ``classes``.

    Raises:
        CalibrationError: no images, images of differing sizes, or non-finite images or activations.
        ModelError: nothing to compress, non-finite weights, or outputs that comcat cannot read.
    """
    check_plain(model)
    with exclusive(model), torch.inference_mode(False):
        return _calibrate(model, batches, fisher, probe_images, seed, progress, outputs)


def _calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    fisher: bool,
    probe_images: int,
    seed: int,
    progress: Progress | None,
    kind: str | None,
) -> Calibration:
    inventory = find_sites(model)
    check_finite(model)
    recorders = [_Recorder(site, fisher) for site in inventory.sites]
    parameter = next(model.parameters())
    outputs = Outputs(model, kind)
    draw = Draw(outputs, torch.Generator(device=parameter.device).manual_seed(seed))
    sample = Reservoir(probe_images, seed)
    total = len(batches) if isinstance(batches, Sized) else None
    size: tuple[int, ...] | None = None
    with frozen(model), _recording(recorders), torch.set_grad_enabled(fisher), exact(parameter.device):
        for done, batch in enumerate(batches):
            images = _images(batch, done, size)
            size = tuple(images.shape[1:])
            sample.add(images)
            for recorder in recorders:
                recorder.images, recorder.counting = len(images), done == 0
            images = images.to(parameter.device, parameter.dtype)
            with explained(images, CalibrationError):
                images.requires_grad_(fisher)
                found = outputs(model(images), len(images))
                if fisher:  # the gradients reach the hooks, nothing is stored
                    torch.autograd.grad(draw.loss(found), images)
            if progress:
                progress("calibrate", done + 1, total)
    if not sample.seen or size is None:
        raise CalibrationError("no calibration images: the iterable of batches is empty")
    missed = [r.site.name for r in recorders if r.shape is None]
    if missed:
        raise CalibrationError(f"module '{missed[0]}' was never called in the forward pass; is it in use?")
    return Calibration(
        moments={r.site.name: r.result(sample.seen) for r in recorders},
        shapes={r.site.name: r.shape for r in recorders if r.shape is not None},
        images=torch.stack(sample.items) if sample.items else torch.empty(0, *size),
        num_images=sample.seen,
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
