"""Zero-shot classification and detection on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from comcat.data import load_dataset, loader
from comcat.errors import DataError
from conftest import randomize
from test_cli import Result
from test_cli_errors import refused
from test_data import _own_cache, make_folder, picture  # noqa: F401 - a fixture
from test_detection import detr
from test_zero_shot import NAMES, clip, write_tokenizer

PROMPTS = ["--prompts", "a photo of a {}", "--prompts", "the {}"]
GREY = ["--mean", 0.5, 0.5, 0.5, "--std", 0.5, 0.5, 0.5]


def numbers(result: Result) -> dict[str, Any]:
    assert result.code == 0, result.err
    return json.loads(result.out)


# -- prompts -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of images and text with its tokenizer, and images in folders called as its words."""
    root = tmp_path_factory.mktemp("texts")
    randomize(clip()).save_pretrained(root / "clip")
    write_tokenizer(root / "clip")
    for split, count in (("train", 14), ("val", 3)):
        folder = make_folder(root / "data" / split, per_class=count, size=14)
        for number, name in enumerate(NAMES):
            (folder / f"class{number}").rename(folder / name)
    return root


def test_evaluate_by_prompts(texts: Path, tmp_path: Path) -> None:
    given = ["evaluate", texts / "clip", "--data", texts / "data", *GREY, "--json"]
    document = numbers(Result([*given, *PROMPTS]))
    shown = Result([*given[:-1], *PROMPTS])
    assert "3 classes by 2 prompts each, e.g. 'a photo of a blue'" in shown.err
    assert "its image tower CLIPVisionModelWithProjection is opened" in shown.err
    assert document["images"] == 9
    assert 0 <= document["top1"] <= document["top5"] == 100
    (tmp_path / "templates").write_text("a photo of a {}\n\nthe {}\n")
    (tmp_path / "names").write_text("blue\ngreen\nred\n")
    options = ["--templates", tmp_path / "templates", "--class-names", tmp_path / "names"]
    again = numbers(Result([*given, *options]))
    assert again["loss"] == pytest.approx(document["loss"], rel=1e-6)
    whole = numbers(Result([*given, *PROMPTS, "--model-arg", "architecture=CLIPModel"]))
    assert whole["params"] > document["params"]
    assert whole["loss"] == pytest.approx(document["loss"], rel=1e-5)


def test_compress_by_prompts(texts: Path, tmp_path: Path) -> None:
    """Before and after, and the small image tower again with the text tower of the dense model."""
    given = ["--data", texts / "data", *PROMPTS]
    made = ["compress", texts / "clip", *given, *GREY, "--keep", 0.8, "--out", tmp_path / "small", "--json"]
    document = numbers(Result(made))
    dense, small = (document[name]["evaluation"] for name in ("dense", "compressed"))
    assert dense.keys() == small.keys() == {"top1", "top5", "loss", "images", "images_per_second"}
    assert small["loss"] != dense["loss"]
    again = numbers(Result(["evaluate", tmp_path / "small", *given, "--text", texts / "clip", "--json"]))
    assert again["loss"] == pytest.approx(small["loss"], rel=1e-4)
    compared = ["--reference", texts / "clip", "--text", texts / "clip"]
    result = Result(["evaluate", tmp_path / "small", *given, *compared])
    assert result.code == 0, result.err
    assert "same answer as" in result.out
    refused(Result(["evaluate", tmp_path / "small", *given]), "no model of images and text with a tokenizer.*--text")


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (["--prompts", "a photo"], r"a template holds \{\} once", 1),
        (["--text", "x"], "belongs to --prompts or --templates", 2),
        (["--class-names", "clip/config.json"], "belongs to --prompts, --templates and detectors", 2),
        (["--prompts", "{}", "--metric", "x:y"], "goes without --prompts and --templates", 2),
        (["--templates", "nowhere"], "no file nowhere. Correct --templates", 1),
        (["--prompts", "{}", "--class-names", "nowhere"], "no file nowhere. Correct --class-names", 1),
        (
            ["--prompts", "{}", "--class-names", "clip/tokenizer_config.json"],
            "names .* classes and .* has 3; give one",
            1,
        ),
        (["--prompts", "{}", "--text", "data"], "is no model of images and text", 1),
        (["--prompts", "{}", "--data", "numbered"], "have no names to ask for; give them: --class-names FILE", 1),
    ],
)
def test_wrong_prompts(texts: Path, monkeypatch: pytest.MonkeyPatch, options: list, message: str, code: int) -> None:
    monkeypatch.chdir(texts)
    if not Path("numbered").exists():
        folder = make_folder(Path("numbered") / "val", per_class=1, size=14)
        for number in range(3):
            (folder / f"class{number}").rename(folder / str(number))
    data = [] if "--data" in options else ["--data", "data"]
    refused(Result(["evaluate", "clip", *data, *GREY, *options]), message, code=code)


