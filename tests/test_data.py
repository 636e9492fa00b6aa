"""Reading images: every source, every default, every refusal."""

import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from comcat.data import calibration_batches, default_workers, load_dataset, loader
from comcat.errors import DataError

SHARED = Path(os.environ.get("COMCAT_SHARED", Path(__file__).parents[1].parent / "shared"))
CONFIG = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 0.9}


def picture(seed: int, size: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def make_folder(root: Path, classes: int = 3, per_class: int = 5, size: int = 8) -> Path:
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(per_class):
            picture(100 * c + i, size).save(root / f"class{c}" / f"{i}.png")
    return root


def make_parquet(root: Path, splits: dict[str, int], image: str = "img", label: str | None = "label") -> Path:
    import datasets

    root.mkdir(parents=True)
    for split, count in splits.items():
        columns: dict = {image: [picture(i) for i in range(count)]}
        features = {image: datasets.Image()}
        if label:
            columns[label] = [i % 3 for i in range(count)]
            features[label] = datasets.ClassLabel(names=["a", "b", "c"])
        datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(root / f"{split}.parquet")
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_folder(tmp_path):
    data = load_dataset(str(make_folder(tmp_path / "d")), data_config=CONFIG, num_classes=3)
    assert len(data) == 15
    assert data.num_classes == 3
    assert [data[i][1] for i in (0, 5, 14)] == [0, 1, 2]
    # The image already has the model's size: its pixels arrive exactly, normalized.
    expected = torch.tensor(np.array(picture(100))).permute(2, 0, 1) / 255 * 2 - 1
    torch.testing.assert_close(data[5][0], expected)
    assert data.as_is


def test_resizes_when_needed_or_told(tmp_path):
    big = load_dataset(str(make_folder(tmp_path / "big", size=13)), data_config=CONFIG)
    assert not big.as_is
    assert big[0][0].shape == (3, 8, 8)
    told = load_dataset(str(make_folder(tmp_path / "small")), data_config=CONFIG, crop_pct=0.5)
    assert not told.as_is
    assert told[0][0].shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("have", "asked", "purpose", "expected"),
    [
        (["train", "val"], None, "calibration", "train"),
        (["train", "val"], None, "evaluation", "val"),
        (["train", "test"], None, "evaluation", "test"),
        (["train"], None, "evaluation", "train"),
        (["train", "validation", "test"], None, "evaluation", "validation"),
        (["train", "validation"], "val", "evaluation", "validation"),
    ],
)
def test_splits_of_a_folder(tmp_path, have, asked, purpose, expected):
    for split in have:
        make_folder(tmp_path / "d" / split, per_class=1)
    data = load_dataset(str(tmp_path / "d"), asked, CONFIG, purpose=purpose)
    assert data.split == expected
    assert data.source.name.endswith(expected)


def test_unknown_split_lists_the_known(tmp_path):
    for split in ("train", "val"):
        make_folder(tmp_path / "d" / split, per_class=1)
    with pytest.raises(DataError, match=r"no split 'extra'. It has: train, val"):
        load_dataset(str(tmp_path / "d"), "extra", CONFIG)
    with pytest.raises(DataError, match="has no splits"):
        load_dataset(str(tmp_path / "d" / "val"), "train", CONFIG)


def test_class_called_like_a_split(tmp_path):
    for name in ("test", "other"):
        (tmp_path / "d" / name).mkdir(parents=True)
        picture(0).save(tmp_path / "d" / name / "0.png")
    data = load_dataset(str(tmp_path / "d"), data_config=CONFIG)
    assert data.split is None
    assert data.num_classes == 2


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(str(tmp_path / "nothing"), data_config=CONFIG)


def test_file_instead_of_folder(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="is a file"):
        load_dataset(str(tmp_path / "x.jpg"), data_config=CONFIG)


def test_unreadable_folder(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "d")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root
    with pytest.raises(DataError, match="permission denied"):
        load_dataset(str(root), data_config=CONFIG)


