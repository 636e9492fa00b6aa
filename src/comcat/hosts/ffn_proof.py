"""What an FFN that was recognised by its parts has to show: its linear layers are called, and its neurons are free.

An FFN without some neurons must put out what the original does where nothing leads out of them.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.base import Finding, Layer
from ..layers.ffn import FFNLayer
from ..nn.copies import copy_with
from ..nn.linear import LowRankLinear, plain_linear
from .proof import Trial

#: Why a block of convolutions is left alone, such as an inverted bottleneck: there are many, and they are no FFN.
CONVOLUTIONS = "its 1x1 convolutions have more between them than an activation"
#: What the classes of FFNs are called that have filters over the image or norms between 1x1 convolutions.
_CALLED_FFN = re.compile("mlp|ffn|feed_?forward", re.IGNORECASE)


def prove_ffn(found: Layer, trial: Trial) -> Finding:
    """Whether its low-rank form is exact, and its neurons can be left out."""
    assert isinstance(found, FFNLayer)
    layer, base = FFNLayer(found.name, trial.base, found.paths), trial.base
    if "gate" in layer.paths and not _beside(trial, layer):
        return Finding("its linear layers follow on each other, or are given different inputs: no gate beside units")
    low = {path: _two(layer.linears[role]) for role, path in layer.paths.items()}
    if not trial.holds(copy_with(base, low)):
        return Finding(f"it reads its weights in a way of its own ({trial.said()})")
    count = max(1, layer.hidden // 2)
    keep = torch.randperm(layer.hidden, generator=torch.Generator().manual_seed(3))[:count].sort().values
    last: Any = layer.linears["fc2"]
    weight = torch.zeros_like(last.weight)
    weight[:, keep] = last.weight[:, keep]
    reference = trial.run(copy_with(base, {layer.paths["fc2"]: _linear_like(last, weight, last.bias)}))
    small: dict[str, nn.Module] = {layer.paths["fc2"]: _linear_like(last, last.weight[:, keep], last.bias)}
    for role, linear in layer.firsts.items():
        rows = torch.cat([keep + i * layer.hidden for i in range(linear.weight.shape[0] // layer.hidden)])
        bias = None if linear.bias is None else linear.bias[rows]
        small[layer.paths[role]] = _linear_like(linear, linear.weight[rows], bias)
    why = None
    if not trial.holds(copy_with(base, small), reference):
        why = f"hidden units depend on each other: a norm or another operation acts over them ({trial.said()})"
        if not _behind(trial, layer):
            return Finding("its linear layers do not follow on each other: there are no hidden units between them")
        if layer.feature_axis == 1 and not (_CALLED_FFN.search(type(base).__name__) or _by_pixel(trial)):
            return Finding(CONVOLUTIONS)
    return Finding(conclude=lambda one: FFNLayer(one.name, one.module, found.paths, why))


def _beside(trial: Trial, layer: FFNLayer) -> bool:
    """Whether gate and units have the same input."""
    seen: list[Tensor] = []
    hooks = [
        linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
        for linear in layer.firsts.values()
    ]
    try:
        trial.run(trial.base)
    finally:
        for hook in hooks:
            hook.remove()
    return len(seen) == 2 and seen[0].shape == seen[1].shape and bool((seen[0] == seen[1]).all())


def _behind(trial: Trial, layer: FFNLayer) -> bool:
    """Whether what the last linear layer is given depends on those in front of it."""
    seen: list[Tensor] = []
    other = {layer.paths[role]: _linear_like(one, one.weight * 2, one.bias) for role, one in layer.firsts.items()}
    last = layer.linears["fc2"]
    handle = last.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    try:
        for module in (trial.base, copy_with(trial.base, other)):
            trial.run(module)
    finally:
        handle.remove()
    return len(seen) == 2 and not torch.equal(*seen)


def _by_pixel(trial: Trial) -> bool:
    """Whether every pixel is treated by itself: the mirrored image comes out mirrored, and not as it was."""
    args, kwargs = trial.call
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or args[0].dim() != 4 or trial.reference is None:
        return False
    out = Trial(trial.base, ((args[0].flip(-2, -1),), {})).reference
    # One pixel, or units that never fire, are their own mirror image, which shows nothing.
    return (
        out is not None
        and not trial.holds(trial.base, out)
        and trial.holds(trial.base, [one.flip(-2, -1) for one in out])
    )


def _two(linear: Any) -> LowRankLinear:
    """The same linear layer as a pair of full rank."""
    outer, inner = linear.weight.shape[:2]
    pointwise = isinstance(linear, nn.Conv2d)
    made = LowRankLinear(inner, outer, min(inner, outer), pointwise=pointwise, dtype=torch.float64)
    matrix, eye = linear.weight.flatten(1), torch.eye(min(inner, outer), dtype=torch.float64)
    down, up = (eye, matrix) if inner <= outer else (matrix, eye)
    made.down.weight = nn.Parameter(down.reshape(made.down.weight.shape), False)
    made.up.weight = nn.Parameter(up.reshape(made.up.weight.shape), False)
    bias = torch.zeros(outer, dtype=torch.float64) if linear.bias is None else linear.bias
    made.up.bias = nn.Parameter(bias, False)
    return made


def _linear_like(linear: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    pointwise = isinstance(linear, nn.Conv2d)
    made = plain_linear(weight.shape[1], weight.shape[0], bias is not None, pointwise, dtype=torch.float64)
    made.weight = nn.Parameter(weight.clone(), False)
    if bias is not None:
        made.bias = nn.Parameter(bias.clone(), False)
    return made
