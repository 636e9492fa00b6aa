"""Images for calibration and evaluation, preprocessed as the model expects them.

    data = load_dataset("imagenet/", purpose="calibration", data_config=config, num_classes=1000)
    for images, labels in calibration_batches(data, 1024):    # (B, C, H, W), (B,)

A corrupt image is never replaced in silence: it ends the pass with its name, or, with ``on_error="skip"``,
is left out, counted and named in ``loader.skipped``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch

from ..errors import DataError
from .loading import BadImage, ImageData, ImageLoader, OnError, StreamData
from .sources import ImageSource, choose_split, kind_of, list_splits, match_split, open_source

__all__ = [
    "BadImage",
    "ImageData",
    "ImageLoader",
    "StreamData",
    "calibration_batches",
    "default_workers",
    "image_transform",
    "load_dataset",
    "loader",
]

DEFAULT_CALIBRATION_IMAGES = 1024
MIN_CALIBRATION_IMAGES = 32
# Pixels to decode above which two worker processes pay for their start.
_BIG_DATA_PIXELS = 50_000_000


def load_dataset(
    data: str,
    split: str | None = None,
    data_config: Mapping[str, Any] | None = None,
    *,
    purpose: Literal["calibration", "evaluation"] = "evaluation",
    on_error: OnError = "raise",
    num_classes: int | None = None,
    root: str | None = None,
    class_map: str | None = None,
    crop_pct: float | None = None,
    seed: int = 0,
    boxes: str | None = None,
) -> ImageData | StreamData:
    """Open DATA and check everything that can be checked without decoding its images.

    Args:
        data: a folder with one sub-folder per class, a folder of parquet files in Hub layout, a ``.tar``
            file, or a name of timm's data set factory (``hfds/...``, ``wds/...``, ``torch/...``).
        split: by default ``train`` for calibration; ``validation``, ``val`` or ``test`` for evaluation.
        data_config: timm's preprocessing of the model, from ``timm.data.resolve_model_data_config``.
        on_error: whether a corrupt image ends the pass or is left out, counted and named.
        num_classes: number of the model's outputs, to check the labels against.
        root: folder of ``torch/`` and ``wds/`` data sets.
        class_map: file with one class folder name per line, in the order of the model's outputs.
        crop_pct: forces timm's resize and centre crop with this fraction, even on images that already have
            the model's input size (those are otherwise taken as they are).
        seed: shuffling of streams.
        boxes: the form of a table's boxes, ``xywh`` or ``xyxy``, which are the labels then (see
            :class:`comcat.data.boxes.BoxSource`). Images are resized whole, so that boxes stay where they are.

    Raises:
        DataError: with the cause and the fix.
    """
    config = dict(data_config or {"input_size": (3, 224, 224)})
    channels, height, width = config["input_size"]
    if kind_of(data) == "stream":
        return _open_stream(data, split, config, purpose, on_error, root, seed)
    splits = list_splits(data)
    chosen = choose_split(splits, purpose) if split is None else match_split(split, splits, data)
    mode = "L" if channels == 1 else "RGB"
    source = open_source(data, chosen, root=root, class_map=class_map, mode=mode, boxes=boxes)
    if boxes is not None:
        crop_pct, config["crop_mode"] = 1.0, "squash"
    labelled = _check_labels(source, num_classes)
    as_is = crop_pct is None and _all_have_size(source, (width, height))
    config["crop_pct"] = crop_pct or (1.0 if as_is else config.get("crop_pct"))
    return ImageData(
        data,
        source,
        image_transform(config),
        (channels, height, width),
        chosen,
        splits,
        on_error,
        labelled,
        as_is,
    )


def loader(
    data: ImageData | StreamData, batch_size: int = 64, workers: int | None = None, limit: int | None = None
) -> ImageLoader:
    """Batches over all of ``data`` in order, or over its first ``limit`` images."""
    indices = list(range(min(limit, len(data)))) if limit and isinstance(data, ImageData) else None
    if workers is None:
        workers = default_workers(len(data if indices is None else indices), data.input_size)
    return ImageLoader(data, batch_size=batch_size, workers=workers, indices=indices, limit=limit)


def calibration_batches(
    data: ImageData | StreamData,
    count: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    workers: int | None = None,
) -> ImageLoader:
    """Batches over a random subset of ``count`` images, the same for the same seed.

    Args:
        count: number of images. None takes 1024, or all where there are fewer.

    Raises:
        DataError: the data set has fewer than ``count`` images or, with None, fewer than 32.
    """
    wanted = calibration_count(data, count)
    if isinstance(data, StreamData):
        return ImageLoader(data, batch_size=batch_size, limit=wanted)
    if workers is None:
        workers = default_workers(wanted, data.input_size)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    return ImageLoader(data, batch_size=batch_size, workers=workers, indices=order[:wanted], spare=order[wanted:])


def calibration_count(data: ImageData | StreamData, count: int | None) -> int:
    """The number of calibration images to use; see :func:`calibration_batches`."""
    have = len(data)
    if count is not None and count < 1:
        raise DataError(f"{count} calibration images are none. Ask for at least {MIN_CALIBRATION_IMAGES}")
    if not have:  # a stream that does not know its length
        return count or DEFAULT_CALIBRATION_IMAGES
    where = f"{data.name}, split {data.split!r}," if data.split else data.name
    if count is not None and have < count:
        raise DataError(
            f"calibration asks for {count} images and {where} has {have}. Use --calibration-images {have} or add images"
        )
    if count is None and have < MIN_CALIBRATION_IMAGES:
        raise DataError(
            f"{where} has {have} images, and the statistics of fewer than {MIN_CALIBRATION_IMAGES} are "
            f"mostly noise. Add images, insist with --calibration-images {have}, or do without: --data-free"
        )
    return count or min(have, DEFAULT_CALIBRATION_IMAGES)


def default_workers(images: int, input_size: tuple[int, int, int]) -> int:
    """Worker processes that pay off: none for small data, else two, where there are two cores."""
    small = images * input_size[1] * input_size[2] < _BIG_DATA_PIXELS
    return 0 if small else min(2, os.cpu_count() or 1)


def image_transform(config: Mapping[str, Any]) -> Callable[[Any], torch.Tensor]:
    """timm's evaluation transform, PIL to (C, H, W); a colour mean and std are averaged for a one-channel model."""
    from timm.data import create_transform

    config = dict(config)
    for key in ("mean", "std"):
        if config["input_size"][0] == 1 and len(config.get(key, ())) == 3:
            config[key] = (float(np.mean(config[key])),)
    return create_transform(**config, is_training=False)


