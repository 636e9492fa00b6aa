"""Layers that look like known ones, but that somebody has changed: reasons to leave them as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..nn.linear import LowRankLinear
from ..nn.projections import HeadOutput, HeadProjection

#: Of what comcat itself has made.
ALREADY = "already low-rank; to reduce it further, make a new plan for the dense model and compress that"


def patched(module: nn.Module, owned: set[str]) -> str | None:
    """Why a module of a known class may compute something else than its class says; None if it does not."""
    if reason := patched_forward(module):
        return reason
    there = [*module._modules, *module._parameters, *module._buffers]
    foreign = [name for name in there if name not in owned]
    return f"it carries '{foreign[0]}', which its class does not have" if foreign else None


def patched_forward(module: nn.Module) -> str | None:
    """Why what a module computes cannot be told from its class; None if it can."""
    return "its forward was replaced by another function" if "forward" in vars(module) else None


def changed(linear: Any, name: str = "") -> str | None:
    """Why a linear layer is more than its weight and bias, with the way out; None if it is not."""
    its = f"its {name}" if name else "it"
    if isinstance(linear, (LowRankLinear, HeadProjection, HeadOutput)):
        return f"{its} is {ALREADY}"
    if nn.utils.parametrize.is_parametrized(linear):
        names = ", ".join(linear.parametrizations)
        return (
            f"{its} has a parametrization of {names}, which would be lost: make it permanent first with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if type(linear) not in (nn.Linear, nn.Conv2d) and f"{type(linear).__module__}.{type(linear).__name__}" != _TIMM:
        return f"{its} is a {type(linear).__name__}, not a plain nn.Linear"
    if "weight" not in linear._parameters:
        return (
            f"{its} computes its weight anew in every pass (a pruning mask, weight or spectral normalization), which "
            "would be lost: make it permanent first with torch.nn.utils.prune.remove, remove_weight_norm or "
            "remove_spectral_norm"
        )
    if "forward" in vars(linear):
        return f"the forward of {name or 'the layer'} was replaced by another function"
    foreign = [own for own in [*linear._modules, *linear._parameters, *linear._buffers] if own not in _LINEAR_OWNS]
    return f"{its} carries '{foreign[0]}', which a linear layer does not have" if foreign else None


_LINEAR_OWNS = {"weight", "bias"}
#: timm's own linear layer, which differs under TorchScript alone; by name, since not every model brings timm.
_TIMM = "timm.layers.linear.Linear"


#: Where PyTorch keeps what runs around a module's forward or around its state, and what to call it.
_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
    "_state_dict_hooks": "state-dict hook",
    "_state_dict_pre_hooks": "state-dict pre-hook",
    "_load_state_dict_pre_hooks": "load-state-dict pre-hook",
    "_load_state_dict_post_hooks": "load-state-dict hook",
}


def hooked(module: nn.Module) -> str | None:
    """What kind of hook somebody has put on a module, or None.

    Those by which transformers captures outputs are its own, put there in a first pass; a kept forward has them too.
    """
    for where, what in _HOOKS.items():
        if any(getattr(hook, "__module__", None) not in _OWN_HOOKS for hook in getattr(module, where, {}).values()):
            return what
    return None


_OWN_HOOKS = ("transformers.utils.output_capturing",)


class Sharing:
    """Who owns what in a model: parameters by all the layers that hold them, modules by all their parents."""

    def __init__(self, model: nn.Module) -> None:
        self.owners: dict[int, list[tuple[str, nn.Module]]] = {}
        self.parents: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.owners.setdefault(id(parameter), []).append((name, module))
            for key, child in module._modules.items():
                if child is not None:
                    self.parents.setdefault(id(child), []).append(f"{name}.{key}" if name else key)

    def reason(self, module: nn.Module, linears: Sequence[nn.Module]) -> str | None:
        """Why replacing these layers of ``module`` would untie them from others, or None.

        A module that is registered several times as a whole is no such case: it is replaced everywhere.
        """
        for linear in linears:
            for parameter in linear._parameters.values():
                others = [name for name, owner in self.owners.get(id(parameter), []) if owner is not linear]
                if others:
                    return f"its weights are also those of '{others[0]}', and reducing one would untie them"
            if linear is not module and len(self.parents.get(id(linear), [])) > 1:
                first, second = self.parents[id(linear)][:2]
                return f"'{first}' and '{second}' are one layer, and reducing one would untie them"
        return None