def test_numbers_of_wordnet_are_words(texts: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data" / "val", classes=2, per_class=1, size=14)
    for number, name in enumerate(("n01440764", "n01443537")):
        (folder / f"class{number}").rename(folder / name)
    result = Result(["evaluate", texts / "clip", "--data", tmp_path / "data", *GREY, "--prompts", "the {}"])
    assert result.code == 0, result.err
    assert "e.g. 'the tench'" in result.err


def test_a_whole_model_is_not_calibrated_on_images(texts: Path, tmp_path: Path) -> None:
    given = ["compress", texts / "clip", "--model-arg", "architecture=CLIPModel", "--data", texts / "data", *GREY]
    result = Result([*given, "--keep", 0.8, "--out", tmp_path / "small", *PROMPTS])
    refused(result, "CLIPModel has a text tower, of which images tell nothing.*leave --model-arg architecture out")
    result = Result([*given, "--keep", 0.8, "--out", tmp_path / "small", *PROMPTS, "--data-free", "--json"])
    document = numbers(result)
    assert document["compressed"]["evaluation"]["loss"] != document["dense"]["evaluation"]["loss"]
    assert document["compressed"]["images_per_second"] > 0
    again = ["evaluate", tmp_path / "small", "--data", texts / "data", *PROMPTS, "--text", texts / "clip", "--json"]
    loss = document["compressed"]["evaluation"]["loss"]
    assert numbers(Result(again))["loss"] == pytest.approx(loss, rel=1e-4)


# -- boxes -------------------------------------------------------------------------------------------------------

CATEGORIES = ["label_2", "LABEL_0"]
BOXES = [[2.0, 2.0, 8.0, 8.0], [10.0, 4.0, 12.0, 20.0]]


def write_boxes(folder: Path, boxes: list[list[float]], categories: list[str] | None = None, rows: int = 4) -> Path:
    import datasets

    folder.mkdir(parents=True)
    columns: dict[str, Any] = {"image": [picture(i, 28) for i in range(rows)]}
    kinds: dict[str, Any] = {"image": datasets.Image()}
    if categories is not None:
        columns["objects"] = [{"bbox": boxes, "category": list(range(len(boxes)))} for _ in range(rows)]
        kinds["objects"] = datasets.Sequence(
            {
                "bbox": datasets.Sequence(datasets.Value("float32"), 4),
                "category": datasets.ClassLabel(names=categories) if categories else datasets.Value("int64"),
            }
        )
    datasets.Dataset.from_dict(columns, datasets.Features(kinds)).to_parquet(folder / "validation.parquet")
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    model = detr()
    model.class_labels_classifier.weight.data *= 9  # sure of something
    model.save_pretrained(folder)
    size = {"height": 28, "width": 28}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "DetrImageProcessor", "size": size, "do_pad": False})
    )
    return folder


