"""One file format, as the export sees it: what it needs, what it can hold, how it is written and run.

Adding a format is a file with a subclass of :class:`FileFormat`, a line in :mod:`comcat.exporting.formats`, and an
extra in pyproject.toml.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ..errors import ExportError
from .flat_model import FlatModel
from .int8_choice import Int8
from .tracing import Traced

#: What a precision is traced in; int8 begins as float32.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}
#: A file that is ready to run: one batch in, its outputs out.
Run = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


class FileFormat(ABC):
    """A format.

    Attributes:
        name: as typed; title: as said; suffix: of its files.
        packages: that must be there; extra: of comcat that installs them.
        int8_packages: what int8 needs besides; by_token: whether int8 inputs have a scale for every token.
        precisions: that it can hold; why_not: precision -> why it cannot.
        dynamic_batch, dynamic_size: whether it can leave the number and the size of images open.
        bounded: whether an open batch needs an upper bound.
        antialiases: whether it has operators of antialiased resizing; products of matrices stand in for them otherwise.
        pads_heads: whether narrow queries go with wide values only behind zeros, as PyTorch's own kernels want it.
        holds_metadata: whether there is a place for it in the file; a JSON file beside it otherwise.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    suffix: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    int8_packages: ClassVar[tuple[str, ...]] = ()
    by_token: ClassVar[bool] = False
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    why_not: ClassVar[Mapping[str, str]] = {}
    dynamic_batch: ClassVar[bool] = True
    dynamic_size: ClassVar[bool] = True
    bounded: ClassVar[bool] = False
    antialiases: ClassVar[bool] = False
    pads_heads: ClassVar[bool] = False
    holds_metadata: ClassVar[bool] = True

    def check(self, path: Path, precision: str, dynamic_batch: bool, dynamic_size: bool) -> None:
        """Raise ExportError, before any work is done, for what this format cannot be, or lacks here."""
        if path.suffix != self.suffix:
            raise ExportError(f"'{path}' does not end in {self.suffix}, which files of {self.title} do")
        if precision not in DTYPES:
            raise ExportError(f"unknown precision {precision!r}; choose from {', '.join(DTYPES)}")
        if precision not in self.precisions:
            why = self.why_not.get(precision, "its converter has no such files")
            raise ExportError(f"{self.title} is not written in {precision}: {why}; choose {_or(self.precisions)}")
        if dynamic_batch and not self.dynamic_batch:
            raise ExportError(
                f"a file of {self.title} holds batches of one size: give dynamic_batch=False and batch_size (--batch N)"
            )
        if dynamic_size and not self.dynamic_size:
            raise ExportError(f"a file of {self.title} holds images of one size: leave dynamic_size out")
        for packages, extra in ((self.packages, self.extra), (self.int8_packages, "int8")):
            missing = [package for package in packages if find_spec(package) is None]
            if missing and (extra != "int8" or precision == "int8"):
                raise ExportError(f"{self.title} needs {_and(missing)}: pip install 'comcat[{extra}]'")

    def traced_dtype(self, precision: str) -> torch.dtype:
        """In which the model is traced, where the precision is in the graph; float32 where it is set on writing."""
        return DTYPES[precision]

    def quantized(self, flat: FlatModel, int8: Int8) -> FlatModel:
        """The model to be traced for int8, where quantizing comes before the graph."""
        return flat

    @abstractmethod
    def write(
        self, traced: Traced, path: Path, precision: str, metadata: Mapping[str, str], int8: Int8 | None = None
    ) -> None:
        """Write the file, with whatever files belong to it beside it; may raise anything."""

    @abstractmethod
    def opened(self, path: Path, precision: str) -> Run | None:
        """The file, ready to run; None where it cannot run on this machine."""

    def notes(self) -> list[str]:
        """What the user must know of every file of this format that is written here."""
        return []


def _or(words: Sequence[str]) -> str:
    return " or ".join(words)


def _and(words: Sequence[str]) -> str:
    return " and ".join(words)


def static_shape(shape: Sequence[Any]) -> list[int]:
    """A shape in which -1 is any size."""
    return [n if isinstance(n, int) else -1 for n in shape]
