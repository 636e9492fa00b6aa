"""``torch.export`` files (``.pt2``): the graph for PyTorch itself, without the model's code."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from ..models.running import exact
from .file_format import FileFormat, Run
from .file_metadata import KEY, SIDECAR
from .flat_model import FlatModel
from .int8_choice import Int8
from .tracing import Traced


class TorchFormat(FileFormat):
    """Metadata is the extra file ``comcat.json`` of the archive."""

    name = "torch"
    title = "torch.export"
    suffix = ".pt2"
    antialiases = True
    pads_heads = True
    int8_packages: ClassVar[tuple[str, ...]] = ("torchao",)
    by_token = True
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "bf16", "int8")

    def quantized(self, flat: FlatModel, int8: Int8) -> FlatModel:
        """Linear layers with int8 weights, whose inputs are quantized token by token as they come."""
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

        made = copy.deepcopy(flat)
        weights_only, others = set(int8.weights_only), set(int8.weights_only + int8.floats)

        linear = {name for name, module in made.model.named_modules() if isinstance(module, nn.Linear)}
        quantize_(made.model, Int8WeightOnlyConfig(), lambda _, name: name in linear & weights_only)
        quantize_(made.model, Int8DynamicActivationInt8WeightConfig(), lambda _, name: name in linear - others)
        return made.requires_grad_(False)

    def write(
        self, traced: Traced, path: Path, precision: str, metadata: Mapping[str, str], int8: Int8 | None = None
    ) -> None:
        for node in traced.program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine, and a third of a small file
        content = io.BytesIO()  # PyTorch's own writer ends the process where the disk is full
        torch.export.save(traced.program, content, extra_files={KEY + SIDECAR: json.dumps(metadata)})
        path.write_bytes(content.getbuffer())

    def opened(self, path: Path, precision: str) -> Run:
        if precision == "int8":
            import torchao  # noqa: F401  its operators are in the file
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # of PyTorch 2.9 itself
            program = torch.export.load(path)
        model = program.module(check_guards=False)  # PyTorch 2.9 cannot name all inputs in its guards

        def run(batch: Sequence[np.ndarray]) -> list[np.ndarray]:
            with exact(torch.device("cpu")), torch.no_grad():
                return [tensor.numpy() for tensor in model(*map(torch.from_numpy, batch))]

        return run


FORMAT = TorchFormat()
