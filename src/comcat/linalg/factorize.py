"""Closed forms: tensors in, tensors out. Knows no model.

Everything here is one statement. Let ``y = x M`` be a linear map whose input has the second moment
``G = E[x^T x] = R^T R``. The rank-r map nearest to it in ``E|y - y'|^2`` inserts an oblique projector:

    U S V^T = svd(R M)        P_r = (R^-1 U_r) (U_r^T R)        y' = x P_r M        error = sum_{i>r} S_i^2

``R^-1 U_r`` reduces to r components ("down"), ``U_r^T R`` leads back ("up"), and the family is nested: the
first r columns and rows of the full-rank pair are the rank-r pair.

* A linear layer: ``x`` its input, ``M = W``.
* The value-output product of a head: ``x = z`` (attention-weighted values), ``M = W_o,h``.
* The query-key product of a head: ``x = q`` and ``M = R_k^T`` with ``G_k = R_k^T R_k`` the moment of the
  centred keys, since the scores are ``q k^T`` and a constant per query row is removed by the softmax.

At full rank ``P`` is the identity, so every bias passes through unchanged. Source: COMCAT (ICML 2023,
arXiv 2305.17235), Eq. 3, for the products; the moments, the centring and the bias terms go beyond it.
All functions compute in float64 and accept leading batch dimensions (heads) where noted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..models.running import double

#: Smallest eigenvalue of a moment relative to its mean one. It keeps ``R`` invertible when there are fewer
#: samples than dimensions and bounds the condition number of ``R`` by about 1e5 sqrt(n): at full rank the
#: products are still the identity to 1e-10.
RIDGE = 1e-10

#: Relative ridge of the least-squares refits, which divide by a moment instead of by its root.
REFIT_RIDGE = 1e-6


class Projection(NamedTuple):
    """A nested family of oblique projectors ``down[..., :r] @ up[..., :r, :]`` on R^n."""

    down: Tensor  # (..., n, k)
    up: Tensor  # (..., k, n)
    gains: Tensor  # (..., k) squared singular values, descending: what component i is worth


def whitening(moment: Tensor, ridge: float = RIDGE) -> Tensor:
    """Upper-triangular ``R`` (..., n, n) in float64 with ``R^T R = moment`` up to a relative ridge.

    A singular or slightly indefinite moment gets a larger ridge (a hundredfold at a time), the others of the batch
    keep theirs, so the result exists for every finite positive semi-definite input, the zero matrix included.

    Raises:
        CalibrationError: a moment that is not finite, or far from positive semi-definite.
    """
    return _whitening(moment, ridge)[0]


def ridge_used(moment: Tensor, ridge: float = RIDGE) -> float:
    """The largest relative ridge that :func:`whitening` gives to a matrix of the batch; errors as there."""
    return float(_whitening(moment, ridge)[1].amax())


def _whitening(moment: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """``R`` (..., n, n) and the relative ridge of every matrix (...)."""
    moment = double(moment)
    if not torch.isfinite(moment).all():
        raise CalibrationError("a second moment holds NaN or infinite values; calibrate again on finite inputs")
    moment = (moment + moment.mT) / 2
    n = moment.shape[-1]
    scale = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    scale = torch.where(scale > 0, scale, 1.0)
    used = torch.full_like(scale, ridge)
    R = torch.zeros_like(moment)
    failed = torch.ones_like(scale, dtype=torch.bool)
    while True:
        lifted = moment[failed] + torch.diag_embed((used * scale)[failed][:, None].expand(-1, n))
        R[failed], info = torch.linalg.cholesky_ex(lifted, upper=True)
        failed[failed.clone()] = info != 0
        if not failed.any():
            return R, used
        used[failed] *= 100
        if (used >= 1).any():
            raise CalibrationError("a second moment is not positive semi-definite; the calibration file is damaged")


def _left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (..., n, k) and squared singular values (..., k), descending, ``k = min(n, m)``.

    From the eigenvectors of the smaller Gram matrix, several times faster than an SVD. Squaring halves the digits:
    a component whose singular value is below 1e-8 of the largest has an arbitrary direction within the span of all
    such components. Its energy, below 1e-16 of the largest, is worth nothing to a truncation, and at full rank only
    the orthogonality of ``U`` counts, which eigenvectors have whatever their directions.
    """
    n, m = matrix.shape[-2:]
    if n > m:
        Q, triangle = torch.linalg.qr(matrix)
        U, energy = _left_singular(triangle)
        return Q @ U, energy
    energy, U = torch.linalg.eigh(matrix @ matrix.mT)
    return U.flip(-1), energy.flip(-1).clamp_min(0)


