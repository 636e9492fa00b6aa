"""The factors of an attention layer: the query-key and the value-output product of every head, nested in the rank.

Where one of them does not exist: which rotated pairs, or which channels of the values, are worth keeping.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..linalg import factorize
from ..linalg.factorize import ChannelOrder, Projection, QKFactors
from ..linalg.rotary import PairOrder, Turns, order_pairs, pair_places, refit_pairs
from ..models.running import double
from .base import Choice
from .factors import Factors, Moments
from .heads import HeadWeights, Places, Role, grouped, spread, zeros_like_bias

if TYPE_CHECKING:
    from .attention import AttentionLayer


class AttentionFactors(Factors["AttentionLayer"]):
    """Moments: ``q`` (H, d, d), ``k`` (G, d, d), ``z`` (H d_v, H d_v) and ``z_mean`` (H d_v,).

    Optional: ``qk_rows``, ``qk_cols`` (H, d, d), ``out_grad`` (D_out, D_out), and of rotated pairs ``turn`` (G, d, d).
    """

    def __init__(self, layer: AttentionLayer, moments: Moments | None = None) -> None:
        super().__init__(layer, moments)
        self.heads = layer.weights()

    @cached_property
    def _metrics(self) -> tuple[Tensor, Tensor]:
        """Second moments (G, d, d) of the queries and of the keys that meet in a group."""
        m = self.moments
        if not m:
            query, key, _ = self._free_moments()
            key = self._seen(key)
        else:
            query, key = m["q"], self._seen(m["k"])
            if "qk_rows" in m:
                query, key = _loss_metric(m, key)
        groups = self.layer.heads.groups
        return grouped(query, groups), grouped(key, groups)

    def _free_moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Moments of queries, keys and values for white inputs."""
        return self.heads.free_moments()

    def _seen(self, key: Tensor) -> Tensor:
        """A moment of keys as the queries see them."""
        return key if self.layer.rotary is None else self._turns.seen(key, self.layer.rotary)

    @cached_property
    def _turns(self) -> Turns:
        """How pairs turn apart; freely where that is not known."""
        if "turn" in self.moments:
            return Turns.of(self.moments["turn"])
        return Turns.free(self.layer.heads.width // 2, self.heads.query)

    @cached_property
    def qk(self) -> QKFactors:
        """Per group."""
        return factorize.factor_qk(*self._metrics)

    @cached_property
    def pairs(self) -> PairOrder:
        """Rotated pairs of components, most worth keeping first."""
        assert self.layer.rotary is not None
        return order_pairs(*self._metrics, self.layer.rotary)

    @cached_property
    def vo(self) -> Projection:
        """Per group: values are shared, their output weights lie side by side."""
        target = self._weighted_output
        target = target.unflatten(0, (self.layer.heads.groups, -1)).movedim(1, 2).flatten(2)  # (G, d_v, H / G D_out)
        return factorize.project(self.value_moments, target)

    @cached_property
    def channels(self) -> ChannelOrder:
        """Channels of the values per group, most worth keeping first; after each, the output weights are refitted."""
        return factorize.order_channels(self._inputs, self._weighted_output, self.layer.heads.groups)

    @property
    def _inputs(self) -> Tensor:
        """(H d_v, H d_v) covariance of what the output projection takes; data-free, channels of variance ``|w_v|^2``.

        Without data, channels are taken as independent, as neurons are.
        """
        if self.moments:
            return self.moments["z"]
        return torch.diag(spread(double(self.heads.value).square().sum(-1), self.layer.heads.num).flatten())

    @property
    def _weighted_output(self) -> Tensor:
        """Output weights (H, d_v, D_out), in units of the loss where gradients were collected."""
        target = double(self.heads.output)
        return target @ factorize.whitening(self.moments["out_grad"]).mT if "out_grad" in self.moments else target

    def places_of(self, channels: Tensor) -> Tensor:
        """(groups, r) channels as indices (H, r) into the inputs of the output projection, head after head."""
        heads = self.layer.heads
        first = torch.arange(heads.num, device=channels.device) * heads.value_width
        return spread(channels, heads.num) + first[:, None]

    @cached_property
    def value_moments(self) -> Tensor:
        """(G, d_v, d_v) covariance of what the heads of a group put out."""
        if not self.moments:
            return self._free_moments()[2]
        H, d = self.layer.heads.num, self.layer.heads.value_width
        blocks = self.moments["z"].view(H, d, H, d)
        return grouped(torch.stack([blocks[h, :, h] for h in range(H)]), self.layer.heads.groups)

    def _moments_of(self, choice: Choice) -> list[Tensor]:
        products = [] if choice.keys().isdisjoint(("qk", "pairs")) else [self.moments["q"], self.moments["k"]]
        values = {"vo": self.value_moments, "channels": self.moments["z"]}
        return [*products, *(moment for part, moment in values.items() if part in choice)]

    def _energy(self, part: str) -> Tensor:
        if part == "pairs":
            return self.pairs.gains
        # Heads of one layer share a rank: a component of the layer is one component of every head.
        if part == "channels":
            return -self.channels.errors.diff()
        return (self.vo if part == "vo" else self.qk).gains.sum(0)

    def _build(self, choice: Choice) -> dict[str, nn.Module]:
        new, layer = self.layer.empty(choice), self.layer
        for small in new.values():
            layer.stand_in.fill(small, *self.reduced(choice))
        return new

    def reduced(self, choice: Choice) -> tuple[HeadWeights, Places]:
        """The weights at a choice, and which components were kept of what is chosen and not mixed.

        A key bias adds the same score to every key of a query, which the softmax removes, where nothing stands between
        projection and product; it is carried all the same.
        """
        return self._reduced(choice, self.heads, "z")

    def _reduced(self, choice: Choice, heads: HeadWeights, z: str) -> tuple[HeadWeights, Places]:
        """The same of the weights of one stream; ``z``: the moment of what its output projection takes."""
        layer = self.layer
        query, key = heads.query, heads.key
        query_bias, key_bias = heads.query_bias, heads.key_bias
        places: dict[Role, Tensor] = {}
        if "qk" in choice or "pairs" in choice:
            if "qk" in choice:
                q_map, k_map = self.qk.q_map[..., : choice["qk"]], self.qk.k_map[..., : choice["qk"]]
            else:
                q_map, k_map, kept = self._pair_maps(choice["pairs"])
                places |= {"query": kept.expand(layer.heads.num, -1), "key": kept.expand(layer.heads.groups, -1)}
            q_map = spread(q_map, layer.heads.num)
            query, key = q_map.mT @ double(query), k_map.mT @ double(key)
            query_bias, key_bias = _mapped(query_bias, q_map), _mapped(key_bias, k_map)
        value, value_bias = heads.value, heads.value_bias
        output, output_bias = heads.output, heads.output_bias
        gate, gate_bias = heads.gate, heads.gate_bias
        if "vo" in choice:
            down, up = self.vo.down[..., : choice["vo"]], self.vo.up[..., : choice["vo"], :]
            value, value_bias = down.mT @ double(value), _mapped(value_bias, down)
            output, output_bias = self._output(spread(down, layer.heads.num), spread(up, layer.heads.num), heads, z)
        elif "channels" in choice:
            places["value"] = places["gate"] = keep = self._kept(choice["channels"])  # (G, r)
            value = _taken(value, keep)
            value_bias = None if value_bias is None else value_bias.gather(1, keep)
            gate = None if gate is None else _taken(gate, keep)
            gate_bias = None if gate_bias is None else gate_bias.gather(1, keep)
            output, output_bias = self._refitted(keep)
        small = HeadWeights(query, key, value, query_bias, key_bias, value_bias, output, output_bias, gate, gate_bias)
        return small, places

    def _pair_maps(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Maps (G, d, 2 r) of queries and keys to the pairs that are kept, and the components (2 r,) that these are."""
        layout = str(self.layer.rotary)
        kept = self.pairs.order[:count].sort().values
        m = self.moments
        query, key = (m["q"], m["k"]) if m else self.heads.free_moments()[:2]
        maps = refit_pairs(grouped(query, self.layer.heads.groups), key, kept, self._turns, layout)
        return *maps, pair_places(kept, self.layer.heads.width, layout)

    def _weights_at(self, width: int, scale: float) -> dict[str, Tensor]:
        layer = self.layer
        small, _ = self.reduced(dict.fromkeys(layer.one_width, width))
        bias = None if small.query_bias is None else double(small.query_bias) * scale
        small = replace(small, query=double(small.query) * scale, query_bias=bias)
        weights: dict[str, Tensor] = {}
        for one in layer.stream.inputs:
            weight, bias = small.rows(one)
            weights[f"{layer.name}.{one.path}.weight"] = weight
            if bias is not None:
                weights[f"{layer.name}.{one.path}.bias"] = bias
        weights[f"{layer.name}.{layer.stream.output}.weight"] = small.output.flatten(0, 1).mT
        if small.output_bias is not None:
            weights[f"{layer.name}.{layer.stream.output}.bias"] = small.output_bias
        return weights

    def _output(self, down: Tensor, up: Tensor, heads: HeadWeights, z: str) -> tuple[Tensor, Tensor]:
        """Output weights (H, r, D_out) and bias behind reduced values; the mean output is kept exactly."""
        dense = double(heads.output)
        mean: Tensor | None
        if z in self.moments:
            output = factorize.refit_output(down, up, dense, self.moments[z])
            mean = double(self.moments[f"{z}_mean"]).view(down.shape[0], 1, -1)
        else:
            # Without data the mean of the inputs is taken as zero, which leaves the value bias.
            output = up @ dense
            bias = heads.value_bias
            mean = None if bias is None else spread(double(bias), len(dense))[:, None]  # (H, 1, d_v)
        output_bias = zeros_like_bias(heads.output_bias, dense.shape[-1], dense)
        if mean is None:
            return output, output_bias
        return output, output_bias + (mean @ dense - mean @ down @ output).sum((0, 1))

    def _kept(self, count: int) -> Tensor:
        """(G, count) channels in their own order."""
        heads = self.layer.heads
        if count == heads.value_width:
            return torch.arange(count, device=self._inputs.device).expand(heads.groups, -1)
        return self.channels.order[:, :count].sort(-1).values

    def _refitted(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Output weights (H, r, D_out) and bias behind the kept channels (G, r), with the mean output kept."""
        at, dense = self.places_of(keep), double(self.heads.output).flatten(0, 1)
        weight = factorize.refit_neurons(self._inputs, dense, at.flatten())
        bias = zeros_like_bias(self.heads.output_bias, dense.shape[1], dense)
        if self.moments:
            mean = double(self.moments["z_mean"])
            bias = bias + mean @ dense - mean[at.flatten()] @ weight
        return weight.unflatten(0, at.shape), bias


def _mapped(bias: Tensor | None, by: Tensor) -> Tensor | None:
    """(heads, d) through (heads, d, r)."""
    return None if bias is None else (double(bias)[:, None] @ by)[:, 0]


def _taken(weight: Tensor, places: Tensor) -> Tensor:
    """(heads, r, D) of (heads, d, D)."""
    return weight.gather(1, places[..., None].expand(-1, -1, weight.shape[-1]))


def _loss_metric(m: Moments, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Query-key metric in units of the loss: with ``A = Q^T dL/dQ`` per image, ``dL = <P - I, A>``.

    Its second moment is taken as a Kronecker product, ``E[A A^T] x E[A^T A] / tr E[A A^T]``. A tenth of the
    activation moments (in the same scale) is mixed in, because few images leave the former nearly singular.
    """
    rows, cols = double(m["qk_rows"]), double(m["qk_cols"])
    trace = rows.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp_min(1e-300)
    mixed = []
    for metric, moment in ((rows, double(m["q"])), (cols, spread(double(seen), len(cols)))):
        ratio = _trace(metric) / _trace(moment).clamp_min(1e-300)
        mixed.append(0.9 * metric + 0.1 * ratio * moment)
    return mixed[0], mixed[1] / trace


def _trace(moment: Tensor) -> Tensor:
    return moment.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
