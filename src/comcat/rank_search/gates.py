"""Rank gates: a whole distribution over widths, evaluated by one forward pass of the dense model.

Truncated factorizations are nested, so the mixture over candidate widths ``r_a`` with probabilities ``p_a`` needs no
candidate matrices: component j of a product carries the gate

    m_j = sum_{a: r_a > j} p_a          sum_a p_a U[:, :r_a] V[:r_a] = U diag(m) V

(COMCAT, arXiv 2305.17235, Eq. 6, evaluated in one term). The gates act on weights, not on activations: a fully factored
layer has the shape of the dense one, so its module, whatever the host does in it, runs as it is on gated weights.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..evaluation.outputs import Outputs
from ..layers.factors import AttentionFactors, FFNFactors, SiteFactors
from ..layers.heads import as_parameter, zeros_like_bias
from ..layers.sites import AttentionSite, Choice, FFNSite, Site
from ..linalg.factorize import REFIT_RIDGE, whitening
from ..models.running import double, explained
from ..nn.linear import LowRankLinear


class _Refitted(nn.Module):
    """A linear layer on nested subsets of its inputs, refitted for every subset at once.

    With ``C = L L^T`` the covariance of the inputs in the order in which they are kept, ``e = L^-1 (x - mean)`` are
    innovations: the first m of them are a function of the first m inputs, and the best prediction of the others from
    those drops the rest of ``e``. So the mixture of the refitted weights is ``W = L^-T diag(m) (L^T W)``.

    Args:
        weight: (n, D_out), bias: (D_out,), mean: (n,), in the layer's own order of inputs.
        covariance: (n, n) in that order, or None for white inputs; order: (n,) indices, kept longest first.
        like: the layer's weight, for dtype, device and ``requires_grad``.
    """

    root: Tensor | None
    mean: Tensor
    back: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor, mean: Tensor, covariance: Tensor | None, order: Tensor, like: Tensor
    ) -> None:
        super().__init__()
        weight = double(weight.detach())
        order = order.to(weight.device)
        weight, mean = weight[order], double(mean)[order]
        root = None
        if covariance is not None:
            root = whitening(covariance[order][:, order], REFIT_RIDGE)  # L^T
            weight = root @ weight
            mean = torch.linalg.solve_triangular(root.mT, mean[:, None], upper=False)[:, 0]
        self.weight, self.bias = as_parameter(weight, like), as_parameter(bias.detach(), like)
        self.register_buffer("root", None if root is None else root.to(like))
        self.register_buffer("mean", mean.to(like))
        self.register_buffer("back", order.argsort().to(like.device))

    def forward(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (D_out, n) and bias (D_out,) for the gates (n,), given in the order in which inputs are kept."""
        gated = mask[:, None] * self.weight
        bias = self.bias + self.mean @ (self.weight - gated)
        weight = gated if self.root is None else torch.linalg.solve_triangular(self.root, gated, upper=True)
        return weight[self.back].mT, bias


class SiteGates(nn.Module, ABC):
    """The full factors of one site as trainable tensors; called with one mask per part, it gives gated weights."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    @abstractmethod
    def forward(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values by full parameter name for ``torch.func.functional_call``; a mask is (full,)."""


class AttentionGates(SiteGates):
    """Query rows carry the gates of the query-key product, the output projection those of value-output.

    Component j of a layer is component j of each of its heads, and the heads are refitted together.
    """

    def __init__(self, site: AttentionSite, factors: AttentionFactors, parts: Sequence[str]) -> None:
        super().__init__(site.name)
        self.num_heads, self.head_dim = site.num_heads, site.head_dim
        built: Any = factors.build(dict.fromkeys(parts, site.head_dim))[site.name]
        self.qkv_weight = nn.Parameter(built.qkv.weight.detach().clone())
        self.qkv_bias = None if built.qkv.bias is None else nn.Parameter(built.qkv.bias.detach().clone())
        weight, covariance = built.proj.weight.detach().mT, None  # (H d, D_out)
        mean = torch.zeros_like(weight[:, 0])
        if factors.moments and "vo" in parts:
            down = torch.block_diag(*factors.vo.down)
            root = whitening(factors.moments["z"]) @ down  # as where outputs are refitted
            covariance = root.mT @ root
            mean = double(factors.moments["z_mean"]) @ down
        elif self.qkv_bias is not None:
            mean = self.qkv_bias.detach().unflatten(0, (3, -1))[2]
        order = torch.arange(len(weight)).view(self.num_heads, -1).mT.flatten()
        bias = zeros_like_bias(built.proj.bias, weight.shape[1], weight)
        self.output = _Refitted(weight, bias, mean, covariance, order, built.proj.weight)

    def forward(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        ones = torch.ones(self.head_dim, dtype=self.qkv_weight.dtype, device=self.qkv_weight.device)
        queries = masks.get("qk", ones).repeat(self.num_heads)
        rows = torch.cat([queries, ones.repeat(2 * self.num_heads)])
        weight, bias = self.output(masks.get("vo", ones).repeat_interleave(self.num_heads))
        values = {
            f"{self.prefix}.qkv.weight": self.qkv_weight * rows[:, None],
            f"{self.prefix}.proj.weight": weight,
            f"{self.prefix}.proj.bias": bias,
        }
        if self.qkv_bias is not None:
            values[f"{self.prefix}.qkv.bias"] = self.qkv_bias * rows
        return values


class LinearGates(SiteGates):
    """One low-rank linear layer: ``W = up diag(m) down``, with the mean of what is dropped in the bias."""

    mean: Tensor

    def __init__(self, name: str, part: str, full: LowRankLinear, mean: Tensor | None) -> None:
        super().__init__(name)
        self.part = part
        self.down = nn.Parameter(full.down.weight.detach().clone())
        self.up = nn.Parameter(full.up.weight.detach().clone())
        self.bias = nn.Parameter(full.up.bias.detach().clone())
        inputs = self.down.new_zeros(self.down.shape[1]) if mean is None else mean.to(self.down)
        self.register_buffer("mean", self.down.detach() @ inputs)

    def forward(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = masks[self.part]
        weight = self.up @ (mask[:, None] * self.down)
        bias = self.bias + self.up @ ((1 - mask) * self.mean)
        return {f"{self.prefix}.weight": weight, f"{self.prefix}.bias": bias}


class NeuronGates(SiteGates):
    """Hidden units of an FFN in the order of their elimination; the first matrix stays as it is."""

    def __init__(self, site: FFNSite, factors: FFNFactors) -> None:
        super().__init__(f"{site.name}.fc2")
        weight = site.fc2.weight.detach().mT  # (M, D_out)
        mean = factors.moments["h_mean"] if factors.moments else torch.zeros_like(weight[:, 0])
        covariance = double(factors.moments["h"]) if factors.moments else None
        bias = zeros_like_bias(site.fc2.bias, weight.shape[1], weight)
        self.output = _Refitted(weight, bias, mean, covariance, factors.neurons.order, site.fc2.weight)

    def forward(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        weight, bias = self.output(masks["neurons"])
        return {f"{self.prefix}.weight": weight, f"{self.prefix}.bias": bias}


def site_gates(site: Site, factors: SiteFactors[Any], parts: Sequence[str]) -> list[SiteGates]:
    """The gates of the given parts of a site, at full width equal to the dense layer."""
    if isinstance(site, AttentionSite):
        assert isinstance(factors, AttentionFactors)
        return [AttentionGates(site, factors, parts)]
    if "neurons" in parts:
        assert isinstance(factors, FFNFactors)
        assert isinstance(site, FFNSite)
        return [NeuronGates(site, factors)]
    means = {"fc1": "x_mean", "fc2": "h_mean", "rank": "x_mean"}
    full: Choice = {part: site.full[part] for part in parts}
    built = factors.build(full)
    gates: list[SiteGates] = []
    for part, (name, module) in zip(parts, built.items(), strict=True):
        assert isinstance(module, LowRankLinear)
        gates.append(LinearGates(name, part, module, factors.moments.get(means[part])))
    return gates


class GatedModel(nn.Module):
    """A copy of a dense model on the weights of the mixture; called with (images, masks).

    ``masks`` has one dictionary per site, part -> (full,), as :meth:`masks` makes them of probabilities. Gates and the
    model's other parameters are trainable. Evaluation mode: ranks are judged without dropout and dropped paths.

    Args:
        parts: (site, part, candidates) per row of the distribution, the rows of a site together.

    Attributes:
        kind: of the outputs.
    """

    def __init__(
        self, model: nn.Module, factors: Mapping[str, SiteFactors[Any]], parts: Sequence[tuple[Site, str, list[int]]]
    ) -> None:
        super().__init__()
        self.kind = "classes"
        self.model = copy.deepcopy(model).eval()
        sites = {site.name: site for site, _, _ in parts}
        self.rows = [(site.name, part) for site, part, _ in parts]
        self.gates = nn.ModuleDict()
        for name, site in sites.items():
            own = [part for other, part in self.rows if other == name]
            self.gates[name.replace(".", "/")] = nn.ModuleList(site_gates(site, factors[name], own))
        dtype = next(model.parameters()).dtype
        for row, (_, _, candidates) in enumerate(parts):
            kept = torch.stack([torch.arange(candidates[-1]) < width for width in candidates])
            self.register_buffer(f"kept_{row}", kept.to(dtype), persistent=False)  # (A, full)
        self._release()

    def _release(self) -> None:
        """What the gates stand in for is not trained; a bias that only the compressed layer has is made."""
        ones = torch.ones(len(self.rows), 1, device=next(self.model.parameters()).device)
        for name, value in self.weights(self.masks(ones, dense=True)).items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, nn.Parameter(value.detach(), requires_grad=False))

    def masks(self, probabilities: Tensor, dense: bool = False) -> dict[str, dict[str, Tensor]]:
        """Gates per site and part, ``m_j = sum_{a: r_a > j} p_a``; ``dense`` takes the last candidates alone."""
        masks: dict[str, dict[str, Tensor]] = {}
        for row, (name, part) in enumerate(self.rows):
            kept: Tensor = getattr(self, f"kept_{row}")
            mask = kept[-1] if dense else probabilities[row, : kept.shape[0]].to(kept.dtype) @ kept
            masks.setdefault(name, {})[part] = mask
        return masks

    def weights(self, masks: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """Values of the gated parameters by their names in the model."""
        values: dict[str, Tensor] = {}
        for name, mask in masks.items():
            for gate in self.gates[name.replace(".", "/")].children():
                values |= gate(mask)
        return values

    def forward(self, images: Tensor, probabilities: Tensor) -> Any:
        """(B, C, H, W) to the outputs, e.g. logits (B, classes), or a tuple of features.

        Two classifiers are averaged, as in evaluation.
        """
        with torch.autocast(images.device.type, enabled=False):  # the weights are few; they stay exact
            weights = self.weights(self.masks(probabilities))
        with explained(images):
            found = Outputs(self.model, self.kind)(functional_call(self.model, weights, (images,)), len(images))
        return found if self.kind == "features" else found[0]
