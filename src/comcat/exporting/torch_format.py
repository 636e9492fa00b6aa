"""``torch.export`` files (``.pt2``): the graph for PyTorch itself, without the model's code."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from ..models.running import exact
from .file_format import FileFormat
from .file_metadata import KEY, SIDECAR
from .tracing import Traced


class TorchFormat(FileFormat):
    """Metadata is the extra file ``comcat.json`` of the archive."""

    name = "torch"
    title = "torch.export"
    suffix = ".pt2"
    pads_heads = True
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "bf16")

    def write(self, traced: Traced, path: Path, precision: str, metadata: Mapping[str, str]) -> None:
        torch.export.save(traced.program, path, extra_files={KEY + SIDECAR: json.dumps(metadata)})

    def run(self, path: Path, batches: Iterable[Sequence[np.ndarray]], precision: str) -> list[list[np.ndarray]]:
        model = torch.export.load(path).module()
        with exact(torch.device("cpu")), torch.no_grad():
            return [[t.numpy() for t in model(*map(torch.from_numpy, batch))] for batch in batches]


FORMAT = TorchFormat()