def test_boxes_of_a_table(tmp_path: Path) -> None:
    folder = write_boxes(tmp_path / "data", BOXES, CATEGORIES)
    data = load_dataset(str(folder), data_config={"input_size": (3, 14, 14)}, boxes="xywh")
    assert data.labelled
    data.source.number({"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2})
    images, labels = next(iter(loader(data, 3)))
    assert (images.shape, len(labels)) == ((3, 3, 14, 14), 3)
    assert labels[0]["class_labels"].tolist() == [2, 0]
    wanted = torch.tensor([[6.0, 6, 8, 8], [16, 14, 12, 20]]).double() / 28
    assert (labels[0]["boxes"] - wanted).abs().max() < 1e-6
    corners = write_boxes(tmp_path / "corners", [[2, 2, 10, 10], [10, 4, 22, 24]], CATEGORIES)
    other = load_dataset(str(corners), data_config={"input_size": (3, 14, 14)}, boxes="xyxy")
    assert (other[0][1]["boxes"] - wanted).abs().max() < 1e-6
    wrong = load_dataset(str(corners), data_config={"input_size": (3, 14, 14)}, boxes="xywh")
    with pytest.raises(DataError, match="its boxes lie outside of it; if they are corners, give --boxes xyxy"):
        wrong[0]
    with pytest.raises(DataError, match=r"no label for 1 of 2 categories of .*'label_2'; give the model's names"):
        data.source.number({"LABEL_0": 0})
    with pytest.raises(DataError, match="no form of boxes 'centre'; choose from xywh, xyxy"):
        load_dataset(str(folder), data_config={"input_size": (3, 14, 14)}, boxes="centre")


def test_evaluate_and_compress_a_detector(detector: Path, tmp_path: Path) -> None:
    data = write_boxes(tmp_path / "data", BOXES, CATEGORIES, rows=33)
    document = numbers(Result(["evaluate", detector, "--data", data, "--json"]))
    assert (document["outputs"], document["images"]) == ("detections", 33)
    assert set(document["metrics"]) == {"map", "map_50", "map_75"}
    made = ["compress", detector, "--data", data, "--keep", 0.9, "--out", tmp_path / "small"]
    result = Result(made)
    assert result.code == 0, result.err
    assert "mAP50" in result.out
    again = Result(["evaluate", tmp_path / "small", "--data", data, "--reference", detector])
    assert again.code == 0, again.err
    assert f"detections against those that {detector} is sure of: mAP" in again.out
    (tmp_path / "names").write_text("LABEL_0\nLABEL_1\n")
    renamed = numbers(Result(["evaluate", detector, "--data", data, "--json", "--class-names", tmp_path / "names"]))
    assert renamed["metrics"] != document["metrics"] or document["metrics"]["map"] == 0


def test_without_boxes(detector: Path, tmp_path: Path) -> None:
    """The dense model's own detections are the truth; alone there is none."""
    data = write_boxes(tmp_path / "data", [], None, rows=33)
    message = "has no boxes to evaluate against .a column objects.*--reference MODEL"
    refused(Result(["evaluate", detector, "--data", data]), message)
    itself = numbers(Result(["evaluate", detector, "--data", data, "--reference", detector, "--json"]))
    assert itself["metrics"]["map"] == pytest.approx(100)
    made = ["compress", detector, "--data", data, "--keep", 0.9, "--out", tmp_path / "small", "--json"]
    document = numbers(Result(made))
    assert document["dense"]["evaluation"]["metrics"]["map"] == pytest.approx(100)
    assert document["compressed"]["evaluation"]["metrics"].keys() == document["dense"]["evaluation"]["metrics"].keys()
    folder = make_folder(tmp_path / "folder" / "val", size=28)
    refused(Result(["evaluate", detector, "--data", folder.parent]), "has no boxes to evaluate against")


def test_categories_that_the_model_lacks(detector: Path, tmp_path: Path) -> None:
    data = write_boxes(tmp_path / "data", BOXES, ["zebra", "label_1"])
    refused(Result(["evaluate", detector, "--data", data]), "no label for 1 of 2 categories.*'zebra'.*--class-names")
    other = ["--boxes", "corners"]
    refused(
        Result(["evaluate", detector, "--data", data, *other]), "no form of boxes 'corners'; choose from xywh, xyxy"
    )
