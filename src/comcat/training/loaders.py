"""The batches of one process: an order that depends on (seed, epoch) alone, and a start anywhere in an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..data.loading import BadImage
from ..data.training_set import PerSample
from ..errors import DataError, TrainingError
from ..models.running import images_of, labels_of
from .answers import Answers
from .randomness import EPOCH, isolated

if TYPE_CHECKING:
    from accelerate import Accelerator

# What a DataLoader is rebuilt with around another data set.
_KEPT = (
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
    "prefetch_factor", "persistent_workers",
)  # fmt: skip


class Batches:
    """This process's share of a loader's batches, sharded and shuffled by Accelerate.

    Args:
        loader: a DataLoader over a data set with random access.
        answers: to check the labels against.

    Attributes:
        skipped: name -> cause of every unreadable image that was replaced.

    Raises:
        TrainingError: not such a loader, or it has no batches.
    """

    def __init__(self, loader: Any, accelerator: Accelerator, seed: int, answers: Answers) -> None:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise TrainingError(
                "training needs a torch DataLoader over a data set with random access, so that it can be sharded and "
                "continued; use comcat.data.training_set.training_loader or "
                "DataLoader(TensorDataset(images, labels), ...)"
            )
        if loader.batch_size is None or loader.batch_sampler is None:
            raise TrainingError("the training loader does not batch; give its DataLoader a batch_size")
        self.images = len(loader.dataset)  # type: ignore[arg-type]
        self.batch_size = loader.batch_size
        self.drop_last = loader.drop_last
        self._seed, self._answers = seed, answers
        seeded = _seeded(loader, seed)
        self._data: PerSample = seeded.dataset  # type: ignore[assignment]
        self._loader = accelerator.prepare_data_loader(seeded, device_placement=False)
        self._accelerator = accelerator
        self.skipped: dict[str, str] = {}
        if not len(self):
            raise TrainingError(
                f"{self.images} images make no batch of {self.batch_size} for each of {accelerator.num_processes} "
                "processes; use a smaller batch size"
            )

    def __len__(self) -> int:
        return len(self._loader)

    @property
    def description(self) -> dict[str, Any]:
        """What the order and the look of the images depend on, as plain data."""
        return {
            "processes": self._accelerator.num_processes,
            "batch_size": self.batch_size,
            "images": self.images,
            "drop_last": self.drop_last,
            "data": self._data.description,
        }

    def epoch(self, number: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(images, labels) on the CPU from batch ``skip`` of an epoch on; None for labels that nothing has.

        Raises:
            DataError: an unreadable image, or a label that is none of the model's.
        """
        loader = self._accelerator.skip_first_batches(self._loader, skip) if skip else self._loader
        # Accelerate tells the sampler or the data set about the epoch, not always both.
        for target in (self._loader, loader, self._data):
            target.set_epoch(number)
        batches = iter(loader)
        # Samplers and workers are seeded when the first batch is fetched.
        with isolated(EPOCH, self._seed, number):
            batch = next(batches, None)
        try:
            while batch is not None:
                yield self._check(batch)
                batch = next(batches, None)
        finally:
            batches.close()
            self._accelerator.gradient_state._remove_dataloader(loader)

    def onward(self, epoch: int, batch: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches from there on, epoch after epoch, without end.

        Raises:
            DataError: as :meth:`epoch`, or an epoch is shorter than the loader claims.
        """
        for number in count(epoch):
            skip = batch if number == epoch else 0
            with closing(self.epoch(number, skip)) as stream:  # type: ignore[type-var]
                for _ in range(skip, len(self)):
                    found = next(stream, None)
                    if found is None:
                        raise DataError("the training loader ended before the length it claims. Correct its __len__")
                    yield found

    def _check(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        if isinstance(batch, BadImage):
            raise batch.error()
        images = images_of(batch)
        labels = None if self._answers.kind == "features" else self._answers.check(images, labels_of(batch))
        for name, cause in getattr(batch, "skipped", ()):
            self.skipped[name] = cause
        return images, labels


def _seeded(loader: DataLoader[Any], seed: int) -> DataLoader[Any]:
    """The same loader over samples that depend on (seed, epoch, index) alone."""
    if isinstance(loader.dataset, PerSample):
        return loader
    options = {name: getattr(loader, name) for name in _KEPT}
    order: dict[str, Any] = {"batch_sampler": loader.batch_sampler}
    if type(loader.batch_sampler) is torch.utils.data.BatchSampler:
        order = {"batch_size": loader.batch_size, "sampler": loader.sampler, "drop_last": loader.drop_last}
    return DataLoader(PerSample(loader.dataset, seed), **order, **options)
