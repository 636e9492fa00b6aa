"""Tables with boxes: the column ``objects`` of Hub data sets, with ``bbox`` and ``category`` for each image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import DataError
from ..wording import some
from .hub_tables import HubSource, image_column

#: ``bbox`` as the corner, width and height in pixels (COCO), or as two corners (Pascal VOC).
BOX_FORMS = ("xywh", "xyxy")
_COLUMN = "objects"
_CATEGORIES = ("category", "categories", "label", "labels", "category_id")
_CROWDS = ("iscrowd", "is_crowd")


class BoxSource(HubSource):
    """One split of a table of images with boxes; the label of an image is what detectors of transformers learn from.

    ``class_labels`` (n,), ``boxes`` (n, 4) as centre, width and height relative to the image, and ``iscrowd`` where the
    table has it.

    Args:
        form: of the boxes in the table.
    """

    def __init__(self, data: str, split: str | None, cache: str | None, mode: str, form: str = "xywh") -> None:
        self.form = form
        self._numbers: list[int] | None = None
        super().__init__(data, split, cache, mode)

    def _columns(self, features: Any, data: str, datasets: Any) -> tuple[str, str | None]:
        image = image_column(features, data, datasets)
        objects = features.get(_COLUMN)
        inner = getattr(objects, "feature", objects)
        if isinstance(objects, list):
            inner = objects[0]
        if not isinstance(inner, dict) or "bbox" not in inner:
            return image, None
        self._category = next((name for name in _CATEGORIES if name in inner), None)
        if self._category is None:
            raise DataError(f"the boxes of {data} have no categories; its objects hold {', '.join(inner)}")
        self._crowd = next((name for name in _CROWDS if name in inner), None)
        feature = inner[self._category]
        self.class_names = getattr(getattr(feature, "feature", feature), "names", None)
        return image, _COLUMN

    def number(self, names: dict[str, int], called: list[str] | None = None) -> None:
        """Take the categories by their names for the numbers of a model's labels.

        Args:
            called: other names of the categories, in their order.

        Raises:
            DataError: the model has no label of such a name.
        """
        own = called or self.class_names
        if own is None:
            return  # numbers they are
        known = {_plain(name): number for name, number in names.items()}
        missing = [name for name in own if _plain(name) not in known]
        if missing:
            raise DataError(
                f"the model has no label for {len(missing)} of {len(own)} categories of {self.name}: "
                f"{some(map(repr, missing))}; give the model's names for all of them: --class-names FILE, one a line"
            )
        self._numbers = [known[_plain(name)] for name in own]

    def read(self, index: int) -> tuple[Image.Image, Any]:
        row = self._table[index]
        image = self._picture(row)
        return image, -1 if self._label is None else self._target(row[_COLUMN], image.size)

    def _target(self, objects: Any, size: tuple[int, int]) -> dict[str, torch.Tensor]:
        if isinstance(objects, list):  # of one dictionary for each
            objects = {name: [one[name] for one in objects] for name in (objects[0] if objects else {"bbox": 0})}
        boxes = np.asarray(objects["bbox"], dtype=np.float64).reshape(-1, 4)
        categories = [int(one) for one in objects.get(self._category, ())]
        if self._numbers is not None:
            categories = [self._numbers[one] for one in categories]
        if self.form == "xywh":
            boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        limits, slack = np.array([*size, *size]), 1 + 0.005 * max(size)
        if (boxes < -slack).any() or (boxes > limits + slack).any() or (boxes[:, 2:] < boxes[:, :2]).any():
            other = (
                "corners, give --boxes xyxy" if self.form == "xywh" else "corner, width and height, give --boxes xywh"
            )
            raise ValueError(f"its boxes lie outside of it; if they are {other}")
        boxes = boxes.clip(0, limits) / limits
        centred = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
        target = {"class_labels": torch.tensor(categories, dtype=torch.int64), "boxes": torch.from_numpy(centred)}
        if self._crowd is not None:
            target["iscrowd"] = torch.tensor([int(one) for one in objects.get(self._crowd, ())], dtype=torch.int64)
        return target

    def labels(self) -> np.ndarray | None:
        return np.full(len(self), -1) if self._label is None else None


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ")
