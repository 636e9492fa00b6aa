"""Hub-style parquet, from a local folder or the Hub, read through the package ``datasets``."""

from __future__ import annotations

import contextlib
import glob
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DataError
from .card import described_files

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "cls")


class HubSource:
    """One split of a table with an image column and, usually, a label column."""

    num_classes: int | None = None
    class_names: list[str] | None = None

    def __init__(self, data: str, split: str | None, cache: str | None, mode: str) -> None:
        self.name = data
        self.split = split
        self._mode = mode
        with quiet_datasets(data) as datasets:
            place = TableLocation(data)
            table = place.open(datasets, split, cache)
            if not len(table):
                raise DataError(f"split {split!r} of {data} holds no images. Choose another split")
            self._image, self._label = self._columns(table.features, data, datasets)
            # Undecoded, so that a corrupt image is ours to name.
            table = table.cast_column(self._image, datasets.Image(decode=False))
            own = [datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, cache]
        self._folders = [place.folder] if place.folder else [Path(path).resolve() for path in own if path]
        self._table = table.select_columns([k for k in (self._image, self._label) if k is not None])

    def _columns(self, features: Any, data: str, datasets: Any) -> tuple[str, str | None]:
        """Names of the columns with images and labels; what the classes are called is kept."""
        label = _label_column(features, datasets)
        self.num_classes = getattr(features.get(label), "num_classes", None)
        self.class_names = getattr(features.get(label), "names", None)
        return image_column(features, data, datasets), label

    def __len__(self) -> int:
        return len(self._table)

    def read(self, index: int) -> tuple[Image.Image, Any]:
        row = self._table[index]
        label = None if self._label is None else row[self._label]
        return self._picture(row), -1 if label is None else int(label)

    def _picture(self, row: Any) -> Image.Image:
        cell = row[self._image] or {}
        content = cell.get("bytes")
        if not content:
            if not cell.get("path"):
                raise ValueError("the cell is empty")
            content = self._inside(cell["path"]).read_bytes()
        return Image.open(io.BytesIO(content)).convert(self._mode)

    def _inside(self, path: str) -> Path:
        """The file that a cell names; a table from elsewhere must not choose what is read here.

        Raises:
            DataError: it lies, or a link leads, outside the folder of the table.
        """
        file = (self._folders[0] / path).resolve()
        if not any(file.is_relative_to(folder) for folder in self._folders):
            raise DataError(f"its file {path} lies outside {self.name}")
        return file

    def describe(self, index: int) -> str:
        path = (self._table[index][self._image] or {}).get("path")
        where = f"in row {index} of split {self.split!r} of {self.name}"
        return f"{path} {where}" if path else where

    def labels(self) -> np.ndarray | None:
        if self._label is None:
            return np.full(len(self), -1)
        column = self._table.with_format("numpy")[self._label][:]
        return np.nan_to_num(np.asarray(column, dtype=np.float64), nan=-1).astype(np.int64)


def hub_splits(data: str) -> list[str]:
    """The splits of a table, without reading it."""
    with quiet_datasets(data) as datasets:
        place = TableLocation(data)
        if place.folder is not None:
            return list(place.files)
        builder = datasets.load_dataset_builder(place.name)
    files = getattr(builder.config, "data_files", None)
    return [str(name) for name in (files or builder.info.splits or ())]


class TableLocation:
    """What DATA is for the package ``datasets``: a name on the Hub, or the parquet files of a folder, by split.

    The files are named one by one: left to itself, ``datasets`` follows whatever address or path a README.md names.

    Raises:
        DataError: the folder's README.md leads out of it, or to no file.
    """

    def __init__(self, data: str) -> None:
        path = Path(data).expanduser()
        self.name = data.partition("/")[2]
        if not path.exists():
            path = Path(self.name)  # hfds/FOLDER
        self.folder = path.resolve() if path.exists() else None
        self.files: dict[str, list[Path]] = {}
        if self.folder is not None:
            self.files = described_files(self.folder) or _usual_files(self.folder)

    def open(self, datasets: Any, split: str | None, cache: str | None) -> Any:
        """The table of a split."""
        if self.folder is None:
            return datasets.load_dataset(self.name, split=split, cache_dir=cache)
        # Patterns to datasets, so that a bracket in a name would be one of a class of characters.
        files = {name: [glob.escape(str(file)) for file in files] for name, files in self.files.items()}
        # Not load_dataset("parquet"), which tells the Hub of every use.
        return datasets.Dataset.from_parquet(files, split=split, cache_dir=cache)


def _usual_files(folder: Path) -> dict[str, list[Path]]:
    """Splits by the names of files and folders, as ``datasets`` reads them; all are train where none names one."""
    from datasets.data_files import get_data_patterns, resolve_pattern

    base = glob.escape(str(folder))
    found = {}
    for split, patterns in get_data_patterns(base).items():
        files: set[Path] = set()
        for pattern in patterns:
            with contextlib.suppress(FileNotFoundError):  # one of several patterns of a split
                files.update(map(Path, resolve_pattern(pattern, base)))
        if files := {file for file in files if file.suffix == ".parquet"}:
            found[str(split)] = sorted(files)
    return found


@contextlib.contextmanager
def quiet_datasets(data: str) -> Iterator[Any]:
    """The module ``datasets``, with its progress bars and logs off and its errors as :class:`DataError`."""
    try:
        import datasets
    except ImportError as e:
        raise DataError(f"reading {data} needs another package. Install it: pip install datasets") from e
    verbosity = datasets.logging.get_verbosity()
    hidden = datasets.utils.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield datasets
    except DataError:
        raise
    except Exception as e:  # a broken file, a full disk, no network: each wrapped in a type of its own
        cause: BaseException = e.__cause__ or e
        text = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"{data} cannot be read: {text}. Check that its files are complete") from e
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not hidden:
            datasets.enable_progress_bars()


def image_column(features: Any, data: str, datasets: Any) -> str:
    """The column with images, from the types of the columns.

    Raises:
        DataError: there is none.
    """

    def is_image(feature: Any) -> bool:
        # Written without Hub metadata, an image is a plain struct.
        return "bytes" in feature if isinstance(feature, dict) else isinstance(feature, datasets.Image)

    images = [k for k, feature in features.items() if is_image(feature)]
    if not images:
        raise DataError(f"{data} has no image column; its columns are {', '.join(features)}. Check the data")
    return next((k for k in _IMAGE_COLUMNS if k in images), images[0])


def _label_column(features: Any, datasets: Any) -> str | None:
    def is_label(feature: Any) -> bool:
        is_class = isinstance(feature, datasets.ClassLabel)
        return is_class or (isinstance(feature, datasets.Value) and "int" in feature.dtype)

    labels = [k for k, feature in features.items() if is_label(feature)]
    named = [k for k in _LABEL_COLUMNS if k in labels]
    classes = [k for k in labels if isinstance(features[k], datasets.ClassLabel)]
    return next(iter(named + classes), None)
