"""Empty modules of the right shape for a choice of widths: filled by the factors, or by a saved model's tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .linear import LowRankLinear
from .sites import AttentionSite, Choice, FFNSite, HeadSite, Site, check_choice


def empty_modules(site: Site, choice: Choice) -> dict[str, nn.Module]:
    """Uninitialized stand-ins by full name; empty for the dense choice.

    Raises:
        PlanError: the choice cannot be built at this site.
    """
    check_choice(site, choice)
    if not choice:
        return {}
    if isinstance(site, AttentionSite):
        return {site.name: site.build(choice.get("qk", site.head_dim), choice.get("vo", site.head_dim))}
    if isinstance(site, FFNSite) and "neurons" in choice:
        fc1, fc2, width = site.fc1, site.fc2, choice["neurons"]
        return {
            f"{site.name}.fc1": nn.Linear(fc1.in_features, width, bias=fc1.bias is not None, **like(fc1)),
            # The second bias takes up the mean of the dropped neurons.
            f"{site.name}.fc2": nn.Linear(width, fc2.out_features, bias=True, **like(fc2)),
        }
    names = {"rank": site.name} if isinstance(site, HeadSite) else {p: f"{site.name}.{p}" for p in choice}
    new: dict[str, nn.Module] = {}
    for part, rank in choice.items():
        linear = site.linears["linear" if part == "rank" else part]
        new[names[part]] = LowRankLinear(linear.in_features, linear.out_features, rank, **like(linear))
    return new


def like(linear: nn.Linear) -> dict[str, Any]:
    """Keyword arguments for a module on the device and in the dtype of ``linear``."""
    weight: torch.Tensor = linear.weight
    return {"device": weight.device, "dtype": weight.dtype}
