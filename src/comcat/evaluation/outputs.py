"""What a model's output means: its kind, and with it every loss, divergence and draw.

    classes   (B, C) logits of one answer in C        softmax, KL in nats per image
    labels    (B, C) logits of C answers yes or no    sigmoids, sum of C Bernoulli KLs in nats per image
    values    (B, ...) numbers, channels first        squared error over the channel's own variance, mean of channels
    features  any tensors                             squared error over the tensor's own variance, mean of tensors
    maps      (B, C, H, W) logits of one answer in C  KL in nats per pixel; one channel (depth) counts as values

The divergence of a changed model from the dense one and the gradients of a calibration belong to one likelihood, so
that spectra and probes measure the same thing: for ``values`` and ``features`` it is the normal distribution around
the dense output whose variance is that of the output itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from ..models.libraries import said_classes
from ..models.running import images_of, labels_of

#: How a model is called where that is not ``model(images)``: a function of both that returns its outputs.
Forward = Callable[[nn.Module, Tensor], Any]
KINDS = ("classes", "labels", "values", "features", "maps")
#: Entries of dictionaries that are the answer, whatever else is there.
_ANSWERS = ("logits", "out", "predicted_depth")
#: Of detectors: two answers for every query, and nothing else that they return.
_DETECTIONS = ("logits", "pred_boxes")
#: Entries of Transformers' outputs that are not the answer.
_EXTRAS = (
    "loss", "hidden_states", "attentions", "reshaped_hidden_states", "past_key_values", "cross_attentions",
    "encoder_hidden_states", "encoder_attentions",
)  # fmt: skip
#: Numbers of the model, not of an image, that dual encoders return beside their answer; open_clip gives them no name.
_SCALARS = ("", "logit_scale", "logit_bias")
_PROBLEMS = {"regression": "values", "single_label_classification": "classes", "multi_label_classification": "labels"}


def check_kind(kind: str | None) -> str | None:
    """Raise ModelError unless ``kind`` is one of :data:`KINDS` or None."""
    if kind is not None and kind not in KINDS:
        raise ModelError(f"unknown kind of outputs {kind!r}; choose from {', '.join(KINDS)}")
    return kind


class Outputs:
    """The outputs of one model; called with what the model returns, it gives tensors (B, ...) in float32 or wider.

    Args:
        model: whose outputs they are.
        kind: one of :data:`KINDS`; None infers it from the first output:
            one number an image or a pixel -> values; (B, C) -> classes and (B, C, H, W) -> maps where the model says
            that it has C classes or names the output its logits; everything else -> features.
        unknown: what (B, C) outputs are of which the model says nothing.
        forward: called as ``forward(model, images)`` by :meth:`run`; ``model(images)`` by default.

    Attributes:
        kind: None until the first output has been seen.
    """

    def __init__(
        self, model: nn.Module, kind: str | None = None, unknown: str = "features", forward: Forward | None = None
    ) -> None:
        self.model, self.unknown, self.forward = model, unknown, forward
        self.kind = check_kind(kind)

    def inputs(self, batch: Any, place: str) -> Any:
        """What :meth:`run` takes of a batch; it has ``to``, ``shape``, ``device`` and ``dtype`` as tensors have."""
        return images_of(batch, place)

    def labels(self, batch: Any, device: torch.device) -> Any:
        """The labels of a batch on ``device``."""
        return labels_of(batch).to(device)

    def tensors(self, found: Any) -> tuple[Tensor, ...]:
        """Of what :meth:`run` has just returned, all that must be finite."""
        tensors: tuple[Tensor, ...] = found
        return tensors

    def run(self, images: Any) -> Any:
        """Call the model with (B, C, H, W) images; the tensors of its outputs, errors as below."""
        raw = self.model(images) if self.forward is None else self.forward(self.model, images)
        return self(raw, len(images))

    def __call__(self, raw: Any, count: int) -> tuple[Tensor, ...]:
        """The tensors of one batch of ``count`` images.

        Raises:
            ModelError: the output holds no tensors of ``count`` images, or none of this kind.
        """
        found = list(_leaves(raw))
        if {name for name, _ in found} >= {*_DETECTIONS}:
            found = [(f"{name} of detections", tensor) for name, tensor in found if name in _DETECTIONS]
        found = [(n, t) for n, t in found if t.ndim or n not in _SCALARS or len(found) == 1]
        for name, tensor in found:
            if not tensor.is_floating_point() or tensor.ndim < 1 or len(tensor) != count:
                raise ModelError(
                    f"the model returns {_shown(name, tensor)}, which is not one result an image for {count} images; "
                    "wrap it so that forward returns a floating-point tensor (batch, ...)"
                )
        if not found:
            raise ModelError(
                f"the model returns {type(raw).__name__}, which holds no tensor that could be its answer; wrap it so "
                "that forward returns a floating-point tensor (batch, ...)"
            )
        answer = next((tensor for name, tensor in found if name in _ANSWERS), None)
        if answer is None and _two_classifiers(self.model, found):
            answer = torch.stack([_wide(tensor) for _, tensor in found]).mean(0)  # as the model has it in evaluation
        if answer is None and (len(found) == 1 or self.kind in ("classes", "labels", "maps")):
            answer = found[0][1]
        named = any(name in _ANSWERS for name, _ in found)
        if answer is None:
            tensors = [_wide(tensor) for _, tensor in found]
            self.kind = self.kind or "features"
        else:
            answer = _wide(answer)
            depth = answer.ndim == 3 and any(name == "predicted_depth" for name, _ in found)
            tensors = [answer[:, None] if answer.ndim == 1 or depth else answer]
            self.kind = self.kind or self._infer(tensors[0], named)
        self._check(tensors[0])
        return tuple(tensors)

    def _infer(self, output: Tensor, named: bool) -> str:
        if output.ndim not in (2, 4):
            return "features"
        if output.shape[1] == 1:
            return "values"
        config = getattr(self.model, "config", None)
        problem = _PROBLEMS.get(str(getattr(config, "problem_type", None)))
        if problem is not None and output.ndim == 2:
            return problem
        if named or output.shape[1] in _class_counts(self.model):
            return "classes" if output.ndim == 2 else "maps"
        return self.unknown if output.ndim == 2 and said_classes(self.model) != 0 else "features"

    def _check(self, output: Tensor) -> None:
        shape = tuple(output.shape)
        if self.kind in ("classes", "labels") and output.ndim != 2:
            raise ModelError(
                f"the model returns a tensor of shape {shape}, not (batch, classes). Give it a classifier, or say what "
                f"it returns with outputs=, one of {', '.join(KINDS)}"
            )
        if self.kind == "maps" and output.ndim != 4:
            raise ModelError(f"outputs are said to be maps, but the model returns {shape}, not (batch, classes, H, W)")
        if self.kind == "classes" and output.shape[1] < 2:
            raise ModelError(
                "outputs are said to be classes, but the model has one output, and one class is no choice; say "
                "outputs='labels' for a yes or no, outputs='values' for a number"
            )

    @property
    def per_class(self) -> bool:
        """Whether the outputs are logits of answers that exclude each other."""
        return self.kind in ("classes", "maps")


def _leaves(raw: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of an output, nested as it may be."""
    if isinstance(raw, Tensor):
        yield name, raw
    elif isinstance(raw, Mapping):
        for key, value in raw.items():
            if key not in _EXTRAS:
                yield from _leaves(value, str(key))
    elif isinstance(raw, (tuple, list)):
        for value in raw:
            yield from _leaves(value, name)


