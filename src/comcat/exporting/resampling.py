"""Antialiased resizing as two products of matrices, for runtimes that have no operator of that kind.

    out = A_h x A_w^T,   A[i, j] = k((j + 1/2 - (i + 1/2) s) / max(s, 1)), rows divided by their sums,   s = in / out

``k`` is the cubic kernel with a = -1/2 or the triangle, as in Pillow and ``torch.nn.functional.interpolate`` with
``antialias=True``. timm's models resize their position embeddings so for images of other sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _matrix(kernel: Callable[[Tensor], Tensor], before: int, after: int, like: Tensor) -> Tensor:
    """(after, before), of sizes that need not be known yet."""
    kind: dict[str, Any] = {"dtype": torch.float32, "device": like.device}
    scale = torch.full((1,), before, **kind) / after
    centers = (torch.arange(after, **kind) + 0.5) * scale
    places = torch.arange(before, **kind) + 0.5
    weights = kernel((places - centers[:, None]) / scale.clamp(min=1))
    return weights / weights.sum(1, keepdim=True)


def _resized(kernel: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def resize(
        x: Tensor, size: Sequence[int] | None, align_corners: bool, scale_factors: Sequence[float] | None = None
    ) -> Any:
        if size is None or align_corners or scale_factors is not None:
            return NotImplemented
        rows, columns = (_matrix(kernel, n, m, x) for n, m in zip(x.shape[2:], size, strict=True))
        return (rows @ x.float() @ columns.T).to(x.dtype)

    return resize


_PRODUCTS = {
    torch.ops.aten._upsample_bicubic2d_aa.vec: _resized(_cubic),
    torch.ops.aten._upsample_bilinear2d_aa.vec: _resized(_triangle),
}


def products_for_resizing(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without antialiased resizing; itself where it has none."""
    if not any(node.target in _PRODUCTS for node in program.graph.nodes):
        return program
    return program.run_decompositions(dict(_PRODUCTS))
