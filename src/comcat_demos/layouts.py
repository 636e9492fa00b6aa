"""What the demos make under one name, so that ``--overwrite`` replaces that and nothing else."""

from __future__ import annotations

from comcat.storage.owned import MODEL, Kind, Layout

_DIGITS: Layout = {split: {"[0-9]": {"[0-9]*.png": None}} for split in ("train", "test")}
_PICTURES: Layout = {"[0-9]*.png": None, "metadata.jsonl": None}
_PART: Layout = {"*.json": None, "*.safetensors": None, "*.txt": None}
_PIPELINE: Layout = {"model_index.json": None, "[a-z]*": _PART}

VIT_DEMO = Kind(
    "a comcat demo",
    MODEL.marker,
    MODEL.field,
    {**MODEL.layout, "dense.safetensors": None, "digits": _DIGITS, "finetuned": MODEL.layout},
)
CONTEST_DEMO = Kind(
    "a comcat demo",
    "report.json",
    "base_seconds",
    {
        "base": _PIPELINE,
        "photos": _PICTURES,
        "class-images": _PICTURES,
        "images": {"*.png": None, "images.json": None},
        "concept*.safetensors": None,
        "report.json": None,
        "report.png": None,
    },
    (int, float),
)
DIGITS_CACHE: Layout = {"digits.json": None, **_PIPELINE}
