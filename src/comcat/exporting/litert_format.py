"""LiteRT (TensorFlow Lite) flat buffers (``.tflite``) for phones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from .file_format import FileFormat, Run
from .int8_choice import Int8
from .tracing import Traced


class LiteRtFormat(FileFormat):
    """Written by ``litert-torch``."""

    name = "litert"
    title = "LiteRT"
    suffix = ".tflite"
    packages: ClassVar[tuple[str, ...]] = ("litert_torch", "ai_edge_litert")
    extra = "litert"
    dynamic_batch = False
    dynamic_size = False
    holds_metadata = False

    def write(
        self, traced: Traced, path: Path, precision: str, metadata: Mapping[str, str], int8: Int8 | None = None
    ) -> None:
        import litert_torch

        positional, _ = traced.program.example_inputs
        litert_torch.convert(traced.program.module(), positional).export(str(path))

    def opened(self, path: Path, precision: str) -> Run:
        from ai_edge_litert.interpreter import Interpreter

        runner = Interpreter(model_path=str(path))
        runner.allocate_tensors()

        def run(batch: Sequence[np.ndarray]) -> list[np.ndarray]:
            for port, array in zip(runner.get_input_details(), batch, strict=True):
                runner.set_tensor(port["index"], array)
            runner.invoke()
            return [runner.get_tensor(port["index"]) for port in runner.get_output_details()]

        return run


FORMAT = LiteRtFormat()