def project(moment: Tensor, target: Tensor) -> Projection:
    """The nested projectors that keep ``x @ target`` best when ``E[x^T x] = moment``.

    Args:
        moment: (..., n, n) second moment of the input, centred where the mean is restored in a bias.
        target: (..., n, m) the linear map behind the projector.

    Returns:
        ``Projection`` with ``k = min(n, m)`` components; keeping all of them leaves ``x @ target`` unchanged.
    """
    R = whitening(moment)
    U, gains = _left_singular(R @ double(target))
    return Projection(torch.linalg.solve_triangular(R, U, upper=True), U.mT @ R, gains)


class QKFactors(NamedTuple):
    """``q' = q @ q_map[..., :r]`` and ``k' = k @ k_map[..., :r]`` approximate the scores ``q k^T``."""

    q_map: Tensor  # (heads, d, d)
    k_map: Tensor  # (heads, d, d)
    gains: Tensor  # (heads, d)


def factor_qk(query_moment: Tensor, key_moment: Tensor) -> QKFactors:
    """Query-key maps of all heads, nested in the rank (design: ``U S V^T = svd(R_q R_k^T)``).

    Weights and biases of the query projection are both multiplied by ``q_map``, so a query bias is exact.
    The components are balanced: ``E[q'_i^2] = E[k'_i^2] = S_i``, which keeps half precision safe.

    Args:
        query_moment: (heads, d, d), ``E[q^T q]``; data-free ``W_q^T W_q``.
        key_moment: (heads, d, d), ``E[(k - k_mean)^T (k - k_mean)]``; data-free ``W_k^T W_k``.
    """
    R_k = whitening(key_moment)
    down, up, gains = project(query_moment, R_k.mT)
    floor = 1e-12 * gains.amax(-1, keepdim=True)
    balance = torch.where(floor > 0, gains.clamp_min(1e-300).maximum(floor), 1.0) ** 0.25
    return QKFactors(down * balance[..., None, :], up.mT / balance[..., None, :], gains)


def refit_output(down: Tensor, up: Tensor, output: Tensor, moment: Tensor, ridge: float = REFIT_RIDGE) -> Tensor:
    """Output weights behind reduced heads, jointly refitted over all heads.

    ``W_o' = T^+ W_o + (T^T C T)^-1 T^T C (W_o - T T^+ W_o)`` with ``T = blockdiag(down)``: only the residual is
    refitted, so the result is exact wherever the projection is, whatever the conditioning of ``C``.

    Args:
        down: (heads, d, r); up: (heads, r, d): a truncated value-output projection.
        output: (heads, d, D_out), the dense output weights.
        moment: (heads * d, heads * d), covariance ``C`` of the concatenated head outputs.

    Returns:
        (heads, r, D_out) in float64.
    """
    heads, _, rank = down.shape
    output = double(output)
    kept = up @ output
    residual = (output - down @ kept).flatten(0, 1)  # (heads d, D_out)
    # Through the root, which is that of a semi-definite matrix: ``down`` is large where the moment is small, and would
    # blow up what rounding has left below zero there.
    R = whitening(moment)
    RT = R @ torch.block_diag(*down)  # (heads d, heads r)
    delta = _ridge_solve(RT.mT @ RT, RT.mT @ (R @ residual), ridge)
    return kept + delta.view(heads, rank, -1)