def _two_classifiers(model: nn.Module, found: Sequence[tuple[str, Tensor]]) -> bool:
    """Distilled DeiT and LeViT in training mode return the logits of both."""
    shapes = {tuple(tensor.shape) for _, tensor in found}
    return len(found) == 2 and len(shapes) == 1 and any(hasattr(module, "head_dist") for module in model.modules())


def _class_counts(model: nn.Module) -> set[int]:
    """The numbers of classes that the model or a part of it says to have."""
    found = {getattr(getattr(model, "config", None), "num_labels", None)}
    found |= {getattr(module, "num_classes", None) for module in model.modules()}
    return {count for count in found if isinstance(count, int) and count > 1}


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _shown(name: str, tensor: Tensor) -> str:
    return f"{name or 'a tensor'} of shape {tuple(tensor.shape)} and {str(tensor.dtype).removeprefix('torch.')}"


# -- divergences ------------------------------------------------------------------------------------------------------


def divergence(kind: str, dense: Sequence[Tensor], changed: Sequence[Tensor]) -> float:
    """How far ``changed`` outputs are from those of the dense model on the same images, in the unit of the kind."""
    if kind in ("values", "features") or (kind == "maps" and dense[0].shape[1] == 1):
        return float(squared_error(kind, dense, changed, [_own_spread(kind, tensor) for tensor in dense]))
    d, c = dense[0], changed[0]
    if kind == "labels":
        return float(bernoulli_kl(c, d).sum(1).mean().clamp_min(0))
    d, c = answers(d).log_softmax(-1), answers(c).log_softmax(-1)
    return float(F.kl_div(c, d, log_target=True, reduction="batchmean").clamp_min(0))


def bernoulli_kl(changed: Tensor, dense: Tensor) -> Tensor:
    """KL(sigmoid(dense) || sigmoid(changed)) of every label, in nats."""
    yes, no = F.logsigmoid(dense), F.logsigmoid(-dense)
    return yes.exp() * (yes - F.logsigmoid(changed)) + no.exp() * (no - F.logsigmoid(-changed))


