"""OpenVINO's intermediate representation: ``F.xml`` with its weights in ``F.bin``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from .file_format import FileFormat, static_shape
from .file_metadata import KEY
from .tracing import Traced


class OpenVinoFormat(FileFormat):
    """Metadata is in ``rt_info``, under ``comcat``.

    fp16 and bf16 are how the weights are stored; in what is computed, OpenVINO is told when it compiles the file.
    """

    name = "openvino"
    title = "OpenVINO"
    suffix = ".xml"
    packages: ClassVar[tuple[str, ...]] = ("openvino",)
    extra = "openvino"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "bf16")

    def traced_dtype(self, precision: str) -> torch.dtype:
        return torch.float32

    def write(self, traced: Traced, path: Path, precision: str, metadata: Mapping[str, str]) -> None:
        openvino = _openvino()
        model = openvino.convert_model(traced.program)
        for ports, wanted in ((model.inputs, traced.inputs), (model.outputs, traced.outputs)):
            for port, name in zip(ports, wanted, strict=True):
                port.get_tensor().set_names({name})
        shapes = [openvino.PartialShape(static_shape(shape)) for shape in traced.inputs.values()]
        model.reshape(dict(enumerate(shapes)))
        if precision == "bf16":
            _stored_in_bf16(openvino, model)
        for key, value in metadata.items():
            model.set_rt_info(value, [KEY, key])
        openvino.save_model(model, path, compress_to_fp16=precision == "fp16")

    def run(self, path: Path, batches: Iterable[Sequence[np.ndarray]], precision: str) -> list[list[np.ndarray]]:
        from ..runtimes import session

        run = session(path, "openvino", precision="bf16" if precision == "bf16" else "fp32")
        return [run(*batch) for batch in batches]


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
