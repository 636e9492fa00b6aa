"""Products of two tall matrices ``left @ right^T``, through their small triangular factors: tensors in, tensors out.

``left`` (..., D_l, m) and ``right`` (..., D_r, m) with ``m`` below both; a D_l x D_r matrix is never formed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
