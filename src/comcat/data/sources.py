"""Where images come from: folders, tar files, Hub-style parquet, torchvision data sets, streams.

Every source answers the same four questions, so that :mod:`comcat.data` can treat them alike:

    len(source)             how many images
    source.read(i)          the i-th (PIL image, label), or the exception of a corrupt one
    source.describe(i)      its file or row, as a user would look for it
    source.labels()         all labels without decoding an image (-1: none), or None: not known yet

timm's readers do the reading. Two of their habits would change results silently: an empty class folder is
dropped, which shifts every later label (refused here), and a corrupt image is replaced by its neighbour
(named in :mod:`comcat.data.loading`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..errors import DataError

# Names that mean the same split, in the order in which a default is looked for.
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "val", "valid", "eval", "evaluation", "test")
_SYNONYMS = (TRAIN_NAMES, EVAL_NAMES[:-1], EVAL_NAMES[-1:])
_STREAMS = ("wds", "hfids", "tfds")


class ImageSource(Protocol):
    """A random-access collection of labelled images."""

    name: str
    num_classes: int | None
    class_names: list[str] | None  # in the order of the labels, where the data set has names

    def __len__(self) -> int: ...
    def read(self, index: int) -> tuple[Image.Image, Any]: ...
    def describe(self, index: int) -> str: ...
    def labels(self) -> np.ndarray | None: ...


def kind_of(data: str) -> str:
    """``folder``, ``parquet``, ``tar``, ``hfds``, ``torch`` or ``stream``.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    prefix, separator, _ = data.partition("/")
    if separator and prefix.lower() in ("hfds", "torch", *_STREAMS) and not Path(data).exists():
        return "stream" if prefix.lower() in _STREAMS else prefix.lower()
    path = Path(data).expanduser()
    if not path.exists():
        raise DataError(
            f"no data at {data}: there is no such folder. Give a folder of images with one folder per class, "
            "a folder of parquet files, or a timm data set name (hfds/..., wds/..., torch/...)"
        )
    if path.is_file():
        if path.suffix.lower() == ".tar":
            return "tar"
        raise DataError(f"{data} is a file. Give the folder that holds it")
    if not os.access(path, os.R_OK | os.X_OK):
        raise DataError(f"the folder {data} cannot be read (permission denied). Check its permissions: ls -ld {data}")
    return "parquet" if next(path.rglob("*.parquet"), None) else "folder"


def list_splits(data: str) -> list[str]:
    """The names of the splits that DATA has; empty when it is not divided, or cannot say (streams)."""
    kind = kind_of(data)
    if kind == "folder":
        root = Path(data).expanduser()
        return [n for names in _SYNONYMS for n in names if _has_subfolders(root / n)]
    if kind in ("parquet", "hfds"):
        from .hub_tables import hub_splits

        return hub_splits(data)
    return ["train", "validation"] if kind == "torch" else []


def choose_split(splits: Sequence[str], purpose: str) -> str | None:
    """The default split for ``calibration`` or ``evaluation``, or None if there are no splits."""
    if not splits:
        return None
    wanted = TRAIN_NAMES if purpose == "calibration" else EVAL_NAMES
    return next((name for name in wanted if name in splits), splits[0])


def match_split(split: str, splits: Sequence[str], data: str) -> str:
    """``split`` as DATA spells it (``val`` finds ``validation``).

    Raises:
        DataError: DATA has no such split; the message lists those it has.
    """
    base = re.split(r"[\[+%]", split)[0]
    if not splits:
        raise DataError(f"{data} has no splits, so there is no split {split!r}. Leave the split out")
    if base in splits:
        return split
    for names in _SYNONYMS:
        found = [name for name in names if name in splits]
        if base in names and found:
            return split.replace(base, found[0], 1)
    raise DataError(f"{data} has no split {base!r}. It has: {', '.join(splits)}")


def open_source(
    data: str,
    split: str | None,
    *,
    root: str | None = None,
    class_map: str | None = None,
    mode: str = "RGB",
    boxes: str | None = None,
) -> ImageSource:
    """Open one split of DATA for random access. Streams are opened by :mod:`comcat.data`.

    Args:
        data: a folder, a ``.tar`` file, ``hfds/<name>``, ``torch/<name>``, or a folder of parquet files.
        split: a name from :func:`list_splits`, or None where there are none.
        root: where ``torch/`` data sets lie, and the cache of ``hfds/`` ones.
        class_map: file with one class name per line, in the order of the model's outputs (folders and tars).
        mode: PIL mode of the images, ``RGB`` or ``L``.
        boxes: how a table has its boxes, which are the labels then; see :class:`comcat.data.boxes.BoxSource`.

    Raises:
        DataError: with the cause and the fix.
    """
    kind = kind_of(data)
    if class_map is not None and kind not in ("folder", "tar"):
        raise DataError("a class map applies to image folders and tar files only. Leave it out")
    if class_map is not None and not Path(class_map).is_file():
        raise DataError(f"there is no class map file {class_map}. Give a text file with one class name per line")
    if kind in ("folder", "tar"):
        return FileSource(data, split, class_map, mode)
    if kind in ("parquet", "hfds"):
        from .hub_tables import HubSource

        if boxes is not None:
            from .boxes import BOX_FORMS, BoxSource

            if boxes not in BOX_FORMS:
                raise DataError(f"there is no form of boxes {boxes!r}; choose from {', '.join(BOX_FORMS)}")
            return BoxSource(data, split, root, mode, boxes)
        return HubSource(data, split, root, mode)
    return TorchSource(data, split, root, mode)


