"""Boxes in an image: a detector of transformers against boxes of the data set, or against what another one detects.

Boxes are relative to the image throughout: their overlaps, and with them the average precision, do not depend on the
size of the image. The scores are those of COCO, computed by pycocotools.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import DataError, ModelError
from ...models.running import images_of, label_entry
from ..outputs import Forward, Outputs
from .evaluation_task import EvaluationTask

#: Detections of an image that count, as in COCO.
MOST = 100
#: What a reference model detects with this score or more is the truth.
SURE = 0.5
#: Image processors of types that transformers maps to none, by which their authors publish them.
_PROCESSORS = {
    "d_fine": "RTDetrImageProcessor",
    "rt_detr_v2": "RTDetrImageProcessor",
    "dab-detr": "ConditionalDetrImageProcessor",
    "lw_detr": "DeformableDetrImageProcessor",
}
Detections = dict[str, Tensor]


def is_detector(model: nn.Module) -> bool:
    """Whether a model finds objects of fixed classes in images; those that are asked for objects by text do not."""
    cls = type(model)
    if not (cls.__module__.startswith("transformers.models.") and cls.__name__.endswith("ForObjectDetection")):
        return False
    return not any("input_ids" in name for name in inspect.signature(cls.forward).parameters)


class Detection(EvaluationTask):
    """``map`` is COCO's mean average precision over overlaps of 0.50 to 0.95, ``map_50`` and ``map_75`` at these."""

    kind: ClassVar = "detections"
    shown: ClassVar = (("map", "mAP", "%"), ("map_50", "mAP50", "%"), ("map_75", "mAP75", "%"))

    def check(self, output: list[Detections], labels: Any) -> list[Detections]:
        return [_truth(label) for label in labels]

    def add(self, output: list[Detections], labels: list[Detections]) -> None:
        self.count += len(labels)
        self.kept += zip(output, labels, strict=True)

    def compare(self, ours: Any, theirs: Any, batch: Any) -> None:
        """Two models may well detect different numbers of objects."""
        self._compare(ours, theirs, batch)

    def _compare(self, ours: Any, theirs: Any, batch: Any) -> None:
        """What the reference is sure of is the truth."""
        truths = []
        for found in theirs[0]:
            sure = found["scores"] >= SURE
            boxes = found["boxes"][sure]
            corners = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
            truths.append({"labels": found["labels"][sure], "boxes": corners})
        self.add(ours[0], truths)

    def agreed(self) -> dict[str, Any]:
        return {"same": float("nan"), "kl": float("nan"), "scores": self.result()}

    def result(self) -> dict[str, float]:
        if not any(len(truth["labels"]) for _, truth in self.kept):
            raise DataError(
                "there is not one box to compare detections with: the images have none, or the reference model is sure "
                f"of none (score {SURE} or more). Evaluate on other images"
            )
        precision = _coco([found for found, _ in self.kept], [truth for _, truth in self.kept])
        return {name: 100 * value for name, value in zip(("map", "map_50", "map_75"), precision, strict=True)}


class DetectorOutputs(Outputs):
    """The detections of a model: for each image ``scores``, ``labels`` and ``boxes`` (corners), the best ones first.

    They are made by the ``post_process_object_detection`` of the image processor of the model's type.

    Raises:
        ModelError: the model is no detector.
    """

    def __init__(self, model: nn.Module, forward: Forward | None = None) -> None:
        super().__init__(model, None, forward=forward)
        self.kind = Detection.kind
        self._processor = _processor(model)
        self._raw: tuple[Tensor, ...] = ()

    def inputs(self, batch: Any, place: str) -> Any:
        mask = batch.get("pixel_mask") if isinstance(batch, Mapping) else None
        return _Pixels(images_of(batch, place), mask)

    def labels(self, batch: Any, device: torch.device) -> Any:
        found = label_entry(batch)
        if not isinstance(found, (list, tuple)) or not all(isinstance(label, Mapping) for label in found):
            raise DataError(
                "the labels of detections are a list with {'class_labels': (n,), 'boxes': (n, 4)} for each image; give "
                "data with boxes, or compare with the detections of another model: reference="
            )
        return found

    def run(self, images: Any) -> Any:
        if self.forward is not None:
            raw = self.forward(self.model, images.tensor)
        else:
            mask = {} if images.mask is None else {"pixel_mask": images.mask}
            raw = self.model(pixel_values=images.tensor, **mask)
        if not (hasattr(raw, "logits") and hasattr(raw, "pred_boxes")):
            raise ModelError(
                f"{type(self.model).__name__} returns no logits and pred_boxes of queries; give a metric of your own: "
                "evaluate="
            )
        self._raw = raw.logits, raw.pred_boxes
        found = self._processor.post_process_object_detection(raw, threshold=-1.0, target_sizes=None)
        return ([_best(one) for one in found],)

    def tensors(self, found: Any) -> tuple[Tensor, ...]:
        return self._raw


