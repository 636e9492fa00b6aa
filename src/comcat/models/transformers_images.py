"""How images are prepared for a model of transformers: its image processor, in the words of timm.

Resizing to a fixed size is timm's crop mode ``squash``; resizing the shorter side and cropping is ``center`` with
``crop_pct``; a rescaling other than 1/255 goes into mean and standard deviation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..storage.reader import read_json
from .transformers_config import check

#: By Pillow's numbers.
_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_FILES = ("preprocessor_config.json", "processor_config.json")


def data_config(folder: Path, config: Any) -> dict[str, Any]:
    """The data config that the directory's image processor stands for; empty where it has none.

    Raises:
        ModelError: the processor is damaged, asks for code of its own, or is none that transformers has.
    """
    there = [name for name in _FILES if (folder / name).is_file()]
    for name in there:
        what = f"image processor '{folder / name}'"
        content = read_json(folder / name, what="image processor", error=ModelError)
        if not isinstance(content, dict):
            raise ModelError(f"{what} is damaged: it must be fields by name")
        check(content, what)
        _check_class(content, what)
    if not there:
        return {}
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(
            str(folder), config=config, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a processor raises for values that do not go together
        raise ModelError(
            f"'{folder / there[0]}' is no image processor that transformers has: {' '.join(str(error).split())[:300]}"
        ) from error
    return translated(processor.to_dict())


def _check_class(content: dict[str, Any], what: str) -> None:
    """transformers would take the usual processor of the model in place of one that it does not know."""
    import transformers

    name = content.get("image_processor_type")
    if name is not None and not (isinstance(name, str) and hasattr(transformers, name.removesuffix("Fast"))):
        raise ModelError(f"{what} is a {name!r}, which transformers {transformers.__version__} does not have")


def translated(processor: dict[str, Any]) -> dict[str, Any]:
    """``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``, ``input_size`` of a processor's settings."""
    factor = float(processor.get("rescale_factor") or 1 / 255) if processor.get("do_rescale", True) else 1.0
    scale = 255 * factor  # of images in [0, 1]
    normalized = processor.get("do_normalize") and processor.get("image_mean") is not None
    config: dict[str, Any] = {}
    for name, neutral in (("mean", 0.0), ("std", 1.0)):
        values = _numbers(processor[f"image_{name}"] if normalized else neutral)
        config[name] = tuple(value / scale for value in values) * (3 if len(values) == 1 else 1)
    resample = processor.get("resample")
    if resample is not None and int(resample) in _INTERPOLATION:
        config["interpolation"] = _INTERPOLATION[int(resample)]
    return {**config, **_geometry(processor)}


def _geometry(processor: dict[str, Any]) -> dict[str, Any]:
    size, crop = processor.get("size") or {}, processor.get("crop_size") or {}
    size = size if isinstance(size, dict) else {"shortest_edge": size}
    crop = crop if isinstance(crop, dict) else {"height": crop, "width": crop}
    shortest, wanted = size.get("shortest_edge"), (size.get("height"), size.get("width"))
    if processor.get("do_center_crop") and crop.get("height"):
        wanted = (crop["height"], crop["width"])
        before = shortest or min(size.get("height") or 0, size.get("width") or 0)
        share = min(wanted) / before if processor.get("do_resize", True) and before else 1.0
        return {"input_size": (3, *wanted), "crop_pct": share, "crop_mode": "center"}
    if "crop_pct" in processor and shortest and shortest < 384:  # ConvNeXt: larger images are squashed
        return {"input_size": (3, shortest, shortest), "crop_pct": processor["crop_pct"], "crop_mode": "center"}
    if shortest:
        wanted = (shortest, shortest)
    if not wanted[0]:
        return {"crop_pct": 1.0, "crop_mode": "squash"}
    return {"input_size": (3, *wanted), "crop_pct": 1.0, "crop_mode": "squash"}


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in value) if isinstance(value, (list, tuple)) else (float(value),)
