"""Products of two tall matrices ``left @ right^T``, through their small triangular factors: tensors in, tensors out.

``left`` (..., D_l, m) and ``right`` (..., D_r, m) with ``m`` below both; a D_l x D_r matrix is never formed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class ProductSVD(NamedTuple):
    """``left @ right^T = U diag(S) V^T``; the first r components are the best rank-r approximation."""

    U: Tensor  # (..., D_l, k)
    V: Tensor  # (..., D_r, k)
    S: Tensor  # (..., k), descending

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """``left`` (..., D_l, r) and ``right`` (..., D_r, r) of ``min(rank, k)`` components, shared equally by both.

        Equal shares keep half precision from overflowing.
        """
        kept = self.S[..., :rank].sqrt()[..., None, :]
        return self.U[..., :rank] * kept, self.V[..., :rank] * kept

    def error(self, rank: int) -> Tensor:
        """Of the truncation, in the Frobenius norm and relative to that of the product; 0 for a product of 0."""
        total = torch.linalg.vector_norm(self.S, dim=-1)
        return torch.linalg.vector_norm(self.S[..., rank:], dim=-1) / torch.where(total > 0, total, 1.0)


def svd_of_product(left: Tensor, right: Tensor) -> ProductSVD:
    """The singular value decomposition of ``left @ right^T``."""
    Q_l, R_l = torch.linalg.qr(left)
    Q_r, R_r = torch.linalg.qr(right)
    U, S, Vh = torch.linalg.svd(R_l @ R_r.mT, full_matrices=False)
    return ProductSVD(Q_l @ U, Q_r @ Vh.mT, S)


def core(matrix: Tensor) -> Tensor:
    """The triangular factor (..., k, m), which has the matrix's inner products."""
    return torch.linalg.qr(matrix, mode="r").R


def norm(matrix: Tensor) -> Tensor:
    """The Frobenius norm (..., 1, 1)."""
    return torch.linalg.matrix_norm(matrix, keepdim=True)


def norm_of_product(left: Tensor, right: Tensor) -> Tensor:
    """The Frobenius norm (..., 1, 1) of ``left @ right^T``."""
    return norm(core(left) @ core(right).mT)


def even_shares(left: Tensor, right: Tensor, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors of the same product ``left @ right^T`` whose columns are all of the same size, in float64.

    Any ``left T``, ``right T^-T`` have the same product. Where every column is rounded relative to its own size, the
    squared error of the product is proportional to ``sum_i |left_i|^2 |right_i|^2``. By Cauchy-Schwarz that is at
    least ``(sum_i S_i)^2 / r`` with the product's singular values S, and these factors, the balanced ones of the SVD
    turned until all columns have the mean size, reach it.

    Args:
        left: (H, D_l, r); right: (H, D_r, r).
        active: (H, r), which columns are to be used, at least as many as the product's rank; all by default. The
            others become zero.

    A product of zero keeps its factors, one of which may be waiting to be trained.
    """
    left, right = left.double(), right.double()
    rank = left.shape[-1]
    active = torch.ones(left.shape[0], rank, dtype=torch.bool, device=left.device) if active is None else active
    active = torch.arange(rank, device=left.device) < active.sum(-1, keepdim=True)  # as the SVD orders them
    svd = svd_of_product(left, right)
    short = rank - svd.S.shape[-1]
    L, R = (pad(side, (0, short)) for side in svd.truncated(rank))
    turn = _evening(pad(svd.S, (0, short)), active) * active[:, None]  # without what rounding has left of the others
    untouched = (svd.S[:, :1] == 0)[..., None]
    return torch.where(untouched, left, L @ turn), torch.where(untouched, right, R @ turn)


def _evening(sizes: Tensor, active: Tensor) -> Tensor:
    """Orthogonal (H, r, r) that give ``T^T diag(sizes) T`` equal entries on its diagonal, as far as it is active.

    One plane rotation brings one entry to the mean (Bendel and Mickey, 1978), so r - 1 of them are enough.
    """
    heads, rank = sizes.shape
    gram = torch.diag_embed(sizes)
    turn = torch.eye(rank, dtype=sizes.dtype, device=sizes.device).repeat(heads, 1, 1)
    mean = sizes.sum(-1) / active.sum(-1).clamp_min(1)
    each = torch.arange(heads, device=sizes.device)
    for _ in range(rank - 1):
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        low = diagonal.masked_fill(~active, torch.inf).argmin(-1)
        high = diagonal.masked_fill(~active, -torch.inf).argmax(-1)
        below, above = diagonal[each, low] - mean, diagonal[each, high] - mean
        both = gram[each, low, high]
        apart = (low != high) & (above > 1e-12 * mean) & (below < 0)
        # tan of the angle: above t^2 + 2 both t + below = 0, whose roots are real since below < 0 < above.
        root = (both.square() - above * below).clamp_min(0).sqrt()
        tan = torch.where(apart, (root - both) / torch.where(apart, above, 1.0), 0.0)
        cos = 1 / (1 + tan.square()).sqrt()
        sin = tan * cos
        plane = torch.eye(rank, dtype=sizes.dtype, device=sizes.device).repeat(heads, 1, 1)
        plane[each, low, low] = plane[each, high, high] = cos
        plane[each, high, low] = torch.where(apart, sin, plane[each, high, low])
        plane[each, low, high] = torch.where(apart, -sin, plane[each, low, high])
        gram, turn = plane.mT @ gram @ plane, turn @ plane
    return turn