def test_folder_without_images(tmp_path):
    (tmp_path / "d" / "a").mkdir(parents=True)
    (tmp_path / "d" / "a" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"no images in .*looked for .*\.png"):
        load_dataset(str(tmp_path / "d"), data_config=CONFIG)


def test_empty_class_is_named(tmp_path):
    root = make_folder(tmp_path / "d")
    (root / "class1b").mkdir()
    with pytest.raises(DataError, match=r"class folder 'class1b' .*would shift the labels"):
        load_dataset(str(root), data_config=CONFIG)


def test_images_beside_classes(tmp_path):
    root = make_folder(tmp_path / "d")
    picture(0).save(root / "stray.png")
    with pytest.raises(DataError, match="beside its class folders"):
        load_dataset(str(root), data_config=CONFIG)


def test_flat_folder_is_unlabelled(tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    data = load_dataset(str(tmp_path), data_config=CONFIG, num_classes=2)
    assert not data.labelled
    assert data[1][1] == -1


def test_class_map(tmp_path):
    root = make_folder(tmp_path / "d")
    (tmp_path / "map.txt").write_text("zero\nclass2\nclass1\nclass0\n")
    data = load_dataset(str(root), data_config=CONFIG, class_map=str(tmp_path / "map.txt"))
    assert [data[i][1] for i in (0, 5, 14)] == [3, 2, 1]
    with pytest.raises(DataError, match="no class map file"):
        load_dataset(str(root), data_config=CONFIG, class_map="nowhere.txt")


def test_labels_beyond_the_model(tmp_path):
    root = make_folder(tmp_path / "d")
    with pytest.raises(DataError, match=r"the label 2 of .*class2.*png is none of the model's, which has 2"):
        load_dataset(str(root), data_config=CONFIG, num_classes=2)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty"])
def test_corrupt_image(tmp_path, workers, damage):
    root = make_folder(tmp_path / "d")
    victim = root / "class1" / "2.png"
    content = {"garbage": b"not a picture", "truncated": victim.read_bytes()[:90], "empty": b""}[damage]
    victim.write_bytes(content)
    strict = load_dataset(str(root), data_config=CONFIG)
    with pytest.raises(DataError, match=r"class1/2.png cannot be read .*--skip-bad-images"):
        list(loader(strict, batch_size=4, workers=workers))
    with pytest.raises(DataError, match=r"class1/2.png"):
        strict[7]
    lenient = load_dataset(str(root), data_config=CONFIG, on_error="skip")
    batches = loader(lenient, batch_size=4, workers=workers)
    for _ in range(2):  # a second pass counts no image twice
        labels = torch.cat([y for _, y in batches])
        assert torch.bincount(labels).tolist() == [5, 4, 5]
    assert [Path(name).name for name in batches.skipped] == ["2.png"]


def test_nothing_readable(tmp_path):
    root = make_folder(tmp_path / "d")
    for file in root.rglob("*.png"):
        file.write_bytes(b"x")
    with pytest.raises(DataError, match="none of the images"):
        list(loader(load_dataset(str(root), data_config=CONFIG, on_error="skip")))


def test_calibration_subset_is_seeded_and_topped_up(tmp_path):
    root = make_folder(tmp_path / "d", per_class=20)
    data = load_dataset(str(root), data_config=CONFIG, on_error="skip")
    first, again, other = (torch.cat([x for x, _ in calibration_batches(data, 32, 7, seed=s)]) for s in (0, 0, 1))
    assert len(first) == 32
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    batches = calibration_batches(data, 32, 7, seed=0)
    state = torch.get_rng_state()
    victim = data.source.describe(batches._indices[3])
    Path(victim).write_bytes(b"x")
    assert sum(len(x) for x, _ in batches) == 32  # an image from outside the subset stands in
    assert list(batches.skipped) == [victim]
    assert torch.equal(torch.get_rng_state(), state)


def test_too_few_calibration_images(tmp_path):
    data = load_dataset(str(make_folder(tmp_path / "d")), data_config=CONFIG)
    with pytest.raises(DataError, match=r"asks for 64 images and .* has 15.*--calibration-images 15"):
        calibration_batches(data, 64)
    with pytest.raises(DataError, match=r"has 15 images.*fewer than 32.*--calibration-images 15"):
        calibration_batches(data)
    assert sum(len(x) for x, _ in calibration_batches(data, 15)) == 15
    with pytest.raises(DataError, match="0 calibration images"):
        calibration_batches(data, 0)


def test_parquet(tmp_path, capfd):
    root = make_parquet(tmp_path / "d", {"train": 40, "test": 7}, image="img", label="fine_label")
    capfd.readouterr()
    data = load_dataset(str(root), data_config=CONFIG, num_classes=3)
    assert (data.split, len(data), data.num_classes, data.as_is) == ("test", 7, 3, True)
    assert torch.cat([y for _, y in loader(data, batch_size=3, workers=1)]).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert load_dataset(str(root), data_config=CONFIG, purpose="calibration").split == "train"
    assert len(load_dataset(str(root), "train[:10]", CONFIG)) == 10
    assert load_dataset(f"hfds/{root}", None, CONFIG).split == "test"
    with pytest.raises(DataError, match="It has: train, test"):
        load_dataset(str(root), "extra", CONFIG)
    assert capfd.readouterr() == ("", "")  # no progress bars, no logs


def test_parquet_without_labels(tmp_path):
    data = load_dataset(str(make_parquet(tmp_path / "d", {"train": 3}, label=None)), data_config=CONFIG)
    assert not data.labelled


def test_parquet_with_a_corrupt_image(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = io.BytesIO()
    picture(0).save(good, "png")
    cells = [{"bytes": good.getvalue(), "path": None}, {"bytes": b"broken", "path": "a/b.png"}, None]
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"image": cells, "labels": [0, 1, 1]}), tmp_path / "d" / "train.parquet")
    data = load_dataset(str(tmp_path / "d"), data_config=CONFIG, on_error="skip")
    batches = loader(data, batch_size=2)
    assert [len(x) for x, _ in batches] == [1]
    names = list(batches.skipped)
    assert names[0].startswith("a/b.png in row 1 of split 'train'")
    assert "row 2" in names[1]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("hf://datasets/someone/x/a.parquet", "README.md' leads to hf://datasets/someone/x/a.parquet, outside"),
        ("https://localhost:9/a.parquet", "leads to https://localhost:9/a.parquet, outside"),
        ("../other/train.parquet", r"leads to \.\./other/train.parquet, outside"),
        ("OUTSIDE/other/train.parquet", "leads to /.*/other/train.parquet, outside"),
        ("train.parquet\n  data_dir: ..", "leads to train.parquet, outside"),
        ("zip://a.parquet::b.zip", "leads to zip:"),
        ("none/*.parquet", "there is no such parquet file"),
        ("{a: [}", "it is not valid YAML"),
        ("[[]]", "data_files of .* are damaged"),
    ],
)
def test_a_readme_leads_nowhere_else(tmp_path, sockets_blocked, said, message):
    root = make_parquet(tmp_path / "d", {"train": 3})
    make_parquet(tmp_path / "other", {"train": 3})
    said = said.replace("OUTSIDE", str(tmp_path))
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {said}\n---\n# Pictures\n")
    with pytest.raises(DataError, match=message):
        load_dataset(str(root), data_config=CONFIG)


