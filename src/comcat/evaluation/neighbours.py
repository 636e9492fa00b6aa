"""What features are for: whose images are next to each other (cosine of (n, D) features, the image itself left out)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError
from ..models.running import labels_of

#: Images that are compared with each other at most; the first ones.
MOST = 20_000


def nearest(features: Tensor) -> Tensor:
    """The index (n,) of every image's nearest neighbour among the others."""
    x = F.normalize(features.float(), dim=1)
    found = []
    for start in range(0, len(x), 1024):
        near = x[start : start + 1024] @ x.mT
        rows = torch.arange(len(near), device=x.device)
        near[rows, rows + start] = -torch.inf
        found.append(near.argmax(1))
    return torch.cat(found)


class Neighbours:
    """The features of two models, batch by batch, and the labels where there are some."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.count = 0

    def add(self, ours: Tensor, theirs: Tensor, labels: Tensor | None) -> None:
        """A batch of (B, D) features of the model and of its reference, and (B,) class numbers."""
        if self.count < MOST:
            self.kept.append((ours.cpu(), theirs.cpu(), None if labels is None else labels.cpu()))
            self.count += len(ours)

    def result(self) -> dict[str, float]:
        """In percent; nothing for fewer than two images.

        ``neighbours``: images whose nearest neighbour is the same in both models. With labels ``knn_top1`` and
        ``knn_top1_reference``: images whose nearest neighbour is of the same class.
        """
        if self.count < 2:
            return {}
        ours, theirs = (nearest(torch.cat([entry[i] for entry in self.kept])) for i in (0, 1))  # type: ignore[misc]
        found = {"neighbours": 100 * float((ours == theirs).float().mean())}
        truths = [labels for _, _, labels in self.kept if labels is not None]
        if len(truths) == len(self.kept):
            truth = torch.cat(truths)
            for name, near in (("knn_top1", ours), ("knn_top1_reference", theirs)):
                found[name] = 100 * float((truth[near] == truth).float().mean())
        return found


def class_numbers(batch: Any) -> Tensor | None:
    """The (B,) class numbers of a batch, if it has some."""
    try:
        labels = labels_of(batch)
    except DataError:
        return None
    return None if labels.ndim != 1 or labels.is_floating_point() or bool((labels < 0).any()) else labels
