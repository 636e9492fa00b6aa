"""Where in the picture an added product acts: a mask, brought to the grid of tokens of every layer.

With a mask m in [0, 1], one value per token of the picture, the product has the strength s m(token) for this token's
query:

    scores_h + d^-1/2 s m (x_q A_q,h)(x_k A_k,h)^T          out + s m sum_h softmax(scores_h)(x_v A_v,h) A_o,h

so that 1 is the product as it is, 0 the layer without it, and what lies between the same as that part of the strength.
Keys and values are not masked: a token inside the mask sees every other. A token that has no place in the picture, such
as one of the text, has m = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import DataError

#: Width by height of mask and picture may differ by this much, as they do where both are rounded to whole pixels.
ASPECT_TOLERANCE = 0.01

#: Sizes of sequences whose weights are kept; a model has a handful.
MOST_KEPT = 64


@dataclass(frozen=True)
class TokenGrid:
    """Where the picture's tokens stand in one sequence: frame by frame, row by row.

    Attributes:
        before: how many tokens stand in front of them; one number for each sample, or for all.
    """

    frames: int
    height: int
    width: int
    before: tuple[int, ...] = (0,)


class Canvas(Protocol):
    """The picture that a model is drawing."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), in cells of the model's input."""

    def describe(self) -> str:
        """Its size for an error message: width x height."""

    def grid(self, tokens: int) -> TokenGrid:
        """Where it is in a sequence of so many tokens; DataError where it is not known."""


class Mask:
    """A mask on the picture that a model draws.

    Args:
        values: (height, width) in [0, 1], at any resolution.
        name: whose mask it is, for messages.
    """

    def __init__(self, values: Tensor, canvas: Canvas, name: str) -> None:
        self.values = values
        self.canvas = canvas
        self.name = name
        self._weights: dict[tuple[TokenGrid, int, torch.device, torch.dtype], Tensor] = {}

    def weights(self, tokens: int, like: Tensor) -> Tensor:
        """(1 or batch, tokens): m of every token of a sequence, on the device and in the dtype of ``like``.

        Raises:
            DataError: width by height of mask and picture differ.
        """
        grid = self.canvas.grid(tokens)
        key = (grid, tokens, like.device, like.dtype)
        if key not in self._weights:
            self._check_aspect()
            with torch.inference_mode(False):  # whoever trains later can use them too
                picture = resized(self.values, grid.height, grid.width).flatten().repeat(grid.frames)
                rows = torch.ones(len(grid.before), tokens, dtype=picture.dtype)
                for row, start in zip(rows, grid.before, strict=True):
                    row[start : start + len(picture)] = picture
                if len(self._weights) >= MOST_KEPT:
                    self._weights.clear()
                self._weights[key] = rows.to(like.device, like.dtype)
        return self._weights[key]

    def _check_aspect(self) -> None:
        (height, width), (rows, columns) = self.canvas.size, self.values.shape
        if abs(columns * height / (rows * width) - 1) > ASPECT_TOLERANCE:
            raise DataError(
                f"the mask of {self.name!r} is {columns} x {rows} pixels (width x height), and the picture "
                f"{self.canvas.describe()}: the one does not fit on the other. Draw a mask of the picture's aspect "
                "ratio, at any resolution, or a picture of the mask's"
            )


def resized(values: Tensor, height: int, width: int) -> Tensor:
    """(H, W) to (height, width): the mean over the area of every new cell, so that the mean over all stays.

    What is white stays exactly 1.
    """
    sums = overlap(values.shape[0], height) @ values.double() @ overlap(values.shape[1], width).T
    return sums / values.numel()


def overlap(old: int, new: int) -> Tensor:
    """(new, old): how much of each of ``new`` equal cells lies in each of ``old`` cells of the same length in all.

    In units of 1 / (old new) of this length, in which a row sums to ``old``, exactly.
    """
    starts, cells = torch.arange(new).unsqueeze(1) * old, torch.arange(old) * new
    shared = torch.minimum(starts + old, cells + new) - torch.maximum(starts, cells)
    return shared.clamp(min=0).double()
