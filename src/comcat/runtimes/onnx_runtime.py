"""ONNX Runtime on the processor."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import ComcatError
from .sessions import PRECISIONS, FileSession, Port

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


class OnnxSession(FileSession):
    """An ``.onnx`` file, computed as it is written; ``precision`` is what the file holds.

    Attributes:
        file_precision: fp32, fp16, bf16 or int8.

    Raises:
        ComcatError: another precision than fp32 is asked for, and the file holds something else.
    """

    runtime = "onnxruntime"
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx")
    extra = "onnx"
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS
    suffixes: ClassVar[tuple[str, ...]] = (".onnx",)

    def _read(self, path: Path) -> None:
        import onnxruntime

        found = file_precision(path)
        if self.precision not in ("fp32", found):
            raise ComcatError(
                f"onnxruntime computes what a file holds, and '{path}' holds {found}, not {self.precision}; export it "
                "in that precision"
            )
        self.precision, self.version = found, onnxruntime.__version__
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors, which are raised anyway
        # Threads that wait for work in a loop would slow down whatever is timed next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own exceptions have no common base
            raise RuntimeError(str(error)) from error
        self.inputs = tuple(
            Port(one.name, tuple(n if isinstance(n, int) else None for n in one.shape), _numpy_type(one.type))
            for one in self._session.get_inputs()
        )

    def _run(self, inputs: Any) -> Any:
        return self._session.run(None, inputs)

    def _arrays(self, outputs: Any) -> list[np.ndarray]:
        return [np.asarray(one) for one in outputs]


def _numpy_type(name: str) -> np.dtype:
    if name not in _TYPES:
        raise ValueError(f"inputs of type {name} cannot be given from NumPy")
    return np.dtype(_TYPES[name])


def file_precision(path: Path) -> str:
    """In which precision the matrices of an ``.onnx`` file are: fp32, fp16, bf16, or int8 for a quantized one."""
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # of protobuf, which has several bases
        raise ValueError(f"it is no ONNX file ({type(error).__name__})") from error
    quantized = {"QuantizeLinear", "DequantizeLinear", "MatMulInteger", "QLinearMatMul", "MatMulNBits"}
    if any(node.op_type in quantized for node in model.graph.node):
        return "int8"
    of = onnx.TensorProto
    names = {of.FLOAT: "fp32", of.DOUBLE: "fp32", of.FLOAT16: "fp16", of.BFLOAT16: "bf16"}
    sizes: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        if tensor.data_type in names:
            sizes[names[tensor.data_type]] += int(np.prod(tensor.dims))
    return sizes.most_common(1)[0][0] if sizes else "fp32"
