"""Is this a model that can be worked on as it is? Asked first by every public entry.

A wrapper (compiled, parallel, adapted), a quantized or an empty model has the layers that comcat knows somewhere
inside, and many steps would go through before one fails or, worse, does nothing. It is refused with the way out.
Frameworks are recognised by where a class was defined, so that none is imported for the question.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import ModelError

#: Class name -> what it is and how to come to the plain model; for whole models and for modules inside.
_WRAPPERS = {
    "OptimizedModule": ("compiled by torch.compile", "use {at}._orig_mod, and compile the result"),
    "DataParallel": ("wrapped in DataParallel", "use {at}.module, and wrap the result"),
    "DistributedDataParallel": ("wrapped in DistributedDataParallel", "use {at}.module, and wrap the result"),
    "FullyShardedDataParallel": ("sharded by FSDP", "compress the model before it is sharded"),
    "FSDPModule": ("sharded by FSDP", "compress the model before it is sharded"),
    "DeepSpeedEngine": ("wrapped by DeepSpeed", "use {at}.module of an unsharded run"),
    "AveragedModel": ("a weight average", "use {at}.module"),
    "ModelEma": ("a weight average", "use {at}.module"),
    "ModelEmaV2": ("a weight average", "use {at}.module"),
    "ModelEmaV3": ("a weight average", "use {at}.module"),
    "PeftModel": ("a PEFT model with adapters", "merge them first: {at}.merge_and_unload()"),
    "BaseTuner": ("a PEFT model with adapters", "merge them first: {at}.merge_and_unload()"),
    "BaseTunerLayer": ("adapted by PEFT", "merge the adapters first: merge_and_unload() of the PEFT model"),
    "ScriptModule": ("compiled by TorchScript", "use the Python model that it was made from, and script the result"),
    "GraphModule": ("a traced graph (torch.fx or torch.export)", "use the Python model that it was traced from"),
}
#: Packages whose modules hold quantized weights.
_QUANTIZED = (
    "torch.ao.nn.",
    "torch.nn.quantized",
    "torchao.",
    "bitsandbytes.",
    "auto_gptq.",
    "optimum.quanto.",
    "quanto.",
)
_DENSE = "compress the model in floating point, and quantize the result"


def check_plain(model: Any) -> None:
    """Raise ModelError, with the way out, unless ``model`` is a plain PyTorch module with floating-point weights."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"a model is a torch.nn.Module, not {type(model).__name__}; make one with timm.create_model")
    for name, module in model.named_modules():
        found = _wrapper(module)
        if found:
            what, advice = found
            at = f"model.{name}" if name else "model"
            raise ModelError(f"{_named(name, model)} is {what}: {advice.format(at=at)}")
        if type(module).__module__.startswith(_QUANTIZED):
            raise ModelError(f"{_named(name, model)} is a quantized {type(module).__name__}: {_DENSE}")
    for name, tensor in _tensors(model):
        if isinstance(tensor, nn.UninitializedParameter):
            raise ModelError(f"parameter '{name}' has no shape yet: run the model once on an image first")
        if tensor.is_inference():
            raise ModelError(
                f"parameter '{name}' was made under torch.inference_mode, which allows neither gradients nor changes: "
                "make or load the model outside of it, or under torch.no_grad"
            )
        if tensor.is_meta:
            raise ModelError(
                f"parameter '{name}' is on the meta device, without values: load the weights first (of a model that "
                "Accelerate has dispatched or offloaded: load it whole, on one device)"
            )
        if type(tensor).__module__.startswith("torch.distributed"):
            raise ModelError(
                f"parameter '{name}' is a {type(tensor).__name__}, one shard of it: compress before sharding"
            )
        if type(tensor) not in (torch.Tensor, nn.Parameter) or type(tensor.data) is not torch.Tensor:
            kind = type(tensor.data if type(tensor) is nn.Parameter else tensor).__name__
            raise ModelError(f"parameter '{name}' is a {kind}, not an ordinary tensor: {_DENSE}")
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.dtype.itemsize < 2:
            raise ModelError(f"parameter '{name}' is of {str(tensor.dtype).removeprefix('torch.')}: {_DENSE}")


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters, also where a wrong model has something else under their name."""
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{prefix}.{name}" if prefix else name), parameter


def _wrapper(module: nn.Module) -> tuple[str, str] | None:
    for cls in type(module).__mro__:
        library = cls.__module__.partition(".")[0]
        if cls.__name__ in _WRAPPERS and library in ("torch", "timm", "peft", "deepspeed"):
            return _WRAPPERS[cls.__name__]
    return None


def _named(name: str, model: nn.Module) -> str:
    return f"module '{name}'" if name else f"the model ({type(model).__name__})"
