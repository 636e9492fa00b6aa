"""What the demos make under one name, so that ``--overwrite`` replaces that and nothing else."""

from __future__ import annotations

from comcat.storage.owned import MODEL, DirectoryKind, DirectoryLayout

_DIGITS: DirectoryLayout = {split: {"[0-9]": {"[0-9]*.png": None}} for split in ("train", "test")}
_PICTURES: DirectoryLayout = {"[0-9]*.png": None, "metadata.jsonl": None}
_PART: DirectoryLayout = {"*.json": None, "*.safetensors": None, "*.txt": None}
_PIPELINE: DirectoryLayout = {"model_index.json": None, "[a-z]*": _PART}

VIT_DEMO = DirectoryKind(
    "a comcat demo",
    MODEL.marker,
    MODEL.field,
    {**MODEL.layout, "dense.safetensors": None, "digits": _DIGITS, "finetuned": MODEL.layout},
)
_CONCEPT: DirectoryLayout = {"photos": _PICTURES, "class-images": _PICTURES, "concept*.safetensors": None}
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CONTEST_DEMO = DirectoryKind(
    "a comcat demo",
    "report.json",
    "base_seconds",
    {
        "base": _PIPELINE,
        **dict.fromkeys(_WORDS, _CONCEPT),
        **_CONCEPT,  # of demos of one digit alone, which an earlier version made
        "images": {"*.png": None, "images.json": None},
        "report.json": None,
        "report.png": None,
    },
    (int, float),
)
DIGITS_CACHE: DirectoryLayout = {"digits.json": None, **_PIPELINE}
