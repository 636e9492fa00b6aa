"""Sessions of many small models (:mod:`comcat.runtimes.layer_stacks`), written side by side and taken apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._version import __version__
from ..exporting.file_format import FileFormat
from ..exporting.flat_model import FlatModel
from ..exporting.formats import file_format
from ..exporting.int8_choice import Int8
from ..exporting.quiet import quiet
from ..exporting.tracing import blaming, trace
from ..models.example import Example
from ..models.modes import layers_called
from ..nn.low_rank_attention import unpadded
from .layer_stacks import LayerCall, Side, stack_of
from .registry import FORMATS, held_precision, session
from .sessions import Session

if TYPE_CHECKING:
    from ..layers.base import Choice, Layer

#: Stacks, and parameters, that go into one file.
_MOST_STACKS, _MOST_PARAMS = 16, 1 << 27


def stack_sessions(
    layer: Layer,
    choices: Sequence[Choice],
    call: LayerCall,
    runtime: str,
    precision: str,
    threads: int | None,
    folder: Path,
) -> Iterator[Session]:
    """A session for every choice of a layer's widths, in order.

    Args:
        folder: to write files to.
    """
    if runtime not in FORMATS:
        for choice in choices:
            yield session(stack_of(layer, choice, call), runtime, precision, threads)
        return
    size = sum(p.numel() for p in layer.module.parameters()) or 1
    count = max(1, min(_MOST_STACKS, _MOST_PARAMS // size))
    for start in range(0, len(choices), count):
        stacks = [stack_of(layer, choice, call) for choice in choices[start : start + count]]
        target = file_format(FORMATS[runtime])
        file = folder / f"side-{start}{target.suffix}"
        _write(Side(stacks), call, target, held_precision(runtime, precision), file)
        for part in _parts(file, len(stacks)):
            yield session(part, runtime, precision, threads)
        for written in folder.glob(f"{file.stem}*"):
            written.unlink()


def _write(side: nn.Module, call: LayerCall, target: FileFormat, held: str, file: Path) -> None:
    flat = FlatModel(side, Example((call.x,)))
    dtype = target.traced_dtype(held)
    flat = flat if dtype == torch.float32 else flat.cast(dtype)
    with quiet(), layers_called(), unpadded():
        traced = trace(flat, len(call.x), dynamic_batch=False, dynamic_size=False)
        with blaming(traced.program, target.title):
            int8 = Int8(call.x) if held == "int8" else None
            target.write(traced, file, held, {"comcat_version": __version__}, int8)


def _parts(file: Path, count: int) -> Iterator[Path]:
    """Files with one output each, beside a file that has ``count``."""
    split = _onnx_part if file.suffix == ".onnx" else _openvino_part
    whole = _read(file)
    for i in range(count):
        path = file.with_name(f"{file.stem}-{i}{file.suffix}")
        split(whole, i, path)
        yield path


def _read(file: Path) -> Any:
    if file.suffix == ".onnx":
        import onnx.utils

        return onnx.utils.Extractor(onnx.load(str(file)))
    from .openvino_runtime import openvino_core

    return openvino_core().read_model(str(file))


def _onnx_part(whole: Any, output: int, path: Path) -> None:
    import onnx

    graph = whole.model.graph
    part = whole.extract_model([one.name for one in graph.input], [graph.output[output].name])
    onnx.save(part, str(path))


def _openvino_part(whole: Any, output: int, path: Path) -> None:
    from .openvino_runtime import openvino_module

    openvino = openvino_module()
    part = openvino.Model([whole.get_results()[output]], whole.get_parameters(), path.stem)
    openvino.save_model(part, path, compress_to_fp16=False)
