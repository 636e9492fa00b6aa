"""ExecuTorch programs (``.pte``) for phones and boards, lowered to XNNPACK."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from .file_format import FileFormat, Run
from .int8_choice import Int8
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


_SPLITS = tuple(
    getattr(getattr(torch.ops.aten, name), overload)
    for name in ("split_with_sizes", "split", "chunk", "tensor_split")
    for overload in getattr(torch.ops.aten, name).overloads()
)


def slice_for_split(graph: torch.fx.Graph) -> None:
    """Slices for splits of any kind: for those ExecuTorch fixes the number of images to that of the example."""
    for node in list(graph.nodes):
        if node.target not in _SPLITS:
            continue
        tensor, axis = node.args[0], node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        ends = list(accumulate(part.shape[axis] for part in node.meta["val"]))
        if not all(isinstance(end, int) for end in ends):
            continue
        for user in list(node.users):
            place = range(len(ends))[user.args[1]]
            bounds = ends[place - 1] if place else 0, ends[place]
            with graph.inserting_before(user):
                piece = graph.call_function(torch.ops.aten.slice.Tensor, (tensor, axis, *bounds))
            piece.meta.update(user.meta)
            user.replace_all_uses_with(piece)
            graph.erase_node(user)
        graph.erase_node(node)


FORMAT = ExecuTorchFormat()
