"""The splits that the README.md of a folder of parquet files describes (its ``configs``, in YAML at the top)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError
from ..storage.reader import parse_yaml, read_text

_HEAD = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_LIMIT = 1 << 22


def described_files(folder: Path) -> dict[str, list[Path]]:
    """Split -> its parquet files; empty where there is no README.md, or it says nothing of files.

    Raises:
        DataError: the file is damaged, leads out of the folder or to no file, or describes several configurations.
    """
    card = folder / "README.md"
    if not card.is_file():
        return {}
    head = _HEAD.match(read_text(card, limit=_LIMIT, error=DataError))
    said: Any = parse_yaml(head[1], f"'{card}'", DataError) if head else None
    configs = said.get("configs") if isinstance(said, dict) else None
    configs = [one for one in configs if isinstance(one, dict)] if isinstance(configs, list) else []
    configs = [one for one in configs if one.get("default") is True] or configs
    if len(configs) > 1:
        raise DataError(f"'{card}' describes {len(configs)} configurations. Give the folder of the one that you want")
    found: dict[str, list[Path]] = {}
    for config in configs:
        for split, pattern in _entries(config.get("data_files"), card):
            below = str(config.get("data_dir") or ".")
            found.setdefault(split, []).extend(_matching(folder, PurePosixPath(below) / pattern, pattern, card))
    return found


def _entries(files: Any, card: Path) -> Iterator[tuple[str, str]]:
    """(split, pattern) of ``data_files``: a pattern, several, several with their splits, or a mapping of splits."""
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    for entry in files if isinstance(files, list) else [files] if files is not None else []:
        split, path = (entry.get("split", "train"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        for pattern in path if isinstance(path, list) and path else [path]:
            if not isinstance(pattern, str) or not isinstance(split, str) or not re.fullmatch(r"\w+(\.\w+)*", split):
                raise DataError(f"the data_files of '{card}' are damaged. Repair or remove the file")
            yield split, pattern


def _matching(folder: Path, pattern: PurePosixPath, said: str, card: Path) -> list[Path]:
    if "://" in said or "::" in said or pattern.is_absolute() or ".." in pattern.parts:
        raise DataError(
            f"'{card}' leads to {said}, outside of its folder, which is not followed. Remove its data_files, or get "
            "these files and name them there"
        )
    files = sorted(file for file in folder.glob(str(pattern)) if file.suffix == ".parquet" and file.is_file())
    if not files:
        raise DataError(f"'{card}' names {said}, but there is no such parquet file. Get it, or repair the data_files")
    return files
