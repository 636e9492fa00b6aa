"""OpenVINO on the processor, without its telemetry."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .sessions import PRECISIONS, FileSession, Port, unreadable

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


class OpenVinoSession(FileSession):
    """An ``.xml`` (OpenVINO) or ``.onnx`` file, compiled for one stream, as latency wants it.

    A file of floats is computed in ``precision``; a quantized one, with ``int8``, as OpenVINO does by default, where
    what is not quantized runs in bf16 on processors that have it.
    """

    runtime = "openvino"
    packages: ClassVar[tuple[str, ...]] = ("openvino",)
    extra = "openvino"
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS
    suffixes: ClassVar[tuple[str, ...]] = (".xml", ".onnx")

    def _read(self, path: Path) -> None:
        # Threads that are not bound to a core: all sessions of a process would be bound to the same few.
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "ENABLE_CPU_PINNING": "NO"}
        if self.precision in _HINTS:
            config["INFERENCE_PRECISION_HINT"] = _HINTS[self.precision]
        if self.threads is not None:
            config["INFERENCE_NUM_THREADS"] = self.threads
        compiled = openvino_core().compile_model(str(path), "CPU", config)
        self.version = openvino_module().__version__.partition("-")[0]
        self._request = compiled.create_infer_request()
        self.inputs = tuple(_port(one) for one in compiled.inputs)
        self._outputs = len(compiled.outputs)

    def _run(self, inputs: Any) -> Any:
        self._request.infer(inputs, share_inputs=True, share_outputs=True)

    def _arrays(self, outputs: Any) -> list[np.ndarray]:
        return [np.array(self._request.get_output_tensor(i).data) for i in range(self._outputs)]


def _port(one: Any) -> Port:
    shape = tuple(None if size.is_dynamic else size.get_length() for size in one.get_partial_shape())
    names = sorted(one.get_names())
    return Port(names[0] if names else one.node.friendly_name, shape, np.dtype(one.get_element_type().to_dtype()))


def is_quantized(path: Path) -> bool:
    """Whether an ``.xml`` file holds int8.

    Raises:
        ModelError: OpenVINO cannot read it.
    """
    try:
        with open(path, "rb") as file:  # otherwise every reader of OpenVINO tries, some of them aloud
            if not file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
                raise ValueError("it is no XML")
        model = openvino_core().read_model(str(path))
    except (RuntimeError, ValueError, OSError) as error:
        raise unreadable("openvino", path, error) from error
    short = {"i8", "u8", "i4", "u4"}
    constants = (op for op in model.get_ops() if op.get_type_name() == "Constant")
    return any(op.get_type_name() == "FakeQuantize" for op in model.get_ops()) or any(
        op.get_element_type().to_string() in short for op in constants
    )


@cache
def openvino_core() -> Any:
    """The one of this process, which stays.

    A core replaces the stack that signals are handled on, and puts the one before back when it goes. Of two that go in
    the order they came in, the second puts back what the first has freed, and the next signal (Ctrl-C, the end of a
    child process) is a segmentation fault.
    """
    core = openvino_module().Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")  # it is the plugin that does this, which is loaded here
    return core


def openvino_module() -> Any:
    """``openvino``, which does not report to anybody: left to itself it does so already when it is imported.

    It and NNCF look for the package that does the reporting, and do without where there is none.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino
