"""A distribution over candidate widths of every part of a model, and what it costs in expectation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers.base import Layer


def candidate_widths(layer: Layer, part: str, count: int, multiple: int = 1) -> list[int]:
    """Ascending candidates, evenly spaced below the part's reach and rounded to ``multiple``; the last one is dense."""
    limit, full = layer.reach(part), layer.full[part]
    steps = {max(1, round(limit * k / count / multiple)) * multiple for k in range(1, count)} | {multiple}
    return [*sorted(width for width in steps if width < limit), full]


class RankDistribution(nn.Module):
    """Logits over the candidates of every gated part, their Gumbel-softmax and its expected cost.

    Args:
        candidates: one ascending list of widths per part, the last one dense.
        reaches: the width at which a dense part counts.
        groups: parts by layer, one or two indices each; prices: their costs, (A,) or (A1, A2), as shares of the budget.
        fixed: what no candidate changes, as a share of the budget.
        start: width per part around which the distribution begins; spread: its standard deviation in candidates.
    """

    valid: Tensor
    widths: Tensor
    prices: Tensor
    slope: Tensor

    def __init__(
        self,
        candidates: Sequence[Sequence[int]],
        reaches: Sequence[int],
        groups: Sequence[Sequence[int]],
        prices: Sequence[Tensor],
        fixed: float,
        start: Sequence[float],
        spread: float,
    ) -> None:
        super().__init__()
        G, A = len(candidates), max(len(c) for c in candidates)
        widths, valid, logits = torch.zeros(G, A), torch.zeros(G, A, dtype=torch.bool), torch.zeros(G, A)
        for g, (values, limit) in enumerate(zip(candidates, reaches, strict=True)):
            n = len(values)
            widths[g, :n] = torch.tensor([*values[:-1], limit], dtype=torch.float32)
            valid[g, :n] = True
            deviation = (widths[g, :n] - start[g]) * max(n, 2) / (limit * spread)
            logits[g, :n] = -deviation.square() / 2
        self.logits = nn.Parameter(logits)
        self.fixed = fixed
        self.first = [group[0] for group in groups]
        self.second = [group[1] if len(group) == 2 else G for group in groups]  # G: a part with one candidate
        table = torch.zeros(len(groups), A, A)
        slope = torch.zeros(G, A)
        for s, (group, price) in enumerate(zip(groups, prices, strict=True)):
            price = price.float().view(price.shape[0], -1)
            table[s, : price.shape[0], : price.shape[1]] = price
            slope[group[0], : price.shape[0]] = price[:, -1] - price[0, -1]
            if len(group) == 2:
                slope[group[1], : price.shape[1]] = price[-1] - price[-1, 0]
        self.register_buffer("widths", widths)
        self.register_buffer("valid", valid)
        self.register_buffer("prices", table)
        self.register_buffer("slope", slope)

    def gumbel(self, generator: torch.Generator) -> Tensor:
        """Standard Gumbel noise (G, A), drawn on the CPU so that every process draws the same."""
        uniform = torch.rand(self.logits.shape, generator=generator).clamp(1e-9, 1 - 1e-7)
        return -(-uniform.log()).log().to(self.logits.device)

    def probabilities(self, temperature: float, noise: Tensor | None = None, tilt: Tensor | None = None) -> Tensor:
        """(G, A): ``softmax((logits + noise) / temperature - tilt * price)`` over the valid candidates."""
        scores = (self.logits if noise is None else self.logits + noise) / temperature
        if tilt is not None:
            scores = scores - tilt * self.slope
        return scores.masked_fill(~self.valid, -torch.inf).softmax(-1)

    def cost(self, probabilities: Tensor) -> Tensor:
        """Expected cost as a share of the budget; the parts of one layer are independent."""
        alone = torch.zeros_like(probabilities[:1])
        alone[0, 0] = 1
        p = torch.cat([probabilities, alone])
        return self.fixed + torch.einsum("sa,sab,sb->", p[self.first], self.prices, p[self.second])

    def expected_widths(self, probabilities: Tensor) -> Tensor:
        """(G,) in components; a dense linear layer counts as its break-even rank."""
        return (probabilities * self.widths).sum(-1)

    def on_budget(self, temperature: float, noise: Tensor | None = None) -> Tensor:
        """Probabilities tilted by their prices until the expected cost is the budget, differentiable in the logits.

        The tilt is found by bisection; one Newton step, whose value is nil, gives it the gradient of the implicit
        function theorem, so that descent moves along the surface of configurations that cost the budget.
        """
        low, high = self.logits.new_tensor(-1.0), self.logits.new_tensor(1.0)
        with torch.no_grad():
            while self.cost(self.probabilities(temperature, noise, high)) > 1 and high < 1e9:
                high = high * 4
            while self.cost(self.probabilities(temperature, noise, low)) < 1 and low > -1e9:
                low = low * 4
            for _ in range(40):
                middle = (low + high) / 2
                above = self.cost(self.probabilities(temperature, noise, middle)) > 1
                low, high = (middle, high) if above else (low, middle)
        with torch.enable_grad():
            tilt = ((low + high) / 2).requires_grad_(True)
            cost = self.cost(self.probabilities(temperature, noise, tilt))
            (slope,) = torch.autograd.grad(cost, tilt, retain_graph=True)
        step = (cost - cost.detach()) / slope.clamp_max(-1e-12)
        return self.probabilities(temperature, noise, tilt.detach() - step)
