"""What a file says of itself: where the model came from, how its images are prepared, what its outputs mean.

    comcat_version, format, precision, source, library
    preprocessing   mean, std, input_size, interpolation, crop_pct, crop_mode, channel_order, value_range
    class_names     in the order of the logits, where the model knows them
    inputs, outputs shapes, with a word for an axis of any size

Everything is text; lists and groups are JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from .._version import __version__
from ..models.source import recorded_source

#: The key under which formats with one place hold all of it, and the end of a file beside those that have none.
KEY, SIDECAR = "comcat", ".json"
_IMAGES = ("mean", "std", "input_size", "interpolation", "crop_pct", "crop_mode")


def describe_file(model: nn.Module, config: Mapping[str, Any], file_format: str, precision: str) -> dict[str, Any]:
    """What is known before the file is written.

    Args:
        config: of :func:`comcat.models.preprocessing.said_config`.
    """
    source = recorded_source(model)
    found: dict[str, Any] = {"comcat_version": __version__, "format": file_format, "precision": precision}
    found["source"] = source.name if source else type(model).__name__
    if source:
        found["library"] = source.library
    prepared = {name: config[name] for name in _IMAGES if config.get(name) is not None}
    if "mean" in prepared and "std" in prepared:
        found["preprocessing"] = {**prepared, "channel_order": "RGB", "value_range": [0, 1]}
    if config.get("label_names"):
        found["class_names"] = list(config["label_names"])
    return found


def as_text(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Every value as text."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
