"""What a model's answers are worth against the truth, by kind of output; all streamed but the ranking of labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError
from ..models.running import double

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


#: Name, label and unit of the scores of every kind of outputs, the most telling one first.
SHOWN = {
    "classes": (("top1", "top-1", "%"), ("top5", "top-5", "%")),
    "labels": (("mean_average_precision", "mean AP", "%"), ("accuracy", "accuracy", "%")),
    "values": (
        ("r2", "R²", ""),
        ("mae", "mean error", ""),
        ("rmse", "RMSE", ""),
        ("abs_rel", "AbsRel", ""),
        ("delta1", "delta < 1.25", "%"),
    ),
    "features": (
        ("loss", "rel. error", ""),
        ("cosine", "cosine", ""),
        ("neighbours", "same neighbour", "%"),
        ("knn_top1", "k-NN top-1", "%"),
    ),
    "maps": (("mean_iou", "mean IoU", "%"), ("top1", "pixels", "%")),
}


class Score:
    """Sums over batches; :meth:`result` gives loss and metrics, accuracies in percent.

    classes: ``top1``, ``top5``. maps: the same per pixel, and ``mean_iou`` over the classes that occur.
    labels: ``accuracy`` of single labels and ``mean_average_precision``. values: ``r2`` (over all outputs) and ``mae``;
    of maps of one positive value (depth; zeros are unknown) also ``rmse``, ``abs_rel`` = mean |error| / truth and
    ``delta1``, the share of pixels where the larger of both is below 1.25 times the smaller, as is usual for depth
    (Eigen, Puhrsch and Fergus, 2014).
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.count = 0
        self.sums: dict[str, float | Tensor] = {}
        self.kept: list[tuple[Tensor, Tensor]] = []

    def add(self, output: Tensor, labels: Tensor) -> None:
        """One batch, with labels from :func:`check_labels`."""
        if self.kind in ("classes", "maps") and output.shape[1] > 1:
            self._answers(output, labels)
        elif self.kind == "labels":
            self.count += labels.numel()
            self._sum("loss", F.binary_cross_entropy_with_logits(output, labels, reduction="sum"))
            self._sum("accuracy", ((output > 0) == (labels > 0)).sum())
            self.kept.append((output.cpu(), labels.cpu()))
        else:
            self.count += len(labels)
            output, labels = double(output), double(labels)
            axes = [0, *range(2, labels.ndim)]
            self._sum("square", (output - labels).square().sum(axes))
            self._sum("absolute", (output - labels).abs().sum(axes))
            self._sum("first", labels.sum(axes))
            self._sum("second", labels.square().sum(axes))
            if output.ndim == 4 and output.shape[1] == 1:
                self._depth(output, labels)
            self._sum("numbers", torch.tensor(float(labels.numel() // labels.shape[1])))

    def join(self, other: Score) -> None:
        """Add what ``other`` has gathered."""
        self.count += other.count
        self.kept += other.kept
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def _answers(self, output: Tensor, labels: Tensor) -> None:
        if self.kind == "maps":
            valid = labels != IGNORED
            output, labels = output.movedim(1, -1)[valid], labels[valid]
        self.count += len(labels)
        best = output.topk(min(5, output.shape[1]), dim=1).indices  # (batch, 5)
        hits = best == labels[:, None]
        self._sum("top1", hits[:, 0].sum())
        self._sum("top5", hits.sum())
        self._sum("loss", F.cross_entropy(output, labels, reduction="sum"))
        if self.kind == "maps":
            C = output.shape[1]
            self._sum("confusion", double(torch.bincount(labels * C + best[:, 0], minlength=C * C).view(C, C)))

    def _depth(self, output: Tensor, truth: Tensor) -> None:
        self._sum("negative", (truth < 0).sum())
        output, truth = output[truth > 0], truth[truth > 0]
        self._sum("known", double(torch.tensor(truth.numel())))
        self._sum("known_square", (output - truth).square().sum())
        self._sum("relative", ((output - truth).abs() / truth).sum())
        self._sum("near", ((output < 1.25 * truth) & (truth < 1.25 * output)).sum())

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + (value.cpu() if value.ndim else float(value))

    def result(self) -> dict[str, float]:
        """The loss (nats; mean squared error for values) and the metrics of this kind."""
        n, sums = max(self.count, 1), self.sums
        if self.kind == "labels":
            output, labels = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
            return {
                "loss": float(sums["loss"]) / n,
                "accuracy": 100 * float(sums["accuracy"]) / n,
                "mean_average_precision": 100 * average_precision(output, labels),
            }
        if "square" in sums:
            numbers, square = float(sums["numbers"]), torch.as_tensor(sums["square"])
            first, second = torch.as_tensor(sums["first"]), torch.as_tensor(sums["second"])
            total = (second - first.square() / numbers).sum()
            known = 0.0 if float(sums.get("negative", 1)) else float(sums["known"])
            depth = (
                {
                    "rmse": (float(sums["known_square"]) / known) ** 0.5,
                    "abs_rel": float(sums["relative"]) / known,
                    "delta1": 100 * float(sums["near"]) / known,
                }
                if known
                else {}
            )
            return {
                **depth,
                "loss": float(square.mean()) / numbers,
                "r2": 1 - float(square.sum() / total.clamp_min(1e-300)),
                "mae": float(torch.as_tensor(sums["absolute"]).mean()) / numbers,
            }
        found = {"top1": 100 * float(sums["top1"]) / n, "top5": 100 * float(sums["top5"]) / n}
        found["loss"] = float(sums["loss"]) / n
        if self.kind == "maps":
            confusion = torch.as_tensor(sums["confusion"])
            union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
            found["mean_iou"] = 100 * float((confusion.diagonal() / union)[union > 0].mean())
        return found


def average_precision(scores: Tensor, labels: Tensor) -> float:
    """Mean over the labels that occur of the precision at each true image, best score first; both are (n, C)."""
    order = scores.argsort(dim=0, descending=True, stable=True)
    true = double(labels.gather(0, order))
    precision = true.cumsum(0) / torch.arange(1, len(true) + 1, dtype=torch.float64)[:, None]
    occurs = true.sum(0) > 0
    return float(((precision * true).sum(0)[occurs] / true.sum(0)[occurs]).mean()) if occurs.any() else float("nan")