def _all_have_size(source: ImageSource, size: tuple[int, int], probes: int = 8) -> bool:
    """Whether a few images, spread over the data set, all have exactly this (width, height)."""
    sizes = set()
    for index in np.linspace(0, len(source) - 1, num=min(probes, len(source))).astype(int):
        try:
            sizes.add(source.read(int(index))[0].size)
        except Exception:  # a corrupt image is reported when its turn comes
            continue
    return sizes == {size}


def _check_labels(source: ImageSource, num_classes: int | None) -> bool:
    """Whether there are labels; refuses those that the model has no output for."""
    labels = source.labels()
    if labels is None:  # not known before the images are read
        return True
    if labels.max() < 0:  # unlabelled splits are published with the label -1 throughout
        return False
    wrong = (labels < 0) | (labels >= (num_classes or np.inf))
    if wrong.any():
        worst = int(np.argmax(wrong))
        outputs = f", which has {num_classes} outputs (0 to {num_classes - 1})" if num_classes else ""
        raise DataError(
            f"the label {int(labels[worst])} of {source.describe(worst)} is none of the model's{outputs}. "
            "Use the data that the model was trained for, or set the model's num_classes"
        )
    return True


def _open_stream(
    data: str,
    split: str | None,
    config: dict[str, Any],
    purpose: str,
    on_error: OnError,
    root: str | None,
    seed: int,
) -> StreamData:
    from timm.data import create_dataset

    split = split or ("train" if purpose == "calibration" else "validation")
    transform = image_transform(config)
    try:
        stream = create_dataset(data, root=root, split=split, seed=seed, transform=transform)
    except Exception as e:  # the readers of three packages, each with errors of its own
        cause = (str(e).strip() or type(e).__name__).splitlines()[0].rstrip(".")
        raise DataError(
            f"{data}, split {split!r}, cannot be opened: {cause}. Check the name, --data-root and the split"
        ) from e
    channels, height, width = config["input_size"]
    return StreamData(data, stream, (channels, height, width), split, [], on_error)
