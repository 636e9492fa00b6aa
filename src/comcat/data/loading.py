"""Image data sets and the batches over them, in which a corrupt image is named instead of replaced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from ..errors import DataError
from .sources import ImageSource

OnError = Literal["raise", "skip"]
Sample = tuple[torch.Tensor, int]
Batch = tuple[torch.Tensor, torch.Tensor]


class BadImage(NamedTuple):
    """What stands in for an image that could not be read, between a worker and the loader."""

    name: str
    cause: str

    def error(self) -> DataError:
        return DataError(
            f"the image {self.name} cannot be read ({self.cause.rstrip('.')}). "
            "Repair or remove it, or leave such images out: --skip-bad-images"
        )


@dataclass
class ImageData(Dataset[Sample]):
    """A split of a data set: ``data[i]`` is a (C, H, W) tensor and its integer label, -1 where there is none.

    Attributes:
        name: what the user called it.
        input_size: (C, H, W) of the tensors.
        split, splits: the split that was opened, and all there are.
        labelled: whether it has labels to evaluate against.
        as_is: the images already have the model's input size, so they are neither resized nor cropped.
    """

    name: str
    source: ImageSource
    transform: Callable[[Any], torch.Tensor]
    input_size: tuple[int, int, int]
    split: str | None = None
    splits: list[str] = field(default_factory=list)
    on_error: OnError = "raise"
    labelled: bool = True
    as_is: bool = False

    @property
    def num_classes(self) -> int | None:
        """Classes that the data set itself declares, if it does."""
        return self.source.num_classes

    @property
    def class_names(self) -> list[str] | None:
        """Their names, in the order of the labels."""
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.fetch(index)
        if isinstance(sample, BadImage):
            raise sample.error()
        return sample

    def fetch(self, index: int) -> Sample | BadImage:
        """The sample, or a :class:`BadImage`: exceptions do not travel well between processes."""
        try:
            image, label = self.source.read(index)
        except MemoryError:
            raise
        except Exception as e:  # Pillow's decoders raise whatever they like on damaged bytes
            unknown = type(e).__name__ == "UnidentifiedImageError"
            cause = "not an image" if unknown else str(e).strip() or type(e).__name__
            return BadImage(self.source.describe(index), cause.splitlines()[0])
        return self.transform(image), label


@dataclass
class StreamData:
    """A split of a streamed data set (``wds/``, ``hfids/``, ``tfds/``), read from its beginning.

    ``stream`` yields (tensor, label); the other attributes are those of :class:`ImageData`.
    """

    name: str
    stream: Any  # timm's IterableImageDataset
    input_size: tuple[int, int, int]
    split: str | None = None
    splits: list[str] = field(default_factory=list)
    on_error: OnError = "raise"
    labelled: bool = True
    as_is: bool = False
    num_classes: int | None = None
    class_names: list[str] | None = None

    def __len__(self) -> int:
        """Number of images; 0 when the data set does not say."""
        return len(self.stream)


class ImageLoader:
    """Batches of (images, labels); every pass delivers the same images in the same order.

    Args:
        data: where the images come from.
        batch_size: images in a batch.
        workers: processes that decode; streams are decoded in this one, where their errors can be counted.
        indices: the images to deliver, all of them by default.
        spare: images that replace those that had to be skipped.
        limit: images to take from a stream.

    Attributes:
        skipped: name -> cause of every image that could not be read so far.
    """

    def __init__(
        self,
        data: ImageData | StreamData,
        *,
        batch_size: int,
        workers: int = 0,
        indices: list[int] | None = None,
        spare: list[int] | None = None,
        limit: int | None = None,
    ) -> None:
        self.data = data
        self.batch_size = batch_size
        self.workers = workers
        self.skipped: dict[str, str] = {}
        self._indices = indices
        self._spare = spare or []
        self._limit = limit

    @property
    def num_images(self) -> int:
        """Images in a pass when none is corrupt; 0 when a stream does not say."""
        if self._indices is not None:
            return len(self._indices)
        have = len(self.data)
        return min(have, self._limit) if have and self._limit else self._limit or have

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        delivered = 0
        batches = self._stream(self.data) if isinstance(self.data, StreamData) else self._read(self.data)
        for batch in batches:
            delivered += len(batch[0])
            yield batch
        if not delivered:
            raise DataError(f"none of the images of {self.data.name} can be read. Check its files")

    def _read(self, data: ImageData) -> Iterator[Batch]:
        indices = list(range(len(data))) if self._indices is None else self._indices
        loader = DataLoader(
            Subset(_Fetch(data), indices),
            batch_size=self.batch_size,
            num_workers=min(self.workers, len(self)),
            collate_fn=list,
            generator=torch.Generator(),  # or every pass would draw from the global generator
        )
        missing = 0
        for samples in loader:
            good = self._keep(samples)
            missing += len(samples) - len(good)
            if good:
                yield _stack(good)
        replacements: list[Sample] = []
        for index in self._spare:
            if len(replacements) == missing:
                break
            replacements += self._keep([data.fetch(index)])
        for start in range(0, len(replacements), self.batch_size):
            yield _stack(replacements[start : start + self.batch_size])

    def _stream(self, data: StreamData) -> Iterator[Batch]:
        batch: list[Sample] = []
        count = 0
        with _StreamErrors(data.name) as errors:
            for image, label in data.stream:
                self._keep(errors.take())
                batch.append((image, -1 if label is None else int(label)))
                count += 1
                if len(batch) == self.batch_size:
                    yield _stack(batch)
                    batch = []
                if count == self._limit:
                    break
            self._keep(errors.take())
        if batch:
            yield _stack(batch)

    def _keep(self, samples: list[Sample | BadImage]) -> list[Sample]:
        good: list[Sample] = []
        for sample in samples:
            if not isinstance(sample, BadImage):
                good.append(sample)
            elif self.data.on_error == "raise":
                raise sample.error()
            else:
                self.skipped[sample.name] = sample.cause
        return good


class _Fetch(Dataset[Any]):
    """``data.fetch`` as a data set."""

    def __init__(self, data: ImageData) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Sample | BadImage:
        return self._data.fetch(index)


class _StreamErrors(logging.Handler):
    """Webdataset skips a corrupt sample with no more than a log line: this catches the line."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.WARNING)
        self._name = name
        self._bad: list[Sample | BadImage] = []
        self._count = 0
        self._logger = logging.getLogger("timm.data.readers.reader_wds")

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.getMessage()
        if "Handling webdataset error" in cause:
            cause = cause.partition("(")[2].rpartition(")")[0]
            self._count += 1
            self._bad.append(BadImage(f"{self._name} (unreadable sample {self._count})", cause[:300]))

    def take(self) -> list[Sample | BadImage]:
        """The errors since the last call."""
        bad, self._bad = self._bad, []
        return bad

    def __enter__(self) -> _StreamErrors:
        self._propagate, self._logger.propagate = self._logger.propagate, False
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = self._propagate


def _stack(samples: list[Sample]) -> Batch:
    labels: list[Any] = [label for _, label in samples]
    images = torch.stack([image for image, _ in samples])
    return images, labels if isinstance(labels[0], dict) else torch.tensor(labels)  # type: ignore[return-value]
