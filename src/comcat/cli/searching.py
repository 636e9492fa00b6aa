"""Learned ranks on the command line: ``comcat compress --method search``."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .console import Screen
from .inputs import Reading, declared_classes

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader

    from ..rank_search.search_config import SearchConfig


@dataclass(frozen=True)
class Search:
    """The options of one search.

    Attributes:
        folder: log, picture and checkpoints, kept until the model is written.
        split: of the training images.
    """

    config: SearchConfig
    folder: Path
    resume: bool
    split: str | None
    batch_size: int
    workers: int | None
    cpu: bool

    def open(self, reading: Reading, model: nn.Module, evaluation: Any, screen: Screen) -> DataLoader[Any]:
        """The training images, checked before the long work.

        Args:
            evaluation: the images to evaluate on, if there are any.

        Raises:
            DataError: they are the images to evaluate on, or have no labels.
        """
        from ..data.training_set import training_loader
        from ..rank_search.halves import refuse_evaluation_data

        data_config = reading.configure(model)
        data = reading.open(self.split, "calibration", data_config, declared_classes(model), self.config.seed)
        if evaluation is not None and data.split == evaluation.split:
            what = f"the split {data.split!r}" if data.split else f"{data.name}, which has no splits"
            raise DataError(
                f"the search and the evaluation would both use {what}; ranks are learned on training images. Give "
                "--search-split and --eval-split, or --no-eval"
            )
        loader = training_loader(data, self.batch_size, data_config, seed=self.config.seed, workers=self.workers)
        refuse_evaluation_data(loader)
        screen.note(f"ranks are learned on {data.split or data.name!r}; its log is in {self.folder} meanwhile")
        return loader

    def hand_over(self, out: Path) -> None:
        """Copy log and picture into the directory of the finished model."""
        from ..rank_search.run import LOG_NAME, PICTURE_NAME

        for name in (LOG_NAME, PICTURE_NAME):
            if (self.folder / name).exists():
                shutil.copy(self.folder / name, out / name)

    def clean(self) -> None:
        """Remove the working files, which the search wrote, and nothing else; for when the model is safe."""
        from ..rank_search.run import LOG_NAME, PICTURE_NAME
        from ..storage.manifest import Manifest
        from ..training import state
        from ..training.log import remove_board

        state.remove(self.folder)
        remove_board(self.folder)
        manifest = Manifest(self.folder)
        for name in (LOG_NAME, PICTURE_NAME):
            if name in manifest.files:
                manifest.remove(name)
        manifest.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # unless something else is in it


def working_folder(out: Path) -> Path:
    """Where a search for the model in ``out`` works: beside it."""
    return out.with_name(f"{out.name}.search")


def read_config(file: Path | None, given: dict[str, Any]) -> SearchConfig:
    """Settings from a YAML file and from options, which go first; those that are None were not given.

    Raises:
        TrainingError: the file is no YAML mapping, an unknown field, or a value out of range.
    """
    from ..rank_search.search_config import SearchConfig
    from ..training.settings import read_yaml

    values = read_yaml(file) if file is not None else {}
    return SearchConfig.from_dict({**values, **{name: value for name, value in given.items() if value is not None}})