def test_the_splits_of_a_readme_and_of_file_names(tmp_path, sockets_blocked):
    root = make_parquet(tmp_path / "a[1] *d", {"part-a": 4, "part-b": 3, "data/test-00000-of-00001": 2})
    assert load_dataset(str(root), data_config=CONFIG).splits == ["test"]  # as datasets reads names
    card = {"train": "part-a.parquet", "extra": ["part-b.parquet", "data/*.parquet"]}
    for files in (card, [{"split": split, "path": path} for split, path in card.items()]):
        head = json.dumps({"configs": [{"config_name": "default", "data_files": files}]})
        (root / "README.md").write_text(f"---\n{head}\n---\n")
        assert [len(load_dataset(str(root), split, CONFIG)) for split in ("train", "extra")] == [4, 5]
    (root / "README.md").write_text(f"---\n{json.dumps({'configs': [{'data_files': x} for x in 'ab']})}\n---\n")
    with pytest.raises(DataError, match="describes 2 configurations"):
        load_dataset(str(root), data_config=CONFIG)


def test_cells_name_files_of_their_folder_only(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path / "d"
    (root / "images").mkdir(parents=True)
    picture(0).save(root / "images" / "0.png")
    picture(1).save(tmp_path / "private.png")
    (root / "link.png").symlink_to(tmp_path / "private.png")
    paths = [
        "images/0.png",
        "link.png",
        "../private.png",
        str(tmp_path / "private.png"),
        str(root / "images" / "0.png"),
    ]
    cells = [{"bytes": None, "path": path} for path in paths]
    pq.write_table(pa.table({"image": cells, "labels": [0] * 5}), root / "train.parquet")
    data = load_dataset(str(root), data_config=CONFIG)
    torch.testing.assert_close(data[0][0], data[4][0], rtol=0, atol=0)
    for index in (1, 2, 3):
        with pytest.raises(DataError, match=f"{re.escape(paths[index])} lies outside"):
            data[index]


def test_broken_parquet(tmp_path, capfd):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"cannot be read: .*Check that its files are complete"):
        load_dataset(str(tmp_path / "d"), data_config=CONFIG)
    assert capfd.readouterr() == ("", "")


