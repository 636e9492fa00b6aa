"""ExecuTorch programs (``.pte``) for phones and boards, lowered to XNNPACK."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from .file_format import FileFormat, Run
from .int8_choice import Int8
from .splits import slice_for_split
from .tracing import Traced


class ExecuTorchFormat(FileFormat):
    """What XNNPACK does not take stays with ExecuTorch's portable kernels."""

    name = "executorch"
    title = "ExecuTorch"
    suffix = ".pte"
    packages: ClassVar[tuple[str, ...]] = ("executorch",)
    extra = "executorch"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16")
    why_not: ClassVar[Mapping[str, str]] = {"bf16": "XNNPACK has no bf16 kernels"}
    dynamic_size = False
    bounded = True
    holds_metadata = False

    def write(
        self, traced: Traced, path: Path, precision: str, metadata: Mapping[str, str], int8: Int8 | None = None
    ) -> None:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        slice_for_split(traced.program.graph_module.graph)
        lowered = to_edge_transform_and_lower(traced.program, partitioner=[XnnpackPartitioner()])
        with open(path, "wb") as file:
            lowered.to_executorch().write_to_file(file)

    def opened(self, path: Path, precision: str) -> Run:
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(path).load_method("forward")

        def run(batch: Sequence[np.ndarray]) -> list[np.ndarray]:
            return [tensor.numpy().copy() for tensor in method.execute([torch.from_numpy(one) for one in batch])]

        return run


FORMAT = ExecuTorchFormat()
