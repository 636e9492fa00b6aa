"""Images to train on: shuffled, augmented, and every sample a function of (seed, epoch, index) alone.

    data = load_dataset("imagenet/", "train", config, num_classes=1000)
    loader = training_loader(data, 64, config, Augmentation(auto_augment="rand-m9-mstd0.5-inc1"))

Neither workers nor prefetching nor an interruption changes what a sample looks like, which is what makes a resumed run
continue exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import DataError
from ..training.augmentation import Augmentation
from ..training.randomness import SAMPLE, isolated
from . import default_workers
from .loading import BadImage, ImageData, Sample, StreamData

_REPLACEMENTS = 100


class TrainingBatch(NamedTuple):
    """Images (B, C, H, W), labels (B,), and the images that had to be replaced by others."""

    images: Tensor
    labels: Tensor
    skipped: tuple[BadImage, ...] = ()


class PerSample(Dataset[Any]):
    """A data set whose random numbers are drawn from (seed, epoch, index), whatever process draws them.

    Attributes:
        description: what the samples depend on besides the epoch, as plain data.
    """

    def __init__(self, data: Dataset[Any], seed: int, description: Mapping[str, Any] | None = None) -> None:
        self.data = data
        self.seed = seed
        self.description = {"seed": seed, **(description or {})}
        # Shared memory: workers that outlive an epoch have to see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        with isolated(SAMPLE, self.seed, int(self._epoch), index):
            return self.data[index]


class TrainingImages(Dataset["Sample | BadImage | _Replaced"]):
    """The images of ``data`` under a transform of their own.

    An unreadable image is returned as what it is, or, when they are to be skipped, replaced by the next readable one.
    """

    def __init__(self, data: ImageData, transform: Callable[[Any], Tensor]) -> None:
        self.images = ImageData(
            data.name, data.source, transform, data.input_size, data.split, data.splits, data.on_error
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample | BadImage | _Replaced:
        sample = self.images.fetch(index)
        if not isinstance(sample, BadImage) or self.images.on_error == "raise":
            return sample
        for step in range(1, min(_REPLACEMENTS, len(self)) + 1):
            other = self.images.fetch((index + step) % len(self))
            if not isinstance(other, BadImage):
                return _Replaced(other, sample)
        return sample


class _Replaced(NamedTuple):
    sample: Sample
    bad: BadImage


def collate(samples: list[Any]) -> TrainingBatch | BadImage:
    """A batch, or the unreadable image that prevents it: exceptions do not travel well between processes."""
    skipped = tuple(s.bad for s in samples if isinstance(s, _Replaced))
    plain = [s.sample if isinstance(s, _Replaced) else s for s in samples]
    bad = next((s for s in plain if isinstance(s, BadImage)), None)
    if bad is not None:
        return bad
    images, labels = default_collate(plain)
    return TrainingBatch(images, labels, skipped)


def training_loader(
    data: ImageData | StreamData,
    batch_size: int,
    data_config: Mapping[str, Any] | None = None,
    augmentation: Augmentation | None = None,
    *,
    seed: int = 0,
    workers: int | None = None,
    drop_last: bool = True,
) -> DataLoader[Any]:
    """Shuffled, augmented batches over all of ``data``; under several processes each gets its own share of them.

    Args:
        data: from :func:`comcat.data.load_dataset`.
        batch_size: images in a batch of one process.
        data_config: timm's preprocessing of the model, as given to ``load_dataset``.
        workers: processes that read images; None chooses by the size of the data.
        drop_last: leave out the last batch of an epoch if it is smaller.

    Raises:
        DataError: a stream, data without labels, fewer images than a batch, or an augmentation that timm does not know.
    """
    if isinstance(data, StreamData):
        raise DataError(
            f"{data.name} is a stream, and training needs random access to continue exactly after an interruption. "
            "Use a folder, a tar file, parquet files or hfds/..."
        )
    if not data.labelled:
        raise DataError(f"{data.name} has no labels to train on. Choose another split")
    if drop_last and len(data) < batch_size:
        raise DataError(f"{data.name} has {len(data)} images, fewer than one batch. Use --batch-size {len(data)}")
    augmentation = augmentation or Augmentation()
    config = dict(data_config or {"input_size": data.input_size})
    images = TrainingImages(data, training_transform(config, augmentation, data.as_is))
    return DataLoader(
        PerSample(images, seed, {"augmentation": asdict(augmentation), "as_is": data.as_is}),
        batch_size=batch_size,
        shuffle=True,
        drop_last=drop_last,
        num_workers=default_workers(len(data), data.input_size) if workers is None else workers,
        pin_memory=torch.cuda.is_available(),
        collate_fn=collate,
    )


def training_transform(
    config: Mapping[str, Any], augmentation: Augmentation, as_is: bool = False
) -> Callable[[Any], Tensor]:
    """timm's training transform; images that already are of the model's size are padded and cropped instead of resized.

    Raises:
        DataError: timm does not know the auto_augment description.
    """
    from timm.data import create_transform
    from torchvision import transforms

    channels, height, width = config["input_size"]
    stats = {key: tuple(config[key]) for key in ("mean", "std") if key in config}
    if channels == 1:  # a colour mean and std are averaged, as for evaluation
        stats = {key: (float(np.mean(value)),) for key, value in stats.items()}
    try:
        crop, augment, finish = create_transform(
            input_size=(channels, height, width),
            is_training=True,
            scale=augmentation.scale,
            ratio=augmentation.ratio,
            hflip=augmentation.hflip,
            color_jitter=augmentation.color_jitter or None,
            auto_augment=augmentation.auto_augment,
            interpolation=config.get("interpolation", "bicubic"),
            re_prob=augmentation.random_erasing,
            separate=True,
            **stats,
        )
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"timm does not know the augmentation {augmentation.auto_augment!r} ({error}). "
            "Use e.g. rand-m9-mstd0.5-inc1"
        ) from error
    if as_is:
        padding = min(height, width) // 8 if augmentation.crop_padding is None else augmentation.crop_padding
        fill = tuple(round(255 * m) for m in stats.get("mean", (0.0,) * channels))
        crop = transforms.Compose(
            [
                transforms.RandomCrop((height, width), padding=padding, fill=fill if channels > 1 else fill[0]),
                transforms.RandomHorizontalFlip(augmentation.hflip),
            ]
        )
    return transforms.Compose([crop, augment, finish])
