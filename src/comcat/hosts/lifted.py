"""Attention whose weights are handed to a function, in a form whose linear layers are called."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn.multihead import SeparateMultihead
from .changed import changed, patched

_MULTIHEAD_OWNS = {
    "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v", "out_proj",
}  # fmt: skip


def lifted(module: Any) -> nn.Module | str | None:
    """That form, why there is none, or None for a class that calls its linear layers itself."""
    if type(module) is nn.MultiheadAttention:
        return _multihead(module)
    if type(module).__module__ == "torchvision.models.swin_transformer":
        from .torchvision import lifted_window

        made = lifted_window(module)
        reason = None if made is None else changed(module.qkv, "qkv") or changed(module.proj, "proj")
        return reason or made
    return None


def _multihead(module: nn.MultiheadAttention) -> nn.Module | str:
    if module.bias_k is not None or module.bias_v is not None:
        return "keys and values have one more token, a parameter (add_bias_kv=True), which no product holds"
    if module.add_zero_attn:
        return "keys and values have one more token of zeros (add_zero_attn=True), which no product holds"
    if nn.utils.parametrize.is_parametrized(module):
        return "it has a parametrization, which would be lost: make it permanent first with remove_parametrizations"
    reason = patched(module, _MULTIHEAD_OWNS)
    return reason or SeparateMultihead(module)
