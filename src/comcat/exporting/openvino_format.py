"""OpenVINO's intermediate representation: ``F.xml`` with its weights in ``F.bin``."""

from __future__ import annotations

import errno
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from .file_format import FileFormat, Run, static_shape
from .file_metadata import KEY
from .int8_choice import Int8, image_batches
from .tracing import Traced, layer_of


class OpenVinoFormat(FileFormat):
    """Metadata is in ``rt_info``, under ``comcat``.

    fp16 and bf16 are how the weights are stored; in what is computed, OpenVINO is told when it compiles the file.
    """

    name = "openvino"
    title = "OpenVINO"
    suffix = ".xml"
    packages: ClassVar[tuple[str, ...]] = ("openvino",)
    extra = "openvino"
    int8_packages: ClassVar[tuple[str, ...]] = ("nncf",)
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "bf16", "int8")

    def traced_dtype(self, precision: str) -> torch.dtype:
        return torch.float32

    def write(
        self, traced: Traced, path: Path, precision: str, metadata: Mapping[str, str], int8: Int8 | None = None
    ) -> None:
        openvino = _openvino()
        model = openvino.convert_model(traced.program)
        for ports, wanted in ((model.inputs, traced.inputs), (model.outputs, traced.outputs)):
            for port, name in zip(ports, wanted, strict=True):
                port.get_tensor().set_names({name})
        shapes = [openvino.PartialShape(static_shape(shape)) for shape in traced.inputs.values()]
        model.reshape(dict(enumerate(shapes)))
        if int8 is not None:
            model = _quantized(model, traced, int8)
        if precision == "bf16":
            _stored_in_bf16(openvino, model)
        for key, value in metadata.items():
            model.set_rt_info(value, [KEY, key])
        try:
            openvino.save_model(model, path, compress_to_fp16=precision == "fp16")
        except RuntimeError as error:  # all that it says of a full disk is "iostream error"
            raise OSError(errno.EIO, f"OpenVINO could not write it ({error}); is there space on the disk?") from error

    def opened(self, path: Path, precision: str) -> Run:
        from ..runtimes import session

        run = session(path, "openvino", precision=precision if precision in ("bf16", "int8") else "fp32")
        return lambda batch: run(*batch)


def _quantized(model: Any, traced: Traced, int8: Int8) -> Any:
    """The model with quantized layers, by NNCF, which moves outliers of activations into the weights first."""
    import nncf

    from ..runtimes.openvino_runtime import openvino_core

    openvino_core()  # before those that NNCF makes, see there
    layers = {node.name: layer_of(node) for node in traced.program.graph.nodes}
    floats, rounded = [], []
    for op in model.get_ops():
        name = op.get_friendly_name()
        if op.get_type_name() == "ScaledDotProductAttention":
            floats.append(name)
        if op.get_type_name() in ("MatMul", "Convolution"):
            layer = layers.get(name.partition("/")[0].replace("convolution", "conv2d"))
            if layer in int8.floats + int8.weights_only or _weights(op) is None:  # products of activations
                floats.append(name)
            if layer in int8.weights_only:
                rounded.append(name)
    first = next(iter(traced.inputs.values()))[0]
    batches = image_batches(int8.images, first if isinstance(first, int) else 1)
    made = nncf.quantize(
        model,
        nncf.Dataset([batch.numpy() for batch in batches]),
        subset_size=len(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=floats) if floats else None,
    )
    _round_weights(made, set(rounded))
    return made


def _round_weights(model: Any, names: Collection[str]) -> None:
    """Store the weights of these products and convolutions in int8, by output channel."""
    import openvino
    from openvino import opset13

    for op in model.get_ops():
        if op.get_friendly_name() not in names:
            continue
        values = _weights(op)
        if values is None:
            continue
        channel = values.ndim - 1 if op.get_type_name() == "MatMul" and not op.get_attributes()["transpose_b"] else 0
        rest = tuple(axis for axis in range(values.ndim) if axis != channel)
        scale = np.maximum(np.abs(values).max(rest, keepdims=True), 1e-12).astype(np.float32) / 127
        stored = openvino.op.Constant(np.rint(values / scale).astype(np.int8))
        wide = opset13.multiply(opset13.convert(stored, "f32"), openvino.op.Constant(scale))
        op.input(1).replace_source_output(wide.output(0))


def _weights(op: Any) -> Any:
    """What a product or a convolution multiplies its input by, or None where that is no constant."""
    node = op.input_value(1).get_node()
    return np.array(node.data, copy=True) if node.get_type_name() == "Constant" else None


def _openvino() -> Any:
    from ..runtimes.openvino_runtime import openvino_module

    return openvino_module()


def _stored_in_bf16(openvino: Any, model: Any) -> None:
    """Weights in bf16, each with a conversion that the plugin folds into what uses it."""
    from openvino import opset13

    for constant in [op for op in model.get_ops() if op.get_type_name() == "Constant"]:
        if constant.get_element_type() != openvino.Type.f32 or constant.get_output_size() != 1:
            continue
        users = constant.output(0).get_target_inputs()
        values = torch.from_numpy(np.array(constant.data, copy=True)).bfloat16().view(torch.int16).numpy()
        if values.size < 2:
            continue
        tensor = openvino.Tensor(values, list(values.shape), openvino.Type.bf16)
        short = openvino.op.Constant(tensor, shared_memory=False)
        wide = opset13.convert(short, "f32")
        for user in users:
            user.replace_source_output(wide.output(0))


FORMAT = OpenVinoFormat()
