"""Where and in which precision a layer computes while Accelerate or diffusers keep its weights elsewhere."""

from __future__ import annotations

from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn


def place(module: nn.Module) -> torch.device:
    """Where a layer computes, also while Accelerate keeps its weights elsewhere."""
    hook: Any = getattr(module, "_hf_hook", None)
    tensors = [*module.parameters(), *module.buffers()]
    if tensors and tensors[0].is_meta and getattr(hook, "execution_device", None) is not None:
        return torch.device(cast(Any, hook).execution_device)
    return tensors[0].device if tensors else torch.get_default_device()


def values(root: nn.Module, module: nn.Module, name: str) -> Tensor:
    """A tensor of ``module`` inside ``root``, also while Accelerate or diffusers keep what it holds elsewhere."""
    tensor = cast(Tensor, getattr(module, name))
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        kept = getattr(one, "weights_map", None)
        if tensor.is_meta and kept is not None:
            return cast(Tensor, kept[name])
    for part in root.modules():  # group offloading to disk leaves uninitialized memory behind
        registry: Any = getattr(part, "_diffusers_hook", None)
        offloading = None if registry is None else registry.get_hook("group_offloading")
        group: Any = getattr(offloading, "group", None)
        if getattr(group, "_is_offloaded_to_disk", False) and tensor in group.tensor_to_key:
            # Written by diffusers in this process: nothing from outside, and one tensor of many is wanted.
            with safe_open(group.safetensors_file_path, "pt") as file:
                return cast(Tensor, file.get_tensor(group.tensor_to_key[tensor]))
    return tensor


def precision(module: nn.Module) -> torch.dtype:
    """In which dtype a layer computes: its weight's own, unless that is a form of storage (8 bit, packed 4 bit)."""
    if not _stored(weight := getattr(module, "weight", None)):
        return cast(Tensor, weight).dtype
    registry: Any = getattr(module, "_diffusers_hook", None)
    casting = None if registry is None else registry.get_hook("layerwise_casting")
    for dtype in (getattr(casting, "compute_dtype", None), getattr(module, "compute_dtype", None)):
        if dtype is not None:
            return cast(torch.dtype, dtype)
    bias = getattr(module, "bias", None)
    return torch.float32 if _stored(bias) else cast(Tensor, bias).dtype


def _stored(tensor: Any) -> bool:
    return not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype.itemsize < 2
