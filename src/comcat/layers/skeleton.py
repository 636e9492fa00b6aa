"""Empty modules of the right shape for a choice of widths: filled by the factors, or by a saved model's tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..nn.linear import LowRankLinear
from .sites import AttentionSite, Choice, FFNSite, HeadSite, Site, check_choice


def empty_modules(site: Site, choice: Choice) -> dict[str, nn.Module]:
    """Uninitialized stand-ins by full name, in the mode of the site; empty for the dense choice.

    Raises:
        PlanError: the choice cannot be built at this site.
    """
    check_choice(site, choice)
    if not choice:
        return {}
    if isinstance(site, AttentionSite):
        return {site.name: site.build(choice.get("qk", site.head_dim), choice.get("vo", site.head_dim))}
    new = _linears(site, choice)
    for module in new.values():
        module.train(site.module.training)
    return new


def _linears(site: FFNSite | HeadSite, choice: Choice) -> dict[str, nn.Module]:
    if isinstance(site, FFNSite) and "neurons" in choice:
        return {f"{site.name}.{fc}": module for fc, module in _narrow(site, choice).items()}
    names = {"rank": site.name} if isinstance(site, HeadSite) else {p: f"{site.name}.{p}" for p in choice}
    new: dict[str, nn.Module] = {}
    for part, rank in choice.items():
        linear = site.linears["linear" if part == "rank" else part]
        new[names[part]] = LowRankLinear(linear.in_features, linear.out_features, rank, **like(linear))
    return new


def _narrow(site: FFNSite, choice: Choice) -> dict[str, nn.Module]:
    fc1, fc2, width = site.fc1, site.fc2, choice["neurons"]
    # The second bias takes up the mean of the dropped neurons.
    sizes = {"fc1": (fc1.in_features, width, fc1.bias is not None), "fc2": (width, fc2.out_features, True)}
    return {
        fc: LowRankLinear(inner, outer, choice[fc], **like(site.linears[fc]))
        if fc in choice
        else nn.Linear(inner, outer, bias=bias, **like(site.linears[fc]))
        for fc, (inner, outer, bias) in sizes.items()
    }


def like(linear: nn.Linear) -> dict[str, Any]:
    """Keyword arguments for a module on the device and in the dtype of ``linear``."""
    weight: torch.Tensor = linear.weight
    return {"device": weight.device, "dtype": weight.dtype}