def test_parquet_without_images(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "d" / "train.parquet")
    with pytest.raises(DataError, match="no image column; its columns are text, label"):
        load_dataset(str(tmp_path / "d"), data_config=CONFIG)


def test_grey_model(tmp_path):
    config = {**CONFIG, "input_size": (1, 8, 8)}
    data = load_dataset(str(make_folder(tmp_path / "d")), data_config=config)
    assert data[0][0].shape == (1, 8, 8)


def test_torchvision_needs_a_root(tmp_path):
    with pytest.raises(DataError, match="--data-root DIR"):
        load_dataset("torch/cifar10", data_config=CONFIG)
    with pytest.raises(DataError, match=r"cannot be read from .*Check --data-root"):
        load_dataset("torch/cifar10", data_config=CONFIG, root=str(tmp_path))


def test_stream_without_its_package(tmp_path):
    with pytest.raises(DataError, match="wds/x, split 'validation', cannot be opened"):
        load_dataset("wds/x", data_config=CONFIG, root=str(tmp_path))


def test_stream(tmp_path):
    """A stream has no length to rely on, is read from its start, and its skipped samples are counted."""
    import logging

    from comcat.data import StreamData

    class Stream:
        def __iter__(self):
            for i in range(10):
                if i == 4:
                    message = "Handling webdataset error (ValueError('bad tar'))."
                    logging.getLogger("timm.data.readers.reader_wds").warning(message)
                    continue
                yield torch.full((3, 8, 8), float(i)), i % 2

        def __len__(self):
            return 0

    batches = calibration_batches(StreamData("wds/x", Stream(), (3, 8, 8), on_error="skip"), 6, batch_size=4)
    assert [len(x) for x, _ in batches] == [4, 2]
    assert list(batches.skipped.values()) == ["ValueError('bad tar')"]
    with pytest.raises(DataError, match="bad tar"):
        list(loader(StreamData("wds/x", Stream(), (3, 8, 8)), batch_size=4))


def test_default_workers():
    assert default_workers(1000, (3, 32, 32)) == 0
    assert default_workers(50_000, (3, 224, 224)) == min(2, os.cpu_count() or 1)


@pytest.mark.skipif(not (SHARED / "data/cifar10").is_dir(), reason="needs $COMCAT_SHARED/data/cifar10")
def test_real_parquet():
    data = load_dataset(str(SHARED / "data/cifar10"), data_config={**CONFIG, "input_size": (3, 32, 32)})
    assert (len(data), data.num_classes, data.as_is) == (10_000, 10, True)
    assert data[0][0].shape == (3, 32, 32)
