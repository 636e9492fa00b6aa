"""The photos that the page is given: checked one by one, captioned in a table, written where a training finds them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..customize.teaching.photos import EXTENSIONS, find_photos, why_no_photo
from ..errors import CheckpointError, DataError
from ..storage.atomic import atomic_directory
from ..storage.owned import DirectoryKind
from ..storage.reader import read_json

#: Beside the photos: what else the training was told, so that it can go on when the page is another one.
TOLD = ".comcat-ui.json"
_MARK = "comcat_ui"
_NONE = "\0"  # the caption of a photo that has none: no file holds it
PHOTOS_FOLDER = DirectoryKind(
    "a folder of photos of comcat ui",
    TOLD,
    _MARK,
    {TOLD: None, "*.txt": None, **{f"*{end}": None for case in EXTENSIONS for end in (case, case.upper())}},
)


@dataclass(frozen=True)
class GivenPhoto:
    """A file that can be read as a photo, the name that it gets, and its own caption; "" for that of all photos."""

    path: str
    name: str
    caption: str = ""


def add_photos(there: Sequence[GivenPhoto], files: Iterable[str | Path]) -> tuple[list[GivenPhoto], list[str]]:
    """(all photos, what is wrong with the files that are none); those that are there stay, whatever comes."""
    photos, problems = list(there), []
    for file in map(Path, files):
        if problem := why_no_photo(file):
            problems.append(problem)
        elif all(file != Path(photo.path) for photo in photos):
            photos.append(GivenPhoto(str(file), _free(file.name, photos)))
    return photos, problems


def photos_of(folder: Path) -> list[GivenPhoto]:
    """The photos of a folder on this machine, with the captions beside them.

    Raises:
        DataError: there are none, or one, or a caption, cannot be read.
    """
    found = find_photos(folder.expanduser(), _NONE)
    return [GivenPhoto(str(p.path), p.path.name, "" if p.caption == _NONE else p.caption) for p in found]


def with_captions(photos: Sequence[GivenPhoto], rows: Iterable[Sequence[Any]]) -> list[GivenPhoto]:
    """The photos with the captions of the table's rows, (name, caption); a row that is gone removes its photo."""
    captions = {str(row[0]): " ".join(str(row[1] or "").split()) for row in rows}
    return [replace(photo, caption=captions[photo.name]) for photo in photos if photo.name in captions]


def write_photos(folder: Path, photos: Sequence[GivenPhoto], told: dict[str, Any]) -> None:
    """Photos, captions and what else the training is told, in the place of what an earlier one was given.

    Raises:
        DataError: there are no photos. CheckpointError: the folder holds something else, or cannot be written.
    """
    if not photos:
        raise DataError("there are no photos yet; add some of the concept, 4 to 20 of them")
    with atomic_directory(folder, overwrite=folder.exists(), kind=PHOTOS_FOLDER) as new:
        for photo in photos:
            try:
                shutil.copyfile(photo.path, new / photo.name)
            except OSError as error:
                raise DataError(f"the photo {photo.name!r} cannot be read any more; add it again") from error
            if photo.caption:
                (new / photo.name).with_suffix(".txt").write_text(photo.caption + "\n", encoding="utf-8")
        (new / TOLD).write_text(json.dumps({_MARK: 1, **told}, indent=1) + "\n", encoding="utf-8")


def read_told(folder: Path) -> dict[str, Any] | None:
    """What :func:`write_photos` was told; None where it has written nothing.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = folder / TOLD
    if not file.is_file():
        return None
    told: Any = read_json(file)
    if not isinstance(told, dict) or told.get(_MARK) != 1:
        raise CheckpointError(f"'{file}' is damaged, or of a newer version. Remove '{folder}' and add the photos again")
    return {key: value for key, value in told.items() if key != _MARK}


def _free(name: str, photos: Sequence[GivenPhoto]) -> str:
    """A name whose stem, which its caption bears too, no photo has yet."""
    stem, suffix = Path(name).stem, Path(name).suffix
    taken = {Path(photo.name).stem for photo in photos}
    number, found = 2, stem
    while found in taken:
        found, number = f"{stem}-{number}", number + 1
    return found + suffix
