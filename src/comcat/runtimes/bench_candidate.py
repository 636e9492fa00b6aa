"""A model that takes part in a bench: a module, which is exported where a runtime wants files, or an exported file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.profile import profile
from .onnx_runtime import file_precision
from .openvino_runtime import is_quantized
from .registry import session_class
from .sessions import FileSession, Session, unreadable
from .whole_model import random_inputs, whole_session

_ENDINGS = (".onnx", ".xml")


class Candidate:
    """What is timed under one name.

    Attributes:
        model: a module, or None; file: an exported file, or None.
        quantized: the file holds int8, so that it runs in that precision alone.
        bytes: of the weights, or of the file.
    """

    def __init__(self, name: str, model: nn.Module | None, file: Path | None) -> None:
        self.name, self.model, self.file = name, model, file
        self.quantized = False
        self._cost: tuple[int, int] | None = None
        self._taken: tuple[int | None, ...] | None = None
        if file is not None:
            session_class("onnxruntime" if file.suffix == ".onnx" else "openvino")  # or how to install it
            self.quantized = _holds_int8(file)
            weights = file.with_name(f"{file.name}.data") if file.suffix == ".onnx" else file.with_suffix(".bin")
            self.bytes = sum(one.stat().st_size for one in (file, weights) if one.is_file())
        else:
            assert model is not None
            self.bytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())

    def open(self, runtime: str, precision: str, threads: int | None, folder: Path) -> Session | None:
        """A session, or None where the runtime does not read this file."""
        if self.model is not None:
            name = re.sub(r"\W+", "-", f"{self.name}-{precision}")
            return whole_session(self.model, runtime, precision, threads, folder, name)
        kind = session_class(runtime)
        assert self.file is not None
        if not issubclass(kind, FileSession) or self.file.suffix not in kind.suffixes:
            return None
        return kind(self.file, precision, threads)

    def inputs(self, size: Sequence[int], batch_size: int) -> list[np.ndarray]:
        """A batch of random images."""
        if self.model is not None:
            return random_inputs(self.model, size, batch_size)
        return [np.random.default_rng(0).standard_normal((batch_size, *size), np.float32)]

    def file_size(self) -> tuple[int, ...] | None:
        """(C, H, W) that the file takes, where it says."""
        if self.file is None:
            return None
        found = tuple(n for n in self._shape()[1:] if n is not None)
        return found if len(found) == 3 else None

    def check_batches(self, sizes: Sequence[int]) -> None:
        """Raise ModelError where the file takes batches of one size alone, and others are asked for."""
        batch = None if self.file is None else self._shape()[0]
        if batch is not None and set(sizes) != {batch}:
            raise ModelError(
                f"'{self.file}' takes batches of {batch} alone, and {', '.join(map(str, sizes))} are asked for: "
                f"measure those of {batch} (--batch {batch}), or export it without a fixed batch"
            )

    def _shape(self) -> tuple[int | None, ...]:
        """Of the images that the file takes; None for what may have any size.

        Raises:
            ModelError: the file takes no images.
        """
        assert self.file is not None
        if self._taken is not None:
            return self._taken
        runtime = "onnxruntime" if self.file.suffix == ".onnx" else "openvino"
        made: Any = session_class(runtime)(self.file)
        shape: tuple[int | None, ...] = made.inputs[0].shape if made.inputs else ()
        if len(shape) != 4 or len(made.inputs) > 1:
            takes = ", ".join(port.text for port in made.inputs) or "nothing"
            raise ModelError(f"'{self.file}' takes {takes}, and a bench gives images alone: leave it out")
        self._taken = shape
        return shape

    def cost(self, size: Sequence[int]) -> tuple[int | None, int | None]:
        """MACs of one image and parameters, where they can be counted."""
        if self.model is None:
            return None, None
        if self._cost is None:
            counted = profile(self.model, size)
            self._cost = counted.macs, counted.params
        return self._cost


def candidate(name: str, source: nn.Module | str | Path) -> Candidate:
    """From a module, or the path of an exported file.

    Raises:
        ModelError: anything else.
    """
    if isinstance(source, nn.Module):
        return Candidate(name, source.eval(), None)
    path = Path(source)
    if path.suffix not in _ENDINGS or not path.is_file():
        raise ModelError(f"'{path}' is no exported file ({', '.join(_ENDINGS)}); open a model with comcat.load_model")
    return Candidate(name, None, path)


def _holds_int8(file: Path) -> bool:
    if file.suffix != ".onnx":
        return is_quantized(file)
    try:
        return file_precision(file) == "int8"
    except (ValueError, OSError) as error:
        raise unreadable("onnxruntime", file, error) from error


class SessionModule(nn.Module):
    """A session as a module that returns its first output, so that what evaluates modules evaluates it."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to what the model answers, in float32."""
        return torch.from_numpy(np.asarray(self.session(images.float().cpu().numpy())[0], np.float32))