class FileSource:
    """A folder with one sub-folder per class, or a tar file of one, read by timm."""

    def __init__(self, data: str, split: str | None, class_map: str | None, mode: str) -> None:
        from timm.data import create_dataset

        path = Path(data).expanduser()
        self.root = path / split if split else path
        self.name = str(self.root)
        self._mode = mode
        has_classes = _check_folder(self.root) if self.root.is_dir() else True
        try:
            self._reader = create_dataset("", root=str(self.root), search_split=False, class_map=class_map or "").reader
        except (RuntimeError, OSError, AssertionError, ValueError) as e:
            raise DataError(f"{self.name} cannot be read as a set of images: {e}") from e
        classes = self._reader.class_to_idx
        self.num_classes = len(classes) if has_classes else None
        self.class_names = sorted(classes, key=classes.__getitem__) if has_classes else None
        if not len(self._reader):
            raise DataError(f"the class map names none of the class folders in {self.name}. Check its lines")

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, index: int) -> tuple[Image.Image, int]:
        file, label = self._reader[index]
        with file:
            return Image.open(file).convert(self._mode), int(label) if self.num_classes else -1

    def describe(self, index: int) -> str:
        return str(self.root / self._reader._filename(index)) if self.root.is_dir() else self._reader._filename(index)

    def labels(self) -> np.ndarray | None:
        if not self.num_classes:
            return np.full(len(self), -1)
        # Folder samples are (path, label) pairs; a tar keeps its labels in a list of their own.
        targets = getattr(self._reader, "targets", None)
        return np.asarray(targets if targets is not None else [label for _, label in self._reader.samples])


class TorchSource:
    """A torchvision data set by its timm name, such as ``torch/cifar10``."""

    def __init__(self, data: str, split: str | None, root: str | None, mode: str) -> None:
        from timm.data import create_dataset

        self.name = data
        self._mode = mode
        if root is None:
            raise DataError(f"{data} needs the folder it was downloaded to. Give it: --data-root DIR")
        if not Path(root).is_dir():
            raise DataError(f"there is no folder {root} to read {data} from. Check --data-root")
        try:
            self._set = create_dataset(data, root=root, split=split or "validation")
        except (RuntimeError, AssertionError, OSError, ValueError, TypeError) as e:
            cause = str(e).split(". ")[0].split("\n")[0]
            raise DataError(f"{data} cannot be read from {root}: {cause}. Check --data-root") from e
        classes = getattr(self._set, "classes", None)
        self.num_classes = len(classes) if classes else None
        self.class_names = [str(name) for name in classes] if classes else None

    def __len__(self) -> int:
        return len(self._set)

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, label = self._set[index]
        return image.convert(self._mode), int(label)

    def describe(self, index: int) -> str:
        return f"{self.name}, image {index}"

    def labels(self) -> np.ndarray | None:
        targets = getattr(self._set, "targets", None)
        return None if targets is None else np.asarray(targets)


def _has_subfolders(folder: Path) -> bool:
    """Whether a folder named like a split is one: it holds folders (a class called ``test`` holds images)."""
    return folder.is_dir() and any(f.is_dir() for f in folder.iterdir())


def _check_folder(root: Path) -> bool:
    """Refuse what timm would read wrongly; returns whether there are class folders at all.

    Raises:
        DataError: an empty or unreadable class folder, no images, images beside the class folders.
    """
    from timm.data.readers.img_extensions import get_img_extensions

    extensions = get_img_extensions(as_set=True)
    holding: dict[str, int] = {}
    empty: list[str] = []

    def refuse(error: OSError) -> None:
        raise DataError(f"the folder {error.filename} cannot be read ({error.strerror}). Check its permissions")

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        subfolders[:] = [s for s in subfolders if not s.startswith(".")]
        images = sum(os.path.splitext(f)[1].lower() in extensions for f in files)
        if images:
            holding[folder] = images
        elif not subfolders and folder != str(root):
            empty.append(os.path.relpath(folder, root))
    if not holding:
        raise DataError(f"there are no images in {root} (looked for {', '.join(sorted(extensions))}). Check the path")
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise DataError(
            f"the class folder {sorted(empty)[0]!r}{more} in {root} holds no images, and ignoring it would "
            "shift the labels of the classes after it. Add its images or remove the folder"
        )
    if str(root) in holding and len(holding) > 1:
        raise DataError(f"{root} holds images beside its class folders. Move them into a class folder, or out")
    return str(root) not in holding
