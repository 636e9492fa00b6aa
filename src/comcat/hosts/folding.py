"""Linear layers with a batch normalization behind them, as one linear layer: ``y = (x W + b - mean) g / std + beta``.

That holds with the running statistics, which is how a model is evaluated, compressed and fine-tuned from then on. That
the layer really computes this is proven, as everything that is found by its parts.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..layers.base import is_pointwise, size
from ..layers.heads import as_parameter
from ..nn.linear import plain_linear

#: How deep inside an attention module such a pair may lie: ``q.ln``.
_DEPTH = 2


def folds(module: nn.Module) -> dict[str, nn.Module]:
    """The containers inside ``module`` that hold a linear layer and its batch normalization, as one layer each."""
    found = {}
    for path, child in module.named_modules():
        if path and path.count(".") < _DEPTH and (pair := parts(child)) is not None:
            found[path] = folded(*pair)
    return found


def parts(container: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """(linear layer or 1x1 convolution, batch normalization) where a module holds these two and nothing else."""
    own = [one for one in container.children() if not isinstance(one, nn.Identity)]
    if len(own) != 2 or container._parameters or container._buffers:
        return None
    linear, norm = own
    if not isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) or norm.running_mean is None or list(norm.children()):
        return None
    plain = type(linear) is nn.Linear or (
        type(linear) is nn.Conv2d
        and linear.kernel_size == linear.stride == (1, 1)
        and linear.groups == 1
        and linear.padding in ((0, 0), "same", "valid")
    )
    return (linear, norm) if plain and size(linear)[1] == norm.num_features else None


def folded(linear: Any, norm: Any) -> nn.Module:
    """One linear layer that computes both."""
    with torch.no_grad():
        gain = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            gain = gain * norm.weight.double()
        shift: Tensor = -norm.running_mean.double()
        if linear.bias is not None:
            shift = shift + linear.bias.double()
        bias = shift * gain + (0.0 if norm.bias is None else norm.bias.double())
        weight = linear.weight.double() * gain.view(-1, *[1] * (linear.weight.dim() - 1))
    made = plain_linear(*size(linear), True, is_pointwise(linear), "meta")
    made.weight = as_parameter(weight, linear.weight)
    made.bias = as_parameter(bias, linear.weight)
    return cast(nn.Module, made.train(linear.training))