def squared_error(kind: str, dense: Sequence[Tensor], changed: Sequence[Tensor], spreads: Sequence[Tensor]) -> Tensor:
    """Squared error in units of ``spreads``, of every tensor: () of features, (C,) of values."""
    errors = []
    for d, c, spread in zip(dense, changed, spreads, strict=True):
        error = (c - d).square().mean(0)
        errors.append(error.sum() / spread if kind == "features" else (_channels(error) / spread).mean())
    return torch.stack(errors).mean()


def _own_spread(kind: str, dense: Tensor) -> Tensor:
    second, variance = dense.square().mean(0), (dense - dense.mean(0)).square().mean(0)
    return _spread_of(kind, second, variance)


def _spread_of(kind: str, second: Tensor, variance: Tensor) -> Tensor:
    if kind == "features":
        return _spread(second.sum(), variance.sum())
    return _spread(_channels(second), _channels(variance))


def _channels(x: Tensor) -> Tensor:
    """(C, ...) to (C,)."""
    return x.flatten(1).mean(1) if x.ndim > 1 else x


def _spread(second: Tensor, variance: Tensor) -> Tensor:
    """The variance of outputs over the images; their second moment where they do not vary, 1 where they are zero."""
    spread = torch.where(variance > 1e-12 * second, variance, second)
    return torch.where(spread > 0, spread, 1)


def answers(logits: Tensor) -> Tensor:
    """(B, C) or (B, C, H, W) logits to (B or pixels, C)."""
    return logits if logits.ndim == 2 else logits.movedim(1, -1).flatten(0, -2)


# -- draws ------------------------------------------------------------------------------------------------------------


class Spread:
    """How far outputs spread over the images seen so far, in float64 on the CPU."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.count = 0
        self.shift: list[Tensor] = []
        self.sums: list[tuple[Tensor, Tensor]] = []  # of the shifted outputs and of their squares

    def add(self, tensors: Sequence[Tensor]) -> None:
        """One batch of outputs."""
        if not self.count:
            self.shift = [tensor.detach().mean(0).cpu().double() for tensor in tensors]
            self.sums = [(torch.zeros_like(shift), torch.zeros_like(shift)) for shift in self.shift]
        for tensor, shift, (first, second) in zip(tensors, self.shift, self.sums, strict=True):
            moved = tensor.detach().cpu().double() - shift
            first += moved.sum(0)
            second += moved.square().sum(0)
        self.count += len(tensors[0])

    def result(self) -> list[Tensor]:
        """The unit of :func:`squared_error` for every tensor."""
        return [self.of(index) for index in range(len(self.sums))]

    def of(self, index: int) -> Tensor:
        """The unit of one of them."""
        shift, (first, second) = self.shift[index], self.sums[index]
        mean = first / self.count
        variance = (second / self.count - mean.square()).clamp_min(0)
        return _spread_of(self.kind, variance + (mean + shift).square(), variance)


class Draw:
    """Losses at answers drawn from the model's own prediction, whose gradients are those of the true Fisher matrix.

    For values and features the gradient of ``(output - answer)² / (2 variance)`` at ``answer = output + noise``; the
    variance is that of the outputs seen so far.
    """

    def __init__(self, outputs: Outputs, generator: torch.Generator) -> None:
        self.outputs, self.generator = outputs, generator
        self.spread: Spread | None = None

    def loss(self, tensors: Sequence[Tensor]) -> Tensor:
        """A scalar, the sum over the images."""
        kind, output = self.outputs.kind, tensors[0]
        if self.outputs.per_class and output.shape[1] > 1:
            logits = answers(output)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=self.generator)[:, 0]
            return F.cross_entropy(logits, drawn, reduction="sum") / (len(logits) / len(output)) ** 0.5
        if kind == "labels":
            drawn = torch.bernoulli(output.detach().sigmoid(), generator=self.generator)
            return F.binary_cross_entropy_with_logits(output, drawn, reduction="sum")
        self.spread = self.spread or Spread("features" if kind == "features" else "values")
        self.spread.add(tensors)
        return torch.stack([self._noise(tensor, i) for i, tensor in enumerate(tensors)]).sum() / len(tensors) ** 0.5

    def _noise(self, output: Tensor, index: int) -> Tensor:
        assert self.spread is not None
        scale = self.spread.of(index)
        if self.spread.kind == "values":
            scale = scale.view(-1, *[1] * (output.ndim - 2)) * output[0].numel()
        noise = torch.randn(output.shape, generator=self.generator, device=output.device, dtype=output.dtype)
        return (output * noise * scale.rsqrt().to(output.device, output.dtype)).sum()
