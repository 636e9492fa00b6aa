"""Which runtimes there are, and a session in one of them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ComcatError
from .sessions import PRECISIONS, Session

if TYPE_CHECKING:
    from torch import nn

#: Name -> module and class; nothing is imported before it is asked for.
RUNTIMES = {
    "torch": ("torch_runtime", "TorchSession"),
    "torch-compile": ("torch_compile_runtime", "CompiledSession"),
    "onnxruntime": ("onnx_runtime", "OnnxSession"),
    "openvino": ("openvino_runtime", "OpenVinoSession"),
}

#: The format of :func:`comcat.export` that a runtime reads; those that are not here run modules.
FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}


def held_precision(runtime: str, precision: str) -> str:
    """In which precision a file is written that a runtime shall compute in ``precision``.

    What ONNX Runtime computes in is in the file, and so is int8 for all; of floats OpenVINO is told.
    """
    return precision if runtime == "onnxruntime" or precision == "int8" else "fp32"


def session_class(runtime: str) -> type[Session]:
    """The class of a runtime's sessions.

    Raises:
        ComcatError: there is no such runtime, or its package is not installed.
    """
    if runtime not in RUNTIMES:
        raise ComcatError(f"unknown runtime {runtime!r}; choose from {', '.join(RUNTIMES)}")
    module, name = RUNTIMES[runtime]
    found: type[Session] = getattr(import_module(f".{module}", __package__), name)
    if any(find_spec(package) is None for package in found.packages):
        raise ComcatError(f"{runtime} is not installed: pip install 'comcat[{found.extra}]'")
    return found


def check_precisions(precisions: Sequence[str]) -> None:
    """Raise ComcatError for one that no runtime knows."""
    unknown = [name for name in precisions if name not in PRECISIONS]
    if unknown or not precisions:
        raise ComcatError(f"unknown precision {', '.join(map(repr, unknown))}; choose from {', '.join(PRECISIONS)}")


def available() -> list[str]:
    """The runtimes whose packages are installed."""
    found = []
    for name in RUNTIMES:
        try:
            session_class(name)
        except ComcatError:
            continue
        found.append(name)
    return found


def session(
    source: nn.Module | str | Path, runtime: str, precision: str = "fp32", threads: int | None = None
) -> Session:
    """A model ready to run in a runtime.

    Args:
        source: an ``nn.Module`` for ``torch`` and ``torch-compile``; the path of an exported file for ``onnxruntime``
            (``.onnx``) and ``openvino`` (``.xml``, ``.onnx``).
        runtime: a key of :data:`RUNTIMES`.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``int8``. PyTorch casts a copy of the model. OpenVINO computes a
            file of floats in this precision, and with ``int8`` runs a quantized file with its own defaults for the
            rest. ONNX Runtime computes what the file holds.
        threads: of the processor; default what the runtime takes by itself.

    Raises:
        ComcatError: an unknown runtime, one that is not installed (the message has the pip line), or a precision that
            it does not compute in.
        ModelError: a source that the runtime cannot run.
    """
    return session_class(runtime)(source, precision, threads)
