"""Rank gates: a whole distribution over the widths of a layer, evaluated by one forward pass of the dense model.

Truncated factorizations are nested, so the mixture over candidate widths ``r_a`` with probabilities ``p_a`` needs no
candidate matrices: component j of a product carries the gate

    m_j = sum_{a: r_a > j} p_a          sum_a p_a U[:, :r_a] V[:r_a] = U diag(m) V

(COMCAT, arXiv 2305.17235, Eq. 6, evaluated in one term). The gates act on weights, not on activations: a fully factored
layer has the shape of the dense one, so its module, whatever the host does in it, runs as it is on gated weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..linalg.factorize import REFIT_RIDGE, whitening
from ..linalg.rotary import pair_places
from ..models.running import double
from .heads import ROLES, as_parameter, joined_heads, joined_output, spread, zeros_like_bias

if TYPE_CHECKING:
    from .attention import AttentionLayer
    from .attention_factors import AttentionFactors
    from .ffn import FFNFactors


class Refitted(nn.Module):
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


class LayerGates(nn.Module, ABC):
    """The full factors of one layer as trainable tensors; called with one mask per part, it gives gated weights."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    @abstractmethod
    def forward(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values by full parameter name for ``torch.func.functional_call``; a mask is (full,)."""


class AttentionGates(LayerGates):
    """Query rows carry the gates of the query-key product, the output projection those of value-output.

    Component j of a layer is component j of each of its heads, and the heads are refitted together. Names are those of
    the layer's running form.
    """

    order: Tensor | None

    def __init__(self, layer: AttentionLayer, factors: AttentionFactors, parts: Sequence[str]) -> None:
        super().__init__(layer.name)
        heads, like = layer.heads, layer.output.weight
        self.heads, self.stream, self.qk_part, self.vo_part = heads, layer.stream, layer.qk_part, layer.vo_part
        self.shapes = {path: linear.weight.shape for path, linear in layer.linears.items()}
        full, _ = factors.reduced({part: layer.full[part] for part in parts if part not in ("pairs", "channels")})
        for name in (*ROLES, "gate"):
            for own in (name, f"{name}_bias"):
                value = getattr(full, own)
                self.register_parameter(own, None if value is None else as_parameter(value, like))
        self.register_buffer("order", None)
        if "pairs" in parts:  # component j of the part is this place of a head; what is kept in the end is refitted
            self.order = pair_places(factors.pairs.order, heads.width, str(layer.rotary)).to(like.device)
        weight, covariance = full.output.flatten(0, 1), None  # (H d_v, D_out)
        mean = torch.zeros_like(weight[:, 0])
        if factors.moments and "vo" in parts:
            down = torch.block_diag(*spread(factors.vo.down, heads.num))
            root = whitening(factors.moments["z"]) @ down  # as where outputs are refitted
            covariance = root.mT @ root
            mean = double(factors.moments["z_mean"]) @ down
        elif full.value_bias is not None and "channels" not in parts:
            mean = spread(full.value_bias, heads.num).flatten()
        order = torch.arange(len(weight)).view(heads.num, -1).mT.flatten()
        if "channels" in parts:
            order = factors.places_of(factors.channels.order).mT.flatten()
            if factors.moments:
                covariance, mean = double(factors.moments["z"]), double(factors.moments["z_mean"])
        bias = zeros_like_bias(full.output_bias, weight.shape[1], weight)
        self.output = Refitted(weight, bias, mean, covariance, order, like)

    def forward(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        ones = self.output.mean.new_ones(self.heads.value_width)
        weight, bias = self.output(masks.get(self.vo_part, ones).repeat_interleave(self.heads.num))
        out = str(self.stream.output)
        if self.stream.by_component:
            weight = joined_output(weight.mT.unflatten(0, (self.heads.num, -1)), True)
        values = {f"{self.prefix}.{out}.weight": weight.reshape(self.shapes[out]), f"{self.prefix}.{out}.bias": bias}
        for one in self.stream.inputs:
            parts = [self._rows(role, masks) for role in one.roles]
            rows = joined_heads([weight for weight, _ in parts], one.by_head)
            values[f"{self.prefix}.{one.path}.weight"] = rows.reshape(self.shapes[one.path])
            biases = [bias for _, bias in parts if bias is not None]
            if biases:
                values[f"{self.prefix}.{one.path}.bias"] = joined_heads(biases, one.by_head)
        return values

    def _rows(self, role: str, masks: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """(heads, width, D) and (heads, width) of a role under the masks."""
        weight, bias = getattr(self, role), getattr(self, f"{role}_bias")
        mask = masks.get(self.qk_part) if role == "query" else None
        if mask is None:
            return weight, bias
        if self.order is not None:
            mask = torch.zeros_like(weight[0, :, 0]).scatter(0, self.order, torch.cat([mask, mask]))
        gate = mask.expand(len(weight), -1)
        return weight * gate[..., None], None if bias is None else bias * gate


class LinearGates(LayerGates):
    """One low-rank linear layer: ``W = up diag(m) down``, with the mean of what is dropped in the bias."""

    mean: Tensor

    def __init__(self, name: str, part: str, full: Any, mean: Tensor | None) -> None:
        super().__init__(name)
        self.part, self.shape = part, full.up.weight.shape[2:]
        self.down = nn.Parameter(full.down.weight.detach().flatten(1).clone())
        self.up = nn.Parameter(full.up.weight.detach().flatten(1).clone())
        self.bias = nn.Parameter(full.up.bias.detach().clone())
        inputs = self.down.new_zeros(self.down.shape[1]) if mean is None else mean.to(self.down)
        self.register_buffer("mean", self.down.detach() @ inputs)

    def forward(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = masks[self.part]
        weight = self.up @ (mask[:, None] * self.down)
        bias = self.bias + self.up @ ((1 - mask) * self.mean)
        return {f"{self.prefix}.weight": weight.reshape(*weight.shape, *self.shape), f"{self.prefix}.bias": bias}


class NeuronGates(LayerGates):
    """Hidden units of an FFN in the order of their elimination; the matrices in front of them stay as they are."""

    def __init__(self, name: str, last: Any, factors: FFNFactors) -> None:
        super().__init__(name)
        self.shape = last.weight.shape
        weight = last.weight.detach().flatten(1).mT  # (M, D_out)
        mean = factors.moments["h_mean"] if factors.moments else torch.zeros_like(weight[:, 0])
        covariance = double(factors.moments["h"]) if factors.moments else None
        bias = zeros_like_bias(last.bias, weight.shape[1], weight)
        self.output = Refitted(weight, bias, mean, covariance, factors.neurons.order, last.weight)

    def forward(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        weight, bias = self.output(masks["neurons"])
        return {f"{self.prefix}.weight": weight.reshape(self.shape), f"{self.prefix}.bias": bias}
