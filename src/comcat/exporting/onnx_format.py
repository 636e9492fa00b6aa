"""ONNX, by PyTorch's exporter of graphs (``dynamo=True``)."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .file_format import FileFormat, Run
from .int8_choice import Int8, image_batches
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
    antialiases = True
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8")
    why_not: ClassVar[Mapping[str, str]] = {
        "bf16": "ONNX Runtime has no bf16 kernels for processors, so that nobody could check the file here"
    }

    def write(
        self, traced: Traced, path: Path, precision: str, metadata: Mapping[str, str], int8: Int8 | None = None
    ) -> None:
        import torch

        made: Any = torch.onnx.export(
            traced.program, dynamo=True, input_names=list(traced.inputs), output_names=list(traced.outputs)
        )
        layers = _layers(made.model)
        _forget_traces(made.model)
        _named_axes(made.model, traced)
        if precision == "fp16":
            transpose_last(made.model.graph)
        made.model.metadata_props.update(metadata)
        made.model.producer_name = "comcat"
        made.model.producer_version = metadata["comcat_version"]
        size = sum(value.const_value.nbytes for value in made.model.graph.initializers.values())
        made.save(path, external_data=size > _MOST_BYTES)
        if int8 is not None:
            first = next(iter(traced.inputs.values()))[0]
            _quantize(path, layers, int8, first if isinstance(first, int) else None)

    def opened(self, path: Path, precision: str) -> Run:
        from ..runtimes import session

        run = session(path, "onnxruntime")
        return lambda batch: run(*batch)


def _quantize(path: Path, layers: Mapping[str, str], int8: Int8, batch: int | None) -> None:
    """Replace a float file by its int8 form, with scales for inputs (by tensor) and for weights (by channel)."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    graph = onnx.load(str(path), load_external_data=False).graph
    name = graph.input[0].name
    weights = {value.name for value in graph.initializer}
    floats = {node for node, layer in layers.items() if layer in int8.floats + int8.weights_only}
    # The quantizer's own "MatMulConstBOnly" is for its dynamic form; scores and values would be int8 without this.
    floats |= {node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in weights}

    class Reader(CalibrationDataReader):
        batches = iter([{name: images.numpy()} for images in image_batches(int8.images, batch or 1)])

        def get_next(self) -> Any:
            return next(self.batches, None)

    made = path.with_name("int8.onnx")
    quantize_static(
        path,
        made,
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        nodes_to_exclude=sorted(floats),
    )
    _round_weights(made, {node for node, layer in layers.items() if layer in int8.weights_only})
    made.replace(path)


def _round_weights(path: Path, nodes: Collection[str]) -> None:
    """Store the weights of these nodes in int8, by output channel; a session multiplies them out when it begins."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(path))
    graph = model.graph
    weights = {value.name: value for value in graph.initializer}
    users = Counter(name for node in graph.node for name in node.input)
    made = []
    for node in graph.node:
        weight = weights.get(node.input[1]) if node.name in nodes else None
        if weight is None or users[weight.name] > 1:
            continue
        values = numpy_helper.to_array(weight)
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        channel = 0 if node.op_type == "Conv" or transposed else values.ndim - 1
        rest = tuple(axis for axis in range(values.ndim) if axis != channel)
        scale = np.maximum(np.abs(values).max(rest, keepdims=True), 1e-12).astype(np.float32) / 127
        name = weight.name
        stored = numpy_helper.from_array(np.rint(values / scale).astype(np.int8), f"{name}_int8")
        graph.initializer.remove(weight)
        graph.initializer.extend([stored, numpy_helper.from_array(scale, f"{name}_scale")])
        made.append(helper.make_node("Cast", [stored.name], [f"{name}_wide"], to=onnx.TensorProto.FLOAT))
        made.append(helper.make_node("Mul", [f"{name}_wide", f"{name}_scale"], [name]))
    for node in reversed(made):
        graph.node.insert(0, node)
    onnx.save(model, str(path))


def _layers(model: Any) -> dict[str, str]:
    """Nodes with weights -> the layer that they come from."""
    found = {}
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        if node.op_type in ("MatMul", "Gemm", "Conv") and len(scopes) > 1:
            found[node.name] = scopes[-2].removeprefix("model.")
    return found


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


def transpose_last(graph: Any) -> None:
    """Products by a matrix before the transposition of other axes, not behind it: ``x^T W`` -> ``(x W)^T``.

    ONNX Runtime joins a transposition of the first axis (sequence-first attention) with the product, and on a processor
    it ends the process where that is in fp16 (measured with 1.32: its MatmulTransposeFusion behind a Cast).
    """
    import onnx_ir

    for node in [node for node in graph if node.op_type == "MatMul"]:
        out, weight, before = node.outputs[0], node.inputs[1].const_value, node.inputs[0].producer()
        if weight is None or len(weight.shape) != 2 or before is None or before.op_type != "Transpose":
            continue
        perm = list(before.attributes["perm"].as_ints()) if "perm" in before.attributes else [1]
        if perm[-1] != len(perm) - 1 or out.is_graph_output():
            continue
        users = list(out.uses())
        node.replace_input_with(0, before.inputs[0])
        after = onnx_ir.node("Transpose", [out], {"perm": perm})
        after.outputs[0].dtype, after.outputs[0].shape, out.shape = out.dtype, out.shape, None
        graph.insert_after(node, after)
        for user, place in users:
            user.replace_input_with(place, after.outputs[0])
        if not before.outputs[0].uses():
            graph.remove(before, safe=True)


def _named_axes(model: Any, traced: Traced) -> None:
    """``batch``, ``height`` and ``width`` for the exporter's own names of open axes."""
    import onnx_ir

    for value in model.graph.inputs:
        value.shape = onnx_ir.Shape(traced.inputs[value.name])
    for value in model.graph.outputs:
        value.shape = onnx_ir.Shape(traced.outputs[value.name])


FORMAT = OnnxFormat()
