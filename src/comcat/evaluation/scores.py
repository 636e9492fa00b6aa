"""Labels as they are compared with outputs of every kind, and how a score is shown."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DataError

#: Pixels of this class count for nothing, as in Pascal VOC and Cityscapes.
IGNORED = 255


def check_labels(kind: str, output: Tensor, labels: Tensor, use: str = "Evaluate") -> Tensor:
    """The labels as they are compared: int64 class numbers, or floating-point truths of the output's shape.

    Raises:
        DataError: of another shape or type than ``kind`` needs, or none of the model's classes.
    """
    if len(labels) != len(output):
        raise DataError(f"a batch has {len(output)} images and {len(labels)} labels. Give one label for each image")
    if kind in ("classes", "maps") and output.shape[1] > 1:
        return _class_numbers(kind, output, labels, use)
    if kind == "features":
        raise DataError("features have no labels to compare with. Use comcat.agreement(model, reference, images)")
    if kind in ("values", "maps") and labels.is_floating_point() and labels.numel() == output.numel():
        labels = labels.reshape(output.shape)  # (B,) for (B, 1), (B, H, W) for (B, 1, H, W)
    if labels.shape != output.shape or (kind != "labels" and not labels.is_floating_point()):
        wanted = "0 or 1 of" if kind == "labels" else "floating-point truths of"
        raise DataError(
            f"outputs that are {kind} need {wanted} shape {tuple(output.shape)}, not {tuple(labels.shape)} "
            f"{labels.dtype}. If the outputs are something else, say so with outputs="
        )
    labels = labels.to(output.dtype)
    if kind == "labels" and not bool(((labels == 0) | (labels == 1)).all()):
        raise DataError("several labels an image must be 0 or 1 each. Check the data")
    if not torch.isfinite(labels).all():
        raise DataError("some labels are NaN or infinite. Check the data")
    return labels


def _class_numbers(kind: str, output: Tensor, labels: Tensor, use: str) -> Tensor:
    shape = (len(output), *output.shape[2:])
    described = f"{tuple(labels.shape)} {str(labels.dtype).removeprefix('torch.')}"
    if labels.shape != shape or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        if labels.shape == output.shape:
            fix = "These look one-hot: give labels.argmax(1), or outputs='labels' if several may apply to an image"
        else:
            fix = "Give class numbers" + (" at the resolution of the output" if kind == "maps" else "")
        raise DataError(f"labels must be whole numbers of shape {shape}, not {described}. {fix}")
    labels = labels.long()
    counted = labels[labels != IGNORED] if kind == "maps" else labels
    if not counted.numel():
        return labels
    low, high = int(counted.min()), int(counted.max())
    if low < 0:
        raise DataError(f"some images have no label ({low}). {use} on a labelled split")
    if high >= output.shape[1]:
        raise DataError(
            f"the label {high} is none of the model's, which has {output.shape[1]} outputs "
            f"(0 to {output.shape[1] - 1}). Use the data that the model was trained for"
        )
    return labels


class Figure(NamedTuple):
    """One score, ready to be shown."""

    label: str
    value: float
    unit: str

    def shown(self) -> str:
        return f"{self.value:.2f} %" if self.unit else f"{self.value:.4f}"

    def change(self, before: Figure) -> str:
        """The difference to an earlier value."""
        return f"{self.value - before.value:+.2f}" if self.unit else f"{self.value - before.value:+.4f}"