def _ridge_solve(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    R = whitening(gram, ridge)
    return torch.cholesky_solve(right, R, upper=True)


class NeuronOrder(NamedTuple):
    """Hidden neurons of an FFN, most worth keeping first."""

    order: Tensor  # (M,) int64
    errors: Tensor  # (M + 1,) errors[m]: expected squared output error when the first m are kept and refitted


def order_neurons(moment: Tensor, output: Tensor, block: int | None = None) -> NeuronOrder:
    """Backward elimination of hidden neurons under the optimal refit of the rest.

    Removing neuron j and refitting the others costs ``|w_j|^2 / [C^-1]_jj`` (optimal brain surgeon; Hassibi and
    Stork 1993). The cheapest ``block`` neurons go at a time, weights and inverse are downdated, and so on (the inverse
    is made anew whenever half of the neurons are gone); the order is nested, so one pass serves every width.

    Args:
        moment: (M, M) covariance of the hidden activations.
        output: (M, D_out) second FFN matrix, times any weighting of the output on the right.
        block: how many neurons go per step; default M / 96.
    """
    size = block or max(1, moment.shape[0] // 96)
    removed, costs = _eliminated(moment, output, lambda score, left: score.argsort()[:size])
    errors = torch.cat(costs).cumsum(0).flip(0)
    return NeuronOrder(torch.cat(removed).flip(0), torch.cat([errors, errors.new_zeros(1)]))


class ChannelOrder(NamedTuple):
    """Value channels of each group of heads, most worth keeping first."""

    order: Tensor  # (groups, d) int64
    errors: Tensor  # (d + 1,) errors[r]: expected squared output error when every head keeps its first r, refitted


def order_channels(moment: Tensor, output: Tensor, groups: int, block: int | None = None) -> ChannelOrder:
    """As :func:`order_neurons`, with as many channels of every group per step: those whose loss costs the least.

    Args:
        moment: (H d, H d) covariance of what the output projection takes, head after head.
        output: (H, d, D_out) output weights, times any weighting of the output on the right.
        groups: a channel of one is a channel of each of its H / groups heads.
        block: how many channels of a group go per step; default d / 96.
    """
    heads, d = output.shape[:2]
    size = block or max(1, d // 96)
    first = torch.arange(heads, device=output.device) // (heads // groups) * d
    channel = (first[:, None] + torch.arange(d, device=output.device)).flatten()  # (H d,): of all groups, as one list

    def cheapest(score: Tensor, left: Tensor) -> Tensor:
        total = score.new_full((groups * d,), float("inf"))
        total[channel[left]] = 0
        total = total.index_add(0, channel[left], score).unflatten(0, (groups, d))
        count = min(size, len(left) // heads)
        worst = total.topk(count, 1, largest=False).indices + torch.arange(groups, device=left.device)[:, None] * d
        return torch.isin(channel[left], worst).nonzero()[:, 0]

    removed, costs = _eliminated(moment, output.flatten(0, 1), cheapest)
    # Within a step, head after head, and the same channels in all heads of a group.
    order = torch.cat([step.view(groups, heads // groups, -1)[:, 0] % d for step in removed], 1).flip(1)
    errors = torch.cat([cost.view(heads, -1).sum(0) for cost in costs]).cumsum(0).flip(0)
    return ChannelOrder(order, torch.cat([errors, errors.new_zeros(1)]))


def _eliminated(
    moment: Tensor, output: Tensor, choose: Callable[[Tensor, Tensor], Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Backward elimination: which go per step, and what each of them costs beside the others of its step.

    Args:
        choose: ``choose(score, left)``: which places of ``left`` (ascending indices) go, by the cost of each alone.
    """
    moment = double(moment)
    M = moment.shape[0]
    R = whitening(moment, REFIT_RIDGE)
    inverse = torch.cholesky_inverse(R, upper=True)
    weight = double(output).clone()
    lifted = R.mT @ R
    left = torch.arange(M, device=moment.device)
    inverted = M  # how many there were when the inverse was last made
    removed: list[Tensor] = []
    costs: list[Tensor] = []
    while len(left):
        if len(left) <= inverted / 2:  # rounding adds up from downdate to downdate
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(lifted[left][:, left]))
            inverted = len(left)
        diagonal = inverse.diagonal()
        # Beyond the moment's condition number it is rounding that makes an entry this small, and a neuron free.
        score = weight.square().sum(-1) / diagonal.clamp_min(1e-16 * float(diagonal.amax()))
        drop = choose(score, left)
        keep = torch.ones(len(left), dtype=torch.bool, device=left.device)
        keep[drop] = False
        middle = torch.linalg.solve(inverse[drop][:, drop], torch.cat([weight[drop], inverse[drop]], -1))
        dropped_weight, dropped_inverse = middle.split([weight.shape[1], len(left)], -1)
        joint = (weight[drop] * dropped_weight).sum(-1).clamp_min(0)  # adds up to the cost of the whole block
        removed.append(left[drop])
        costs.append(joint)
        cross = inverse[keep][:, drop]
        weight = weight[keep] - cross @ dropped_weight
        inverse = inverse[keep][:, keep] - cross @ dropped_inverse[:, keep]
        left = left[keep]
    return removed, costs


def refit_neurons(moment: Tensor, output: Tensor, keep: Tensor, ridge: float = REFIT_RIDGE) -> Tensor:
    """Second FFN matrix for the kept neurons, ``W_S + (C_SS + ridge)^-1 C_SD W_D`` (exact if none is dropped).

    Args:
        moment: (M, M) covariance of the hidden activations; output: (M, D_out); keep: (m,) indices.

    Returns:
        (m, D_out) in float64.
    """
    moment = double(moment)
    dropped = torch.ones(moment.shape[0], dtype=torch.bool, device=moment.device)
    dropped[keep] = False
    output = double(output)
    if not dropped.any():
        return output[keep]
    right = moment[keep][:, dropped] @ output[dropped]
    return output[keep] + _ridge_solve(moment[keep][:, keep], right, ridge)
