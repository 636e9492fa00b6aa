"""Images to train on: their order and look depend on (seed, epoch, index) alone, and nothing is replaced in silence."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from comcat import DataError
from comcat.data import load_dataset
from comcat.data.loading import BadImage, StreamData
from comcat.data.training_set import Augmentation, PerSample, TrainingBatch, collate, training_loader
from test_data import CONFIG, make_folder, picture

STRONG = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5, color_jitter=0.3)


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "data", per_class=5)


def batches(data, epoch=0, order=None, **args) -> list[TrainingBatch]:
    loader = training_loader(data, 4, CONFIG, **args)
    loader.dataset.set_epoch(epoch)
    loader.sampler.generator = torch.Generator().manual_seed(7)
    return list(loader)


def same(a: list[TrainingBatch], b: list[TrainingBatch]) -> bool:
    return all(torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("size", [8, 13])  # taken as they are, or cropped and resized
def test_samples_depend_on_seed_epoch_and_index(tmp_path, size):
    data = load_dataset(str(make_folder(tmp_path / "data", size=size)), data_config=CONFIG, num_classes=3)
    first = batches(data, augmentation=STRONG, workers=0)
    torch.manual_seed(5)
    assert same(first, batches(data, augmentation=STRONG, workers=2))
    assert not same(first, batches(data, epoch=1, augmentation=STRONG, workers=0))
    assert not same(first, batches(data, augmentation=STRONG, seed=1, workers=0))
    assert len(first) == 3
    assert first[0].images.shape == (4, 3, 8, 8)


def test_workers_that_outlive_an_epoch_see_the_next():
    class Draws(TensorDataset):
        def __getitem__(self, index):
            return torch.rand(())

    data = PerSample(Draws(torch.zeros(4)), seed=3)
    loader = torch.utils.data.DataLoader(data, num_workers=1, persistent_workers=True, batch_size=4)
    epochs = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        epochs.append(next(iter(loader)))
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])


def test_images_of_the_models_size_keep_their_pixels(folder):
    data = load_dataset(str(folder), data_config=CONFIG, num_classes=3)
    still = training_loader(data, 15, CONFIG, Augmentation(hflip=0, crop_padding=0), workers=0, drop_last=False)
    still.dataset.set_epoch(0)
    expected = torch.tensor(np.array(picture(100))).permute(2, 0, 1) / 255 * 2 - 1
    torch.testing.assert_close(still.dataset[5][0], expected)
    # One pixel of padding, the mean colour: what is not padding is a shifted copy.
    moved = training_loader(data, 15, CONFIG, Augmentation(hflip=0), workers=0).dataset
    shifts = set()
    for epoch in range(12):
        moved.set_epoch(epoch)
        padded = torch.nn.functional.pad(expected, (1, 1, 1, 1), value=1 / 255)  # 128 of 255, normalized
        windows = {(i, j): padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)}
        shifts |= {at for at, window in windows.items() if torch.allclose(moved[5][0], window, atol=1e-5)}
    assert len(shifts) > 3


def test_one_channel(tmp_path):
    config = {**CONFIG, "input_size": (1, 8, 8)}
    data = load_dataset(str(make_folder(tmp_path / "data", size=9)), data_config=config, num_classes=3)
    images, labels, _ = next(iter(training_loader(data, 4, config, workers=0)))
    assert images.shape == (4, 1, 8, 8)
    assert labels.dtype == torch.int64


def test_unreadable_images(folder):
    (folder / "class1" / "3.png").write_bytes(b"no picture")
    data = load_dataset(str(folder), data_config=CONFIG, num_classes=3)
    found = [b for b in batches(data, workers=0, drop_last=False) if isinstance(b, BadImage)]
    assert [b.name[-12:] for b in found] == ["class1/3.png"]
    data = load_dataset(str(folder), data_config=CONFIG, num_classes=3, on_error="skip")
    found = batches(data, workers=0, drop_last=False)
    assert [b.name[-12:] for batch in found for b in batch.skipped] == ["class1/3.png"]
    assert sum(len(b.labels) for b in found) == 15
    # Replaced by the next one, under an augmentation of its own.
    data_set = training_loader(data, 4, CONFIG, Augmentation(hflip=0, crop_padding=0), workers=0).dataset
    image, label = collate([data_set[8]])[:2]
    torch.testing.assert_close(image[0], data_set[9][0])
    assert label == 1


def test_nothing_can_be_read(folder):
    for file in folder.rglob("*.png"):
        file.write_bytes(b"no picture")
    data = load_dataset(str(folder), data_config=CONFIG, num_classes=3, on_error="skip")
    assert isinstance(next(iter(training_loader(data, 4, CONFIG, workers=0))), BadImage)


def test_refusals(folder):
    data = load_dataset(str(folder), data_config=CONFIG, num_classes=3)
    with pytest.raises(DataError, match="wds/x is a stream, and training needs random access"):
        training_loader(StreamData("wds/x", None, (3, 8, 8)), 4)
    with pytest.raises(DataError, match=r"15 images, fewer than one batch. Use --batch-size 15"):
        training_loader(data, 16, CONFIG)
    with pytest.raises(DataError, match="does not know the augmentation 'magic'"):
        training_loader(data, 4, CONFIG, Augmentation(auto_augment="magic"))
    plain = load_dataset(str(folder / "class0"), data_config=CONFIG)
    with pytest.raises(DataError, match="no labels to train on"):
        training_loader(plain, 4, CONFIG)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hflip": 1.5}, "hflip is 1.5, but is a probability"),
        ({"random_erasing": "often"}, "random_erasing is 'often', but must be a number"),
        ({"scale": (0.5, 0.1)}, "the smaller one first"),
        ({"ratio": 1}, "ratio is 1. Give two"),
        ({"scale": (0.5, 1.5)}, "beyond the whole image"),
        ({"crop_padding": -1}, "must not be negative"),
    ],
)
def test_wrong_augmentation(values, message):
    with pytest.raises(DataError, match=message):
        Augmentation(**values)
