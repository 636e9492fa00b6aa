"""An added product as an ordinary LoRA, and back. Closed forms: tensors in, tensors out, no model.

Customization adds a rank-r product to the bilinear form of every head (COMCAT, ICML 2023, arXiv 2305.17235, Eq. 8);
a LoRA changes the two matrices of the form instead. With row vectors and one product per head,

    target = L R^T + A B^T        L (D_l, d), A (D_l, r), R (D_r, d), B (D_r, r)
    QK: L = [W_q; b_q], R = W_k (a key bias is removed by the softmax)      VO: L = [W_v; b_v], R = W_o,h^T (D_out, d)

**Export.** For any ``X`` (r, d), with ``P = L + A X`` and ``Y = B - R X^T``, the target is ``P R^T + A Y^T``, so

    dL = A X,   dR = Y Z,   Z = (P^+ A)^T,   error = |(A - P P^+ A) Y^T|_F

is the best pair with this left side: both updates have rank r, nothing is subtracted to get the error, and ``X = 0``
is never worse than leaving the head out. The best ``X`` gives the r smallest right singular directions of the target
to ``Y``: with ``Q = [L A]``, ``K = [R B]`` and ``K b`` those directions, ``X = -(b_1 b_2^-1)^T``. That is the truncated
SVD, the optimum over all pairs; writing the dropped part as ``Q a b^T K^T`` it is ``C21 C11^-1`` with
``C = I - a b^T``. Where ``b_2`` is close to singular (the added product drives a base direction out, which a finite
update of rank r cannot) its singular values are floored, and the best of a few measured candidates is taken.

``dL = A X`` leaves the bias row of ``L`` alone whenever that of ``A`` is zero: LoRA files hold no biases.
**Import.** The change ``(L + dL)(R + dR)^T - L R^T`` has a rank of at most the sum of the ranks of ``dL`` and ``dR``;
its truncated SVD is the best added product.

Everything is computed in float64 on triangular cores of a few times d; a D x D matrix is never formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import CheckpointError
from ...linalg.products import core, norm, svd_of_product
from ...models.running import double

#: Relative rounding of the stored factors (float32). A candidate pays for the rounding that its size causes.
ROUNDING = 2.0**-24

#: Smallest singular value of ``b_2``, a matrix of cosines, tried in turn until nothing is floored any more. The last
#: one keeps the updates within the range of half precision.
FLOORS = (1e-1, 1e-2, 1e-3, 1e-4)

#: Directions of ``P`` below these, relative to its largest, are left out of ``P^+``; tried like the floors.
CUTS = (1e-3, 1e-6, 1e-12)

#: Singular values below this, relative to the largest, are rounding.
EPSILON = 1e-13


@dataclass(frozen=True)
class LoraPair:
    """``dL = left_added @ X`` and ``dR = Y @ Z`` per head, in float64."""

    X: Tensor  # (H, r, d)
    Y: Tensor  # (H, D_r, r)
    Z: Tensor  # (H, r, d)
    error: Tensor  # (H,) |(L + dL)(R + dR)^T - (L R^T + A B^T)|_F
    effect: Tensor  # (H,) |A B^T|_F: the error without any update


@dataclass(frozen=True)
class NearestProduct:
    """The best rank-r product in place of a LoRA, balanced and in float64."""

    left_added: Tensor  # (H, D_l, r)
    right_added: Tensor  # (H, D_r, r)
    error: Tensor  # (H,) relative to the change of the product; 0 where the LoRA changes nothing
    singular_values: Tensor  # (H, k) of the change, descending; error(r)^2 = sum_{i>r} S_i^2 / sum S_i^2


class HeadUpdate(NamedTuple):
    """A change of one per-head matrix, ``basis @ mix[h]``; the basis is shared by the heads, or one per head."""

    basis: Tensor  # (D, R) or (H, D, R)
    mix: Tensor  # (H, R, d)


class LoraWeights(NamedTuple):
    """``nn.Linear`` weights of a LoRA: the layer becomes ``W + up @ down``."""

    down: Tensor  # (R, D_in)
    up: Tensor  # (D_out, R)


def product_to_lora(
    left: Tensor,
    left_added: Tensor,
    right: Tensor,
    right_added: Tensor,
    rounding: float = ROUNDING,
    left_root: Tensor | None = None,
    right_root: Tensor | None = None,
) -> LoraPair:
    """The LoRA nearest to an added product, head by head, in the Frobenius norm of the product.

    Args:
        left: (H, D_l, d), a bias as the last row; left_added: (H, D_l, r), with a zero in that row unless the adapter
            has a bias (which a LoRA cannot hold).
        right: (H, D_r, d); right_added: (H, D_r, r).
        rounding: relative precision of the stored factors. Large factors that cancel are taken only as far as they
            gain more than rounding them loses.
        left_root, right_root: optional (m, D_l) and (m', D_r), roots ``E[x^T x] = root^T root`` of the moments of the
            inputs; ``error`` and ``effect`` are then those of the scores (or outputs) on such inputs, which is what
            counts when the inputs fill few directions. Only the choice changes, not the form of the result.

    Raises:
        CheckpointError: NaN or infinite values.
    """
    L, A, R, B = (_finite(t) for t in (left, left_added, right, right_added))
    d, unweighted = L.shape[-1], (R, B)
    if left_root is not None:
        L, A = (core(_finite(left_root)) @ side for side in (L, A))
    if right_root is not None:
        R, B = (core(_finite(right_root)) @ side for side in (R, B))
    # A t and B / t are the same product; equal shares of both sides make one set of floors fit all models.
    t = _balance(A, B, L, R)
    Q = core(torch.cat([L, A * t], -1))  # (H, q, d + r)
    K = core(torch.cat([R, B / t], -1))  # (H, k, d + r)
    effect = norm(Q[..., d:] @ K[..., d:].mT)
    X0 = A.new_zeros(A.shape[0], A.shape[-1], d)
    best = _Candidate(effect + rounding * norm(L) * norm(R), effect, X0, X0)  # no update at all
    starts = [X0, (torch.linalg.pinv(K[..., :d], rtol=1e-10) @ K[..., d:]).mT]  # A nearly in L, B nearly in R
    b = _dropped(Q, K, A.shape[-1])
    U, S, Vh = torch.linalg.svd(b[..., d:, :])
    for floor in FLOORS:
        starts.append(-(b[..., :d, :] @ (Vh.mT / S.clamp_min(floor)[..., None, :]) @ U.mT).mT)
        if S.min() >= floor:
            break
    for X in starts:
        for other in _candidates(Q, K, X, rounding):
            wins = other.loss < best.loss  # False for NaN
            best = _Candidate(*(torch.where(wins, new, old) for new, old in zip(other, best, strict=True)))

    touched = effect > 0
    X, Z, Y = best.X * t, best.Z / t, unweighted[1] - unweighted[0] @ (best.X * t).mT
    X, Y, Z, error = (torch.where(touched, result, 0.0) for result in (X, Y, Z, best.error))
    return LoraPair(X, Y, Z, error.flatten(), effect.flatten())


class _Candidate(NamedTuple):
    loss: Tensor  # (H, 1, 1) the error and what rounding the factors adds to it
    error: Tensor  # (H, 1, 1)
    X: Tensor  # (H, r, d)
    Z: Tensor  # (H, r, d)


def _candidates(Q: Tensor, K: Tensor, X: Tensor, rounding: float) -> list[_Candidate]:
    """The best right sides for a left side ``X``, one per cut of ``P^+`` that changes anything."""
    d = X.shape[-1]
    P = Q[..., :d] + Q[..., d:] @ X
    Y = K[..., d:] - K[..., :d] @ X.mT
    U, S, Vh = torch.linalg.svd(P, full_matrices=False)
    coordinates = U.mT @ Q[..., d:]
    found = []
    for cut in CUTS:
        kept = S.gt(cut * S[..., :1])
        Z = (Vh.mT @ (torch.where(kept, 1 / torch.where(kept, S, 1.0), 0.0)[..., None] * coordinates)).mT
        error = norm((Q[..., d:] - P @ Z.mT) @ Y.mT)
        found.append(_Candidate(error + rounding * norm(P) * norm(K[..., :d] + Y @ Z), error, X, Z))
        if kept.all():
            break
    return found


def _dropped(Q: Tensor, K: Tensor, rank: int) -> Tensor:
    """Orthonormal ``b`` (H, d + r, r) with ``K b`` spanning the smallest right singular directions of ``Q K^T``.

    Null directions of ``K`` come first: floored singular values make it invertible and them the cheapest to drop.
    """
    n = K.shape[-1]
    K = pad(K, (0, 0, 0, n - K.shape[-2]))
    _, S, Vh = torch.linalg.svd(K)
    S = S.maximum(EPSILON * S[..., :1]).where(S[..., :1] > 0, 1.0)
    N = Q @ (Vh.mT * S[..., None, :])  # Q K^T in the left singular basis of K
    _, _, right = torch.linalg.svd(N)
    b = Vh.mT @ (right[..., n - rank :, :].mT / S[..., None])
    b = b / torch.linalg.vector_norm(b, dim=-2, keepdim=True).clamp_min(1e-300)
    return torch.linalg.qr(b).Q


def lora_of_columns(basis: Tensor, mix: Tensor) -> LoraWeights:
    """LoRA of a layer whose OUTPUTS are split into heads (to_q, to_k, to_v) from ``dW_h = basis_h @ mix_h``.

    ``basis`` (H, D_in, r), ``left_added`` without its bias row or ``Y``, and ``mix`` (H, r, d), ``X`` or ``Z``, give
    ``down`` (H r, D_in) and ``up`` (H d, H r), block diagonal.
    """
    return LoraWeights(basis.mT.flatten(0, 1).contiguous(), torch.block_diag(*mix.mT))


def lora_of_rows(basis: Tensor, mix: Tensor) -> LoraWeights:
    """LoRA of a layer whose INPUTS are split into heads (to_out) from ``dW_h^T = basis_h @ mix_h``.

    ``basis`` (H, D_out, r), ``Y``, and ``mix`` (H, r, d), ``Z``, give ``down`` (H r, H d), block diagonal, and ``up``
    (D_out, H r).
    """
    return LoraWeights(torch.block_diag(*mix), basis.movedim(0, 1).flatten(1).contiguous())


def truncate_lora(down: Tensor, up: Tensor, rank: int) -> tuple[LoraWeights, float]:
    """The best rank-``rank`` approximation of ``up @ down``, and its relative Frobenius error.

    ``down`` (R, D_in) and ``up`` (D_out, R) become factors of ``min(rank, R, D_in, D_out)`` components in float64,
    each shared equally between both so that half precision does not overflow.

    Raises:
        CheckpointError: NaN or infinite values.
    """
    svd = svd_of_product(_finite(up), _finite(down).mT)
    left, right = svd.truncated(rank)
    return LoraWeights(right.mT.contiguous(), left), float(svd.error(rank))


def update_of_columns(lora: LoraWeights, num_heads: int) -> HeadUpdate:
    """Per-head view of a LoRA on a layer whose outputs are split into heads (to_q, to_k, to_v)."""
    return HeadUpdate(lora.down.mT, lora.up.unflatten(0, (num_heads, -1)).mT)


def update_of_rows(lora: LoraWeights, num_heads: int) -> HeadUpdate:
    """Per-head view of a LoRA on a layer whose inputs are split into heads (to_out)."""
    return HeadUpdate(lora.up, lora.down.unflatten(1, (num_heads, -1)).movedim(1, 0))


def lora_to_product(
    left: Tensor, left_update: HeadUpdate | None, right: Tensor, right_update: HeadUpdate | None, rank: int
) -> NearestProduct:
    """The best rank-``rank`` added product per head in place of an ordinary LoRA.

    Args:
        left: (H, D_l, d); right: (H, D_r, d). With the bias as last row of ``left`` the added product gets a non-zero
            bias row, which an adapter can hold; updates may be one row shorter, a LoRA does not move the bias.
        left_update, right_update: the LoRA of either side, ``None`` where it does not touch the layer.
        rank: components kept; zeros fill up what the change does not have.

    Raises:
        CheckpointError: NaN or infinite values.
    """
    L, R = _finite(left), _finite(right)
    lefts, rights = [L[..., :0]], [R[..., :0]]
    moved = R
    if right_update is not None:
        basis, mix = _padded(right_update, R)
        lefts.append(L @ mix.mT)
        rights.append(basis)
        moved = R + basis @ mix
    if left_update is not None:
        basis, mix = _padded(left_update, L)
        lefts.append(basis)
        rights.append(moved @ mix.mT)
    svd = svd_of_product(torch.cat(lefts, -1), torch.cat(rights, -1))
    left_added, right_added = (pad(side, (0, rank - side.shape[-1])) for side in svd.truncated(rank))
    return NearestProduct(left_added, right_added, svd.error(rank), svd.S)


def _padded(update: HeadUpdate, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Basis (H, D, R') and mix (H, R', d) with ``R' <= d`` and zero rows where ``matrix`` has a bias."""
    mix = _finite(update.mix)
    basis = _finite(update.basis).expand(mix.shape[0], -1, -1)
    if basis.shape[-1] > mix.shape[-1]:  # more components than the head has columns
        basis = basis @ mix
        mix = torch.eye(mix.shape[-1], dtype=mix.dtype, device=mix.device).expand(mix.shape[0], -1, -1)
    return pad(basis, (0, 0, 0, matrix.shape[-2] - basis.shape[-2])), mix


def _balance(A: Tensor, B: Tensor, L: Tensor, R: Tensor) -> Tensor:
    """``t`` (H, 1, 1) such that ``|A t| / |L| = |B / t| / |R|``; 1 where one of them is zero."""
    top, bottom = norm(B) * norm(L), norm(A) * norm(R)
    usable = (top > 0) & (bottom > 0)
    return torch.where(usable, top / torch.where(usable, bottom, 1.0), 1.0).sqrt()


def _finite(tensor: Tensor) -> Tensor:
    tensor = double(tensor.detach())
    if not torch.isfinite(tensor).all():
        raise CheckpointError("attention weights or adapter factors hold NaN or infinite values; nothing to convert")
    return tensor
