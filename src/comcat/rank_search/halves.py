"""The data of a search: training images only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ..data.loading import BadImage
from ..errors import DataError
from ..models.running import images_of

_EVALUATION = ("test", "val", "valid", "validation", "eval", "evaluation", "dev")


def refuse_evaluation_data(loader: Any, evaluation: Any = None) -> None:
    """Raise DataError if a loader reads a split to evaluate on, or the data set that ``evaluation`` reads.

    Ranks chosen on the images that the model is judged by would make its accuracy mean nothing. The split is known from
    the data set's ``split`` (comcat, Hugging Face, torchvision) or ``train`` attribute (torchvision).
    """
    sets = list(_data_sets(loader))
    others = [id(data) for data in _data_sets(evaluation)]
    if any(id(data) in others for data in sets):
        raise DataError("the search and the evaluation read the same data set; search on the training split")
    for data in sets:
        split = getattr(data, "split", None)
        if split is not None:
            names = [one.partition("[")[0].rpartition("/")[2].lower() for one in str(split).split("+")]
            if not {*names}.isdisjoint(_EVALUATION):
                raise DataError(
                    f"the search was given the split '{split}', which is for evaluation; ranks are learned on training "
                    "images. Give the training split"
                )
        if getattr(data, "train", None) is False:
            raise DataError(
                f"the search was given {type(data).__name__}(train=False), which is for evaluation; give train=True"
            )


def _data_sets(loader: Any) -> Iterator[Any]:
    """The data set of a loader and all that it wraps or chains."""
    left = [getattr(loader, "dataset", getattr(loader, "data", None))]
    while left:
        data = left.pop()
        if data is None:
            continue
        yield data
        left += getattr(data, "datasets", ())  # torch's ConcatDataset
        left += [inner for name in ("images", "dataset", "data") if _is_set(inner := getattr(data, name, None))][:1]


def _is_set(value: Any) -> bool:
    return (
        hasattr(value, "__getitem__")
        and hasattr(value, "__len__")
        and not isinstance(value, (Tensor, list, tuple, dict, str))
    )


def sample_images(loader: DataLoader[Any], count: int, seed: int) -> Iterator[Tensor]:
    """Images of :func:`sample_batches`."""
    for batch in sample_batches(loader, count, seed):
        yield images_of(batch)


def sample_batches(loader: DataLoader[Any], count: int, seed: int) -> Iterator[Any]:
    """Batches of up to ``count`` images of a loader's data set, the same ones in every process."""
    size = len(loader.dataset)  # type: ignore[arg-type]
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    batches: DataLoader[Any] = DataLoader(
        Subset(loader.dataset, chosen), batch_size=min(loader.batch_size or 32, 64), collate_fn=loader.collate_fn
    )
    for batch in batches:
        if isinstance(batch, BadImage):
            raise batch.error()
        yield batch