@dataclass(frozen=True)
class _Pixels:
    """Images (B, C, H, W) and which of their pixels are no padding, (B, H, W)."""

    tensor: Tensor
    mask: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> _Pixels:
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, tensor=self.tensor.to(device, dtype), mask=mask)

    def __len__(self) -> int:
        return len(self.tensor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)  # shape, device and dtype, of which errors speak


def _processor(model: Any) -> Any:
    if not is_detector(model):
        raise ModelError(
            f"{type(model).__name__} is no detector of transformers (...ForObjectDetection), whose boxes could be "
            "compared; give a metric of your own: evaluate="
        )
    return processor_for(model.config.model_type, type(model).__name__)


def processor_for(kind: str, name: str) -> Any:
    """The image processor of a type of model, with its defaults: detections do not depend on its settings.

    Raises:
        ModelError: transformers has none that makes detections; ``name`` is that of the model.
    """
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as KNOWN

    names = KNOWN.get(kind) or {}
    chosen = names if isinstance(names, str) else next(iter(names.values()), None) or _PROCESSORS.get(kind)
    made = getattr(transformers, str(chosen), None)
    if made is None or not hasattr(made, "post_process_object_detection"):
        raise ModelError(
            f"transformers {transformers.__version__} has no image processor that makes detections of the outputs of "
            f"{name}; give a metric of your own: evaluate="
        )
    return made()


def _best(found: Detections) -> Detections:
    order = found["scores"].float().argsort(descending=True)[:MOST]
    return {name: found[name][order].cpu() for name in ("scores", "labels", "boxes")}


def _truth(label: Any) -> Detections:
    """Boxes as corner, width and height.

    Raises:
        DataError: no boxes, or not relative to the image.
    """
    classes, boxes = (torch.as_tensor(label.get(name, ())) for name in ("class_labels", "boxes"))
    boxes = boxes.reshape(-1, 4).double().cpu() if boxes.numel() % 4 == 0 else boxes
    if boxes.ndim != 2 or classes.ndim != 1 or len(classes) != len(boxes) or classes.is_floating_point():
        if not classes.numel() and not boxes.numel():
            return {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
        raise DataError(
            f"an image has class_labels of shape {tuple(classes.shape)} and boxes of shape {tuple(boxes.shape)}; they "
            "are whole numbers (n,) and (n, 4)"
        )
    if not bool(((boxes >= 0) & (boxes <= 1)).all()):
        raise DataError(
            "boxes are centre, width and height relative to the image, from 0 to 1, as the image processors of "
            f"transformers make them; some hold {float(boxes.abs().max()):.4g}"
        )
    found = {"labels": classes.cpu(), "boxes": torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], 1)}
    if "iscrowd" in label:
        found["iscrowd"] = torch.as_tensor(label["iscrowd"]).cpu()
    return found


def _coco(found: list[Detections], truths: list[Detections]) -> tuple[float, float, float]:
    """Average precisions over all classes that have a box: over all overlaps, at 0.50 and at 0.75.

    Raises:
        DataError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise DataError("scores of detections need pycocotools: pip install 'comcat[detection]'") from error
    entries: list[dict[str, Any]] = []
    for image, truth in enumerate(truths):
        crowd = truth.get("iscrowd", torch.zeros(len(truth["labels"])))
        for label, box, many in zip(truth["labels"].tolist(), truth["boxes"].tolist(), crowd.tolist(), strict=True):
            area = box[2] * box[3]
            entry = {"image_id": image, "category_id": label, "bbox": box, "area": area, "iscrowd": int(many)}
            entries.append({"id": len(entries) + 1, **entry})
    rows = [
        np.array([image, *box[:2], box[2] - box[0], box[3] - box[1], score, label])
        for image, one in enumerate(found)
        for score, label, box in zip(*(one[name].tolist() for name in ("scores", "labels", "boxes")), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth_set = COCO()
        truth_set.dataset = {
            "info": {},
            "images": [{"id": image} for image in range(len(truths))],
            "categories": [{"id": label} for label in sorted({entry["category_id"] for entry in entries})],
            "annotations": entries,
        }
        truth_set.createIndex()
        scored = COCOeval(truth_set, truth_set.loadRes(np.stack(rows)) if rows else COCO(), "bbox")
        scored.evaluate()
        scored.accumulate()
    precision = scored.eval["precision"][:, :, :, 0, -1]  # overlaps, recalls, classes
    half, three_quarters = (int(np.argmin(abs(scored.params.iouThrs - overlap))) for overlap in (0.5, 0.75))

    def mean(values: np.ndarray) -> float:
        return float(values[values > -1].mean())

    return mean(precision), mean(precision[half]), mean(precision[three_quarters])
