"""Whether a model built again from its description is the model: tensors, modules, attributes and outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.example import example_for, given_example
from ..models.modes import evaluating
from ..models.profile import default_input_size
from ..models.running import still
from ..models.traits import buffers, differences
from ..nn import SMALL
from ..planning.plan import Plan

#: How far two evaluations of the same model may be apart, by dtype, relative to the largest output: other strides or
#: another thread count lead to other kernels, which sum in another order.
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def standing(plan: Plan, model: nn.Module) -> Plan:
    """The plan without layers that somebody has replaced since, such as a classifier for other classes."""
    there = {name for name, _ in model.named_modules()}
    kept = {n: choice for n, choice in plan.layers.items() if n in there and (not choice or "neurons" in choice)}
    for name, choice in plan.layers.items():
        inside = [m for n, m in model.named_modules() if n == name or n.startswith(f"{name}.")]
        if name not in kept and any(isinstance(module, SMALL) for module in inside):
            kept[name] = choice
    return replace(plan, layers={name: kept[name] for name in plan.layers if name in kept})


def changed(model: nn.Module, built: nn.Module, advice: str) -> dict[str, dict[str, Any]]:
    """Plain attributes, by module, that ``model`` has other than ``built``.

    Raises:
        CheckpointError: something else differs, which attributes cannot bring back.
    """
    attributes: dict[str, dict[str, Any]] = {}
    for found in differences(model, built):
        if not found.plain:
            raise CheckpointError(
                f"the model cannot be rebuilt from its architecture ({found}), so that the rebuilt model computes "
                f"something else; {advice}"
            )
        attributes.setdefault(found.module, {})[found.attribute] = found.value
    return attributes


def check_same(model: nn.Module, again: nn.Module, advice: str, shown: Any = None) -> None:
    """Raise CheckpointError unless ``again`` is ``model``: bitwise in its tensors, to rounding in its output.

    Args:
        shown: a call of the model. Without one, outputs are compared where comcat knows what the model is called with:
            of denoisers it does not.
    """
    there, here = model.state_dict(), again.state_dict()
    for name, tensor in {**buffers(model), **there}.items():
        other = here[name] if name in here else dict(again.named_buffers(remove_duplicate=False)).get(name)
        if other is None or not _equal(tensor, other):
            raise CheckpointError(f"'{name}' of the rebuilt model is another tensor; {advice}")
    for found in differences(model, again):
        raise CheckpointError(f"the rebuilt model computes something else: {found}; {advice}")
    parameter = next(model.parameters())
    again = again.to(parameter.device)
    if shown is None and type(model).__module__.startswith("diffusers."):
        return
    with torch.device("cpu"):  # whatever the caller has set
        if shown is None:
            example = example_for(model, default_input_size(model), seed=0)
        else:
            example = given_example(shown, model)
    outputs = []
    for each in (model, again):
        with torch.no_grad(), evaluating(each), still(each):
            torch.manual_seed(0)  # for those that draw in evaluation too, such as masked autoencoders
            outputs.append(example.run(each))
    if not _close(*outputs):
        raise CheckpointError(f"the rebuilt model computes something else; {advice}")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.detach().cpu(), b.detach().cpu().to(a.dtype))


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_close, a, b))
    if not isinstance(a, Tensor):
        return True
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape and torch.equal(a, b)
    same = torch.equal(a.isfinite(), b.isfinite())
    x, y = (torch.nan_to_num(t.detach().double(), posinf=0.0, neginf=0.0) for t in (a, b))
    return same and float((x - y).abs().max()) <= ROUNDING.get(a.dtype, 1e-4) * float(x.abs().max().clamp_min(1e-300))
