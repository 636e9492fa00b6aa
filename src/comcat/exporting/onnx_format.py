"""ONNX, by PyTorch's exporter of graphs (``dynamo=True``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .file_format import FileFormat
from .tracing import Traced

#: Protocol buffers end at two gigabytes; larger weights go into a file of their own beside the graph.
_MOST_BYTES = 1_900_000_000


class OnnxFormat(FileFormat):
    """Metadata is in ``metadata_props``."""

    name = "onnx"
    title = "ONNX"
    suffix = ".onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnx"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16")
    why_not: ClassVar[Mapping[str, str]] = {
        "bf16": "ONNX Runtime has no bf16 kernels for processors, so that nobody could check the file here"
    }

    def write(self, traced: Traced, path: Path, precision: str, metadata: Mapping[str, str]) -> None:
        import torch

        made: Any = torch.onnx.export(
            traced.program, dynamo=True, input_names=list(traced.inputs), output_names=list(traced.outputs)
        )
        _forget_traces(made.model)
        _named_axes(made.model, traced)
        made.model.metadata_props.update(metadata)
        made.model.producer_name = "comcat"
        made.model.producer_version = metadata["comcat_version"]
        size = sum(value.const_value.nbytes for value in made.model.graph.initializers.values())
        made.save(path, external_data=size > _MOST_BYTES)

    def run(self, path: Path, batches: Iterable[Sequence[np.ndarray]], precision: str) -> list[list[np.ndarray]]:
        from ..runtimes import session

        run = session(path, "onnxruntime")
        return [run(*batch) for batch in batches]


def _forget_traces(model: Any) -> None:
    """Stack traces and names of modules, by node: most of a small file, with the paths of this machine."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *getattr(graph, "initializers", {}).values()):
            value.metadata_props.clear()
    model.graph.metadata_props.clear()


def _named_axes(model: Any, traced: Traced) -> None:
    """``batch``, ``height`` and ``width`` for the exporter's own names of open axes."""
    import onnx_ir

    for value in model.graph.inputs:
        value.shape = onnx_ir.Shape(traced.inputs[value.name])
    for value in model.graph.outputs:
        value.shape = onnx_ir.Shape(traced.outputs[value.name])


FORMAT = OnnxFormat()
