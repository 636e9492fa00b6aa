"""Writing per-head weights into stand-ins."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .attention import Fill
from .heads import HeadWeights, Input, as_parameter, flatten_heads


def fill_fused(original: Any) -> Fill:
    """For a :class:`~comcat.nn.LowRankAttention` that replaces an ``original`` with ``qkv`` and ``proj``."""

    def fill(small: Any, heads: HeadWeights, places: Tensor | None) -> None:
        weight, bias = heads.rows(Input("qkv", ("query", "key", "value")))
        small.qkv.weight = as_parameter(weight, original.qkv.weight)
        if bias is not None:
            small.qkv.bias = as_parameter(bias, original.qkv.bias)
        small.proj.weight = as_parameter(flatten_heads(heads.output).mT, original.proj.weight)
        if small.proj.bias is not None and heads.output_bias is not None:
            small.proj.bias = as_parameter(heads.output_bias, original.proj.weight)

    return fill
