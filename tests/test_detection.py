"""Detectors: average precision against boxes of the data and against another model's detections."""

import json
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import comcat
from comcat.errors import DataError, ModelError
from comcat.evaluation.results import Evaluation
from comcat.evaluation.tasks import Detection, is_detector, reader
from comcat.evaluation.tasks.detection import processor_for
from conftest import randomize, vit
from transformers_hosts import DETR, RESNET, TOWER

pytest.importorskip("pycocotools")


def detr(seed: int = 0) -> Any:
    config = tf.DetrConfig(backbone_config=tf.ResNetConfig(**RESNET), **DETR, num_labels=3)
    return randomize(tf.DetrForObjectDetection(config), seed).eval()


def yolos(seed: int = 0) -> Any:
    config = tf.YolosConfig(**{**TOWER, "image_size": [28, 28]}, num_detection_tokens=5, num_labels=3)
    return randomize(tf.YolosForObjectDetection(config), seed).eval()


def pictures(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(5))


def found_by(model: Any, x: Tensor) -> list[dict[str, Tensor]]:
    """What the model detects, as labels."""
    with torch.no_grad():
        found = reader(model).run(reader(model).inputs(x, "here"))[0]
    labels = []
    for one in found:
        low, high = one["boxes"].clamp(0, 1)[:, :2], one["boxes"].clamp(0, 1)[:, 2:]
        labels.append({"class_labels": one["labels"], "boxes": torch.cat([(low + high) / 2, high - low], 1)})
    return labels


@pytest.mark.parametrize("make", [detr, yolos])
def test_what_a_model_detects_itself_is_right(make: Any) -> None:
    model, x = make(), pictures()
    result = comcat.evaluate(model, [{"pixel_values": x, "labels": found_by(model, x)}])
    assert (result.outputs, result.images) == ("detections", 3)
    assert [figure.label for figure in result.figures()] == ["mAP", "mAP50", "mAP75"]
    assert result.metrics["map_50"] > 60  # boxes that lie outside of the image are cut
    other = comcat.evaluate(make(1), [(x, found_by(model, x))])
    assert other.metrics["map"] < result.metrics["map"]
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert {"images", "images_per_second", "outputs", "metrics"} == set(data)
    assert Evaluation.from_dict(data).figures() == result.figures()


#: Of text in pictures, by maps.
MAPS = ("PPOCR",)


def test_every_detector_has_an_image_processor() -> None:
    """That makes boxes of its queries."""
    found = [
        getattr(tf, name)
        for name in dir(tf)
        if name.endswith("ForObjectDetection") and not name.startswith(("Auto", *MAPS))
    ]
    detectors = [cls for cls in found if is_detector(cls.__new__(cls))]
    assert {tf.DetrForObjectDetection, tf.RTDetrForObjectDetection, tf.YolosForObjectDetection} < {*detectors}
    assert not {tf.OwlViTForObjectDetection, tf.GroundingDinoForObjectDetection} & {*detectors}
    for cls in detectors:
        assert hasattr(processor_for(cls.config_class.model_type, cls.__name__), "post_process_object_detection")


def test_the_scores_of_coco_by_hand() -> None:
    """Two classes: one found at once, one found second best: precision 1 and 1/2 at every overlap that is reached."""
    task = Detection()
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9], [0.2, 0.5, 0.4, 0.7]])
    found = {"scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.tensor([1, 2, 2]), "boxes": boxes}
    centred = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
    truth = task.check([found], [{"class_labels": torch.tensor([1, 2]), "boxes": centred[[0, 2]]}])
    task.add([found], truth)
    assert task.result() == pytest.approx({"map": 75, "map_50": 75, "map_75": 75})
    shifted = Detection()
    shifted.add([found], shifted.check([found], [{"class_labels": [1], "boxes": [[0.3, 0.3, 0.4, 0.3]]}]))
    # Overlap 0.12 / 0.16 = 0.75: the thresholds 0.50 to 0.75, or one less by rounding, of ten.
    assert shifted.result()["map_50"] == pytest.approx(100)
    assert 50 <= shifted.result()["map"] + 1e-9 <= 60 + 1e-6
    both = Detection()
    for one in (task, shifted):
        both.join(one)
    assert len(both.kept) == both.count == 2


def test_padding_is_masked() -> None:
    """Batches of the image processor hold which pixels are none."""
    model, x = detr(), pictures(2)
    mask = torch.ones(2, 28, 28, dtype=torch.int64)
    mask[1, :, 14:] = 0
    with torch.no_grad():
        raw = model(pixel_values=x, pixel_mask=mask)
        read = reader(model)
        read.run(read.inputs({"pixel_values": x, "pixel_mask": mask}, "here"))
    assert (read.tensors(None)[0] - raw.logits).abs().max() < 1e-5


def test_against_another_model() -> None:
    """The dense model's own detections stand in for labels; a model agrees with itself."""
    model, x = detr(), pictures()
    model.class_labels_classifier.weight.data *= 9  # sure of something
    small = comcat.compress(model, comcat.plan(model, comcat.Budget(params=0.9)))
    itself, other = (comcat.agreement(one, model, [(x, torch.zeros(3))]) for one in (model, small))
    assert itself.outputs == "detections"
    assert itself.scores["map"] == pytest.approx(100)
    assert other.scores["map"] < 100
    assert set(other.to_dict()) == {"map", "map_50", "map_75", "images", "outputs"}
    result = comcat.evaluate(small, [x], outputs="detections", reference=model)
    assert result.metrics == pytest.approx(other.scores)
    json.dumps(result.to_dict(), allow_nan=False)


def test_boxes_count_in_calibration_as_classes_do() -> None:
    model, x = detr(), pictures(4)
    calibration = comcat.calibrate(model, [x], fisher=True)
    assert calibration.outputs == "features"
    model.bbox_predictor.layers[2].weight.data *= 50
    more = comcat.calibrate(model, [x], fisher=True).moments
    pairs = [(one, more[layer][name]) for layer in more for name, one in calibration.moments[layer].items()]
    assert any(not torch.allclose(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3), r"a list with \{'class_labels': \(n,\), 'boxes': \(n, 4\)\} for each image"),
        (
            [{"class_labels": [0], "boxes": [[10.0, 10.0, 20.0, 20.0]]}] * 3,
            "relative to the image, from 0 to 1.*hold 20",
        ),
        ([{"class_labels": [0, 1], "boxes": [[0.1, 0.1, 0.2, 0.2]]}] * 3, r"class_labels of shape \(2,\) and boxes"),
        ([{"class_labels": [], "boxes": []}] * 3, "not one box to compare detections with"),
    ],
)
def test_wrong_labels(labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        comcat.evaluate(detr(), [(pictures(), labels)])


def test_other_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = detr(), pictures()
    with pytest.raises(ModelError, match="VisionTransformer is no detector of transformers"):
        comcat.evaluate(vit(), [(x, [])], outputs="detections")
    unsure = detr()
    unsure.class_labels_classifier.weight.data.zero_()
    unsure.class_labels_classifier.bias.data.zero_()
    with pytest.raises(DataError, match=r"not one box.*is sure of none"):
        comcat.agreement(model, unsure, [x])
    broken = detr()
    broken.bbox_predictor.layers[2].bias.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="the outputs hold NaN"):
        comcat.evaluate(broken, [(x, found_by(model, x))])
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.coco", None)
    with pytest.raises(DataError, match=r"need pycocotools: pip install 'comcat\[detection\]'"):
        comcat.evaluate(model, [(x, found_by(model, x))])
