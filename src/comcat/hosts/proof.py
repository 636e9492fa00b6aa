"""Whether a layer that was recognised by its parts computes what comcat takes it to compute.

One layer of each kind is run by itself, in float64, on what it is given when the model sees random images, with its
weights disturbed so that nothing is zero by chance.

What is tried is the kind's own (:mod:`comcat.hosts.attention_proof`, :mod:`comcat.hosts.ffn_proof`). What does not
agree to rounding stays dense, and the difference is said.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.base import Finding, Layer
from ..models.example import Example, example_for, given_example
from ..models.modes import evaluating, layers_called
from ..models.running import explained, still, tensors_in

#: Largest difference, relative to the largest output, that counts as rounding in float64.
ROUNDING = 1e-9
#: The same for a host that computes a part of itself in float32, whatever it is given.
COARSE = 1e-6
#: Images in the batch that the model sees: a prime, so that what depends on them can be told from what does not.
_IMAGES = 3
#: Why a layer stays dense of which nothing is seen.
NOT_CALLED = "nothing passes it when the model is called with the example; give another (example=)"
Call = tuple[tuple[Any, ...], dict[str, Any]]


def prove(
    model: nn.Module, layers: Sequence[Layer], size: Sequence[int], example: Any = None
) -> tuple[list[Layer], dict[str, str]]:
    """The layers as far as they are proven, in their order, and by name why others stay dense.

    Args:
        size: (C, H, W) of the images that the model is shown; example: what it is called with instead.
    """
    if all(layer.proof is None for layer in layers):
        return list(layers), {}
    shown = example_for(model, size, _IMAGES, seed=0) if example is None else given_example(example, model)
    called, calls = _calls(model, layers, shown)
    findings = {}
    with still(model):
        for signature, (layer, call) in calls.items():
            findings[signature] = _find(layer, call, shown.images)
    proven: list[Layer] = []
    reasons: dict[str, str] = {}
    for layer in layers:
        if layer.name not in called:
            reasons[layer.name] = NOT_CALLED
            continue
        if layer.proof is not None:
            finding = findings[_signature(layer)]
            if finding.reason is not None:
                reasons[layer.name] = finding.reason
                continue
            layer = finding.conclude(layer)
            layer.conclusion = finding.conclude
        proven.append(layer)
    return proven, reasons


def _signature(layer: Layer) -> Any:
    shapes = tuple(tuple(p.shape) for p in layer.module.parameters())
    classes = tuple(type(m).__qualname__ for m in layer.module.modules())
    return layer.kind, classes, shapes, tuple(layer.linears)


def _calls(
    model: nn.Module, layers: Sequence[Layer], example: Example
) -> tuple[set[str], dict[Any, tuple[Layer, Call]]]:
    """(Layers that the model calls; the first of each signature, and its call in float64 on the host)."""
    called: set[str] = set()
    calls: dict[Any, tuple[Layer, Call]] = {}

    def hook(layer: Layer) -> Callable[..., None]:
        signature = _signature(layer)

        def caught(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called.add(layer.name)
            if layer.proof is not None and signature not in calls:
                calls[signature] = layer, (_precise(args), _precise(kwargs))

        return caught

    handles = [layer.module.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer in layers]
    try:
        with evaluating(model), torch.no_grad(), explained(example.pixels):
            example.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return called, calls


def _precise(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu().clone()
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return type(value)((key, _precise(one)) for key, one in value.items())
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(map(_precise, value))
    # What a layer writes keys and values into has to be as it was in every trial.
    return copy.deepcopy(value) if hasattr(value, "get_seq_length") else value


def _find(layer: Layer, call: Call, images: int) -> Finding:
    tensors = list(tensors_in(call[0])) or list(tensors_in(call[1]))
    if not tensors or not _of_images(tensors[0], images):
        return Finding("what it is given does not depend on the images")
    try:
        base = nn.Module.to(copy.deepcopy(layer.module), "cpu", torch.float64)  # models of diffusers have remarks on it
        base.eval()
        base.requires_grad_(False)
    except Exception as error:
        return Finding(f"it cannot be copied ({error})")
    _disturb(base)
    trial = Trial(base, call)
    if trial.reference is None:
        return Finding(f"it does not run by itself in float64 ({trial.error})")
    assert layer.proof is not None
    return layer.proof(layer, trial)


def _of_images(x: Tensor, images: int) -> bool:
    """Whether there is something of every image in it: in the first axis, or in the second of (1 or tokens, B, D)."""
    if x.dim() == 3 and (x.shape[1] == images or (x.shape[0] == 1 and x.shape[1] % images == 0)):
        return True
    return x.dim() > 0 and x.shape[0] % images == 0


def _disturb(module: nn.Module) -> None:
    """Weights that are zero, or one, by initialization tell nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = parameter.square().mean().sqrt() if parameter.numel() else 0.0
        parameter.add_(noise * (0.1 * scale + 0.02))


class Trial:
    """One module with its call: how far other modules are from it.

    Attributes:
        rounding: up to which difference they count as the same.
    """

    def __init__(self, base: nn.Module, call: Call) -> None:
        self.base, self.call = base, call
        self.error: Exception | None = None
        self.apart = 0.0
        self.rounding = ROUNDING
        self.reference = self.run(base)

    def run(self, module: nn.Module) -> list[Tensor] | None:
        args, kwargs = _precise(self.call[0]), _precise(self.call[1])  # some hosts write into what they are given
        try:
            with torch.no_grad(), layers_called():
                found = list(tensors_in(module(*args, **kwargs)))
        except Exception as error:  # whatever a host raises where a width is not what it expects
            self.error = error
            return None
        return found or None

    def holds(self, module: nn.Module, reference: list[Tensor] | None = None) -> bool:
        """Whether it puts out the same, to rounding; what it differed by is in ``apart``."""
        self.apart = self.difference(module, reference)
        return self.apart <= self.rounding

    def said(self) -> str:
        """How far the last module was off."""
        return "a narrower one does not run" if self.apart == float("inf") else f"difference {self.apart:.2g}"

    def difference(self, module: nn.Module, reference: list[Tensor] | None = None) -> float:
        """The largest, relative to the largest output; infinite where it does not run."""
        other = self.run(module)
        reference = reference or self.reference
        if other is None or reference is None or [o.shape for o in other] != [r.shape for r in reference]:
            return float("inf")
        pairs = zip(other, reference, strict=True)
        return max((apart(ours, theirs) for ours, theirs in pairs if theirs.is_floating_point()), default=0.0)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest finite entry of the second.

    Infinities (of a mask, say) and NaN must stand at the same places; where they do not, it is infinite.
    """
    finite = theirs.isfinite()
    a, b = (t.masked_fill(finite, 0) for t in (ours, theirs))
    if not torch.equal(a.nan_to_num(), b.nan_to_num()) or not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    a, b = ours[finite], theirs[finite]
    worst = float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))
    return worst if math.isfinite(worst) else float("inf")
