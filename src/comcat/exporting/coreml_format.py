"""Core ML packages (``.mlpackage``): written on any system, run by Apple's."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from .file_format import FileFormat, Run
from .int8_choice import Int8
from .publishing import PACKAGE_SUFFIX
from .splits import slice_for_split
from .tracing import Traced


class CoreMlFormat(FileFormat):
    """Metadata is user-defined metadata of the model."""

    name = "coreml"
    title = "Core ML"
    suffix = PACKAGE_SUFFIX
    packages: ClassVar[tuple[str, ...]] = ("coremltools",)
    extra = "coreml"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16")
    why_not: ClassVar[Mapping[str, str]] = {"bf16": "Core ML has no bf16"}
    dynamic_size = False
    bounded = True

    def traced_dtype(self, precision: str) -> torch.dtype:
        return torch.float32

    def write(
        self, traced: Traced, path: Path, precision: str, metadata: Mapping[str, str], int8: Int8 | None = None
    ) -> None:
        import coremltools

        slice_for_split(traced.program.graph_module.graph)
        made: Any = coremltools.convert(
            traced.program.run_decompositions({}),
            outputs=[coremltools.TensorType(name=name, dtype=np.float32) for name in traced.outputs],
            compute_precision=getattr(coremltools.precision, {"fp32": "FLOAT32", "fp16": "FLOAT16"}[precision]),
            minimum_deployment_target=coremltools.target.iOS18,
        )
        spec = made.get_spec()
        for port, name in zip(spec.description.input, traced.inputs, strict=True):
            coremltools.utils.rename_feature(spec, port.name, name)
        made = coremltools.models.MLModel(spec, weights_dir=made.weights_dir)
        made.user_defined_metadata.update(metadata)
        made.save(str(path))

    def opened(self, path: Path, precision: str) -> Run | None:
        if platform.system() != "Darwin":
            return None
        import coremltools

        model: Any = coremltools.models.MLModel(str(path))
        names = [port.name for port in model.get_spec().description.input]
        outputs = [port.name for port in model.get_spec().description.output]

        def run(batch: Sequence[np.ndarray]) -> list[np.ndarray]:
            made = model.predict(dict(zip(names, batch, strict=True)))
            return [made[name] for name in outputs]

        return run


FORMAT = CoreMlFormat()
