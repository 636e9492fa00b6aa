"""Everything that one site needs to be built at any choice of widths, computed once.

The factors are nested in the rank, so a whole curve of candidates costs one decomposition. A part's *energy* is
what its components are worth: the expected squared error that dropping them causes, in the units of the scores
(qk), of the layer output (vo, ffn, head), or of the loss where output gradients were collected.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..linalg import factorize
from ..linalg.factorize import NeuronOrder, Projection, QKFactors
from ..models.running import double
from ..nn.linear import LowRankLinear
from .heads import HeadWeights, as_parameter, flatten_heads, zeros_like_bias
from .sites import AttentionSite, Choice, FFNSite, HeadSite, Site, check_choice
from .skeleton import empty_modules

Moments = Mapping[str, Tensor]
SiteT = TypeVar("SiteT", bound=Site)


class SiteFactors(ABC, Generic[SiteT]):
    """Base: ``moments`` is empty for the data-free route."""

    def __init__(self, site: SiteT, moments: Moments | None = None) -> None:
        self.site = site
        self.moments = moments or {}

    def errors(self, part: str) -> Tensor:
        """(full + 1,) expected squared error when ``part`` keeps 0, 1, ..., full components."""
        energy = self.energy(part)
        tail = energy.flip(0).cumsum(0).flip(0)
        return torch.cat([tail, tail.new_zeros(1)])

    def energy(self, part: str) -> Tensor:
        """(full,) energies of the components of ``part`` in the order in which they are kept.

        Raises:
            CalibrationError: the layer's moments cannot be factored, here and in the other methods.
        """
        with self._named():
            return self._energy(part)

    def build(self, choice: Choice) -> dict[str, nn.Module]:
        """New modules by full name; empty for the dense choice."""
        with self._named():
            return self._build(choice)

    def relative_error(self, choice: Choice) -> float:
        """Sum over the parts of dropped energy over total energy; a rough guide, comparable within a part only."""
        total = 0.0
        for part, rank in choice.items():
            errors = self.errors(part)
            total += float(errors[rank] / errors[0].clamp_min(1e-300))
        return total

    def ridge(self, choice: Choice) -> float | None:
        """The largest relative ridge that the moments behind ``choice`` need; None without moments."""
        if not self.moments:
            return None
        with self._named():
            return max(factorize.ridge_used(moment) for moment in self._moments_of(choice))

    @contextmanager
    def _named(self) -> Iterator[None]:
        """What cannot be factored inside is an error about this layer."""
        try:
            yield
        except torch.linalg.LinAlgError as error:
            what = "moments" if self.moments else "weights"
            fix = "calibrate again, on more images" if self.moments else "calibrate, or leave the layer out"
            raise CalibrationError(
                f"the {what} of '{self.site.name}' are too close to singular to be factored: {error}; {fix}"
            ) from error
        except CalibrationError as error:
            raise CalibrationError(f"'{self.site.name}': {error}") from error

    @abstractmethod
    def _energy(self, part: str) -> Tensor:
        """See :meth:`energy`."""

    @abstractmethod
    def _build(self, choice: Choice) -> dict[str, nn.Module]:
        """See :meth:`build`."""

    @abstractmethod
    def _moments_of(self, choice: Choice) -> list[Tensor]:
        """The second moments from which the parts of ``choice`` are factored."""


class AttentionFactors(SiteFactors[AttentionSite]):
    """Moments: ``q``, ``k`` (H, d, d), ``z`` (H d, H d) and ``z_mean`` (H d,).

    Optional: ``qk_rows``, ``qk_cols`` (H, d, d) and ``out_grad`` (D_out, D_out).
    """

    def __init__(self, site: AttentionSite, moments: Moments | None = None) -> None:
        super().__init__(site, moments)
        self.heads = HeadWeights.from_fused(site.qkv, site.proj, site.num_heads)

    @cached_property
    def qk(self) -> QKFactors:
        m = self.moments
        if not m:
            query, key, _ = self.heads.free_moments()
            return factorize.factor_qk(query, key)
        if "qk_rows" in m:
            return factorize.factor_qk(*_loss_metric(m))
        return factorize.factor_qk(m["q"], m["k"])

    @cached_property
    def vo(self) -> Projection:
        target = double(self.heads.output)
        if "out_grad" in self.moments:
            target = target @ factorize.whitening(self.moments["out_grad"]).mT
        return factorize.project(self._value_moments, target)

    @cached_property
    def _value_moments(self) -> Tensor:
        """(H, d, d) covariance of each head's output."""
        if not self.moments:
            return self.heads.free_moments()[2]
        H, d = self.site.num_heads, self.site.head_dim
        blocks = self.moments["z"].view(H, d, H, d)
        return torch.stack([blocks[h, :, h] for h in range(H)])

    def _moments_of(self, choice: Choice) -> list[Tensor]:
        products = [self.moments["q"], self.moments["k"]] if "qk" in choice else []
        return [*products, self._value_moments] if "vo" in choice else products

    def _energy(self, part: str) -> Tensor:
        # Heads of one layer share a rank: a component of the layer is one component of every head.
        return (self.qk if part == "qk" else self.vo).gains.sum(0)

    def _build(self, choice: Choice) -> dict[str, nn.Module]:
        new = empty_modules(self.site, choice)
        if not new:
            return new
        site, heads = self.site, self.heads
        qk_rank, vo_rank = choice.get("qk"), choice.get("vo")
        query, key, query_bias = heads.query, heads.key, heads.query_bias
        if qk_rank is not None:
            q_map, k_map = self.qk.q_map[..., :qk_rank], self.qk.k_map[..., :qk_rank]
            query, key = q_map.mT @ double(query), k_map.mT @ double(key)
            query_bias = None if query_bias is None else (double(query_bias)[:, None] @ q_map)[:, 0]
        value, value_bias = heads.value, heads.value_bias
        output, output_bias = heads.output, heads.output_bias
        if vo_rank is not None:
            down, up = self.vo.down[..., :vo_rank], self.vo.up[..., :vo_rank, :]
            value = down.mT @ double(value)
            value_bias = None if value_bias is None else (double(value_bias)[:, None] @ down)[:, 0]
            output, output_bias = self._output(down, up)
        weights, biases = (query, key, value), (query_bias, value_bias)
        _fill_attention(new[site.name], weights, biases, output, output_bias, like=site)
        return new

    def _output(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Output weights (H, r, D_out) and bias behind reduced values; the mean output is kept exactly."""
        heads = self.heads
        dense = double(heads.output)
        mean: Tensor | None
        if self.moments:
            output = factorize.refit_output(down, up, dense, self.moments["z"])
            mean = double(self.moments["z_mean"]).view(down.shape[0], 1, -1)
        else:
            # Without data the mean of the inputs is taken as zero, which leaves the value bias.
            output = up @ dense
            bias = heads.value_bias
            mean = None if bias is None else double(bias)[:, None]  # (H, 1, d)
        output_bias = zeros_like_bias(heads.output_bias, dense.shape[-1], dense)
        if mean is None:
            return output, output_bias
        return output, output_bias + (mean @ dense - mean @ down @ output).sum((0, 1))


def _loss_metric(m: Moments) -> tuple[Tensor, Tensor]:
    """Query-key metric in units of the loss: with ``A = Q^T dL/dQ`` per image, ``dL = <P - I, A>``.

    Its second moment is taken as a Kronecker product, ``E[A A^T] x E[A^T A] / tr E[A A^T]``. A tenth of the
    activation moments (in the same scale) is mixed in, because few images leave the former nearly singular.
    """
    rows, cols = double(m["qk_rows"]), double(m["qk_cols"])
    trace = rows.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp_min(1e-300)
    mixed = []
    for metric, moment in ((rows, double(m["q"])), (cols, double(m["k"]))):
        ratio = _trace(metric) / _trace(moment).clamp_min(1e-300)
        mixed.append(0.9 * metric + 0.1 * ratio * moment)
    return mixed[0], mixed[1] / trace


def _trace(moment: Tensor) -> Tensor:
    return moment.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _fill_attention(
    small: Any,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    output: Tensor,
    output_bias: Tensor | None,
    like: AttentionSite,
) -> None:
    """Write per-head weights into the fused layers of a ``LowRankAttention``."""
    small.qkv.weight = as_parameter(torch.cat([double(flatten_heads(w)) for w in weights]), like.qkv.weight)
    if small.qkv.bias is not None:
        query_bias, value_bias = biases
        assert query_bias is not None
        assert value_bias is not None
        # The key bias adds the same score to every key of a query; the softmax removes it. Not so behind a norm,
        # where the keys keep their width.
        key_bias = torch.zeros_like(query_bias)
        if "qk" in like.dense_parts:
            key_bias = like.qkv.bias.detach().unflatten(0, (3, -1))[1]
        small.qkv.bias = as_parameter(
            torch.cat([double(b).flatten() for b in (query_bias, key_bias, value_bias)]), like.qkv.bias
        )
    small.proj.weight = as_parameter(flatten_heads(output).mT, like.proj.weight)
    if small.proj.bias is not None:
        assert output_bias is not None
        small.proj.bias = as_parameter(output_bias, like.proj.weight)


class FFNFactors(SiteFactors[FFNSite]):
    """Moments: ``x``, ``h`` covariances and ``x_mean``, ``h_mean`` of the inputs of fc1 and fc2.

    Optional: ``fc1_grad``, ``fc2_grad``, second moments of the output gradients.
    """

    def __init__(self, site: FFNSite, moments: Moments | None = None) -> None:
        super().__init__(site, moments)
        self._projections: dict[str, Projection] = {}

    def projection(self, part: str) -> Projection:
        if part not in self._projections:
            linear, moment, grad = (
                (self.site.fc1, "x", "fc1_grad") if part == "fc1" else (self.site.fc2, "h", "fc2_grad")
            )
            self._projections[part] = _linear_projection(linear, self.moments.get(moment), self.moments.get(grad))
        return self._projections[part]

    @cached_property
    def neurons(self) -> NeuronOrder:
        output = double(self.site.fc2.weight.detach().mT)
        if "fc2_grad" in self.moments:
            output = output @ factorize.whitening(self.moments["fc2_grad"]).mT
        return factorize.order_neurons(self._hidden_moment, output)

    @property
    def _hidden_moment(self) -> Tensor:
        """Covariance of the hidden units; data-free, independent units of variance ``|w_1|^2``."""
        if self.moments:
            return self.moments["h"]
        return torch.diag(double(self.site.fc1.weight.detach()).square().sum(-1))

    def _moments_of(self, choice: Choice) -> list[Tensor]:
        return [self.moments["x" if part == "fc1" else "h"] for part in choice]

    def _energy(self, part: str) -> Tensor:
        if part == "neurons":
            return -self.neurons.errors.diff()
        return self.projection(part).gains

    def _build(self, choice: Choice) -> dict[str, nn.Module]:
        if "neurons" in choice:
            check_choice(self.site, choice)
            return self._narrowed(choice)
        new = empty_modules(self.site, choice)
        for part, mean in (("fc1", "x_mean"), ("fc2", "h_mean")):
            if part in choice:
                small, linear = new[f"{self.site.name}.{part}"], self.site.linears[part]
                _fill_linear(small, linear, self.projection(part), self.moments.get(mean))
        return new

    def _narrowed(self, choice: Choice) -> dict[str, nn.Module]:
        """Fewer neurons; ranks that are asked for too are those of the narrowed matrices."""
        linears = empty_modules(self.site, {"neurons": choice["neurons"]})
        self._fill_neurons(choice["neurons"], *linears.values())
        ranks = {part: rank for part, rank in choice.items() if part != "neurons"}
        if not ranks:
            return linears
        keep = self.neurons.order[: choice["neurons"]].sort().values
        axes = {"h": 2, "h_mean": 1, "fc1_grad": 2}  # of the moments that are about hidden units
        moments = {
            name: (m[keep][:, keep] if axes[name] == 2 else m[keep]) if name in axes else m
            for name, m in self.moments.items()
        }
        fc1, fc2 = linears.values()
        assert isinstance(fc1, nn.Linear)
        assert isinstance(fc2, nn.Linear)
        low = FFNFactors(FFNSite(self.site.name, self.site.module, fc1, fc2), moments)._build(ranks)
        return {**linears, **low}

    def _fill_neurons(self, count: int, new1: Any, new2: Any) -> None:
        fc1, fc2 = self.site.fc1, self.site.fc2
        keep = self.neurons.order[:count].sort().values
        dense = double(fc2.weight.detach().mT)  # (M, D_out)
        weight = factorize.refit_neurons(self._hidden_moment, dense, keep)
        bias = zeros_like_bias(fc2.bias, fc2.out_features, dense)
        if self.moments:
            mean = double(self.moments["h_mean"])
            bias = bias + mean @ dense - mean[keep] @ weight
        new1.weight = as_parameter(fc1.weight.detach()[keep], fc1.weight)
        if fc1.bias is not None:
            new1.bias = as_parameter(fc1.bias.detach()[keep], fc1.bias)
        new2.weight = as_parameter(weight.mT, fc2.weight)
        new2.bias = as_parameter(bias, fc2.weight)


class HeadFactors(SiteFactors[HeadSite]):
    """Moments: ``x`` covariance and ``x_mean`` of the classifier's input; optional ``grad``."""

    @cached_property
    def projection(self) -> Projection:
        return _linear_projection(self.site.module, self.moments.get("x"), self.moments.get("grad"))

    def _moments_of(self, choice: Choice) -> list[Tensor]:
        return [self.moments["x"]]

    def _energy(self, part: str) -> Tensor:
        return self.projection.gains

    def _build(self, choice: Choice) -> dict[str, nn.Module]:
        new = empty_modules(self.site, choice)
        for small in new.values():
            _fill_linear(small, self.site.module, self.projection, self.moments.get("x_mean"))
        return new


def site_factors(site: Site, moments: Moments | None = None) -> SiteFactors[Any]:
    """The factors of a site; nothing is decomposed before it is asked for."""
    if isinstance(site, AttentionSite):
        return AttentionFactors(site, moments)
    return FFNFactors(site, moments) if isinstance(site, FFNSite) else HeadFactors(site, moments)


def _linear_projection(linear: nn.Linear, moment: Tensor | None, grad: Tensor | None) -> Projection:
    weight = double(linear.weight.detach().mT)  # (in, out)
    if moment is None:
        moment = torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)
    if grad is not None:
        weight = weight @ factorize.whitening(grad).mT
    return factorize.project(moment, weight)


def _fill_linear(small: nn.Module, linear: nn.Linear, projection: Projection, mean: Tensor | None) -> None:
    """``y = x P_r W + b + mean (I - P_r) W``: low rank with the mean output restored."""
    assert isinstance(small, LowRankLinear)
    rank = small.rank
    weight = double(linear.weight.detach().mT)
    down = projection.down[:, :rank]
    up = projection.up[:rank] @ weight
    bias = zeros_like_bias(linear.bias, linear.out_features, weight)
    if mean is not None:
        bias = bias + double(mean) @ weight - double(mean) @ down @ up
    # Share the scale between the two factors, so that neither leaves the range of half precision.
    balance = (up.norm(dim=1) / down.norm(dim=0).clamp_min(1e-300)).clamp_min(1e-12).sqrt()
    small.down.weight = as_parameter((down * balance).mT, linear.weight)
    small.up.weight = as_parameter((up / balance[:, None]).mT, linear.weight)
    small.up.bias = as_parameter(bias, linear.weight)
