"""Exporting: a model is traced, written beside its final name, run there, compared with PyTorch, and then named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import ExportError
from ..layers.base import check_finite
from ..models.opening import load_model
from ..models.running import still
from ..models.wrappers import check_plain
from ..progress import Progress
from .export_subject import ExportSubject
from .file_format import FileFormat
from .file_metadata import SIDECAR, as_text, describe_file
from .formats import file_format
from .int8_choice import Int8
from .parity import MOST_COMPARED, TOLERANCES, given_images
from .publishing import check_target, publish, staged
from .quiet import quiet
from .tracing import MOST_IMAGES, Traced, blaming

#: Images that int8 is calibrated on.
CALIBRATION = 256
#: Largest divergence of int8 by default. See benchmarks/int8.py for what that costs.
INT8_TOLERANCE = 0.001
#: How often an int8 file is written until it is within its tolerance.
_ATTEMPTS = 4


@dataclass(frozen=True)
class ExportReport:
    """A file, and what it was found to compute.

    Attributes:
        format, path, bytes: of the file, with those that belong to it.
        precision: fp32, fp16, bf16 or int8.
        inputs, outputs: name -> shape, with ``"batch"``, ``"height"`` and ``"width"`` for axes of any size.
        absolute, relative: the largest difference from the model in float32 under PyTorch, the second in units of the
            largest value of its output; None where the file cannot run on this machine.
        tolerance: that ``relative`` was held to; images: how many were compared; batches: in batches of these sizes.
        real: whether they were given, or random.
        weights_only: of int8, the layers of int8 weights that compute in float; floats: those that stayed float;
            divergence: how far its outputs are from those of the model on the calibration images, in nats an image for
            classes, otherwise in the unit of :func:`comcat.evaluation.outputs.divergence`.
        notes: what the user must know, such as what was not checked.
    """

    format: str
    path: str
    bytes: int
    precision: str
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]
    absolute: float | None
    relative: float | None
    tolerance: float
    images: int
    batches: tuple[int, ...]
    real: bool
    weights_only: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()
    divergence: float | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def export(
    model: nn.Module | str | Path,
    path: str | Path,
    to: str = "onnx",
    precision: str = "fp32",
    *,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    batch_size: int = 1,
    input_size: Sequence[int] | None = None,
    tolerance: float | None = None,
    int8_tolerance: float = INT8_TOLERANCE,
    images: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a model to a file of another runtime, after the file has been found to compute the same.

    Inputs are float32 and normalized as the file's metadata says, outputs float32, in every precision.

    Args:
        model: dense or compressed, of any library that comcat opens; or what :func:`comcat.load_model` takes. It is
            not changed.
        path: of the file, with the format's ending; OpenVINO writes its weights beside it.
        to: ``onnx`` (.onnx), ``openvino`` (.xml), ``torch`` (.pt2), ``executorch`` (.pte), ``litert`` (.tflite) or
            ``coreml`` (.mlpackage).
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``; not every format has them all. ``int8`` quantizes after
            training and needs ``images`` to calibrate on.
        dynamic_batch: take batches of any size; otherwise of ``batch_size`` images.
        dynamic_size: take images of any size that the model takes.
        input_size: (C, H, W) of the images, default the model's own.
        tolerance: largest difference from PyTorch in float32, in units of the largest output;
            :data:`comcat.exporting.parity.TOLERANCES` by default.
        int8_tolerance: largest divergence of an int8 file's outputs by simulation, on the calibration images; layers
            compute in float until it is met, those first that cost most per weight, with int8 weights where they can
            (:mod:`comcat.exporting.int8_choice`).
        images: to compare the outputs on: (N, C, H, W) or batches, normalized; random ones by default. For ``int8``,
            the first 256 are calibrated on.
        overwrite: replace a file of that name.
        progress: called as ``progress("export", steps done, steps in all)``.

    Raises:
        ExportError: the format's package is missing (the message has the pip line); it has no such precision or open
            axis; an operator that it does not know (named, with the layer); or the file computes something else than
            the model. Nothing is written then.
        CheckpointError: the file cannot be written, or is there already.
        ModelError: a wrapped or quantized model, non-finite weights, or images that it does not take.
    """
    path = Path(path)
    target = check_request(path, to, precision, dynamic_batch, dynamic_size, overwrite)
    allowed = TOLERANCES[precision] if tolerance is None else tolerance
    with staged(path) as stage:
        model = load_model(str(model)) if isinstance(model, (str, Path)) else model
        check_plain(model)
        check_finite(model)
        tell = progress or (lambda *_: None)
        with still(model):
            batch = None if dynamic_batch else batch_size
            subject = ExportSubject(model, target, precision, batch, input_size, dynamic_size)
            pixels = given_images(images, subject.size, CALIBRATION if precision == "int8" else MOST_COMPARED)
            file = stage / path.name
            metadata = describe_file(model, subject.config, to, precision)
            written = _written_int8 if precision == "int8" else _written
            made = written(subject, file, metadata, pixels, int8_tolerance, tell)
            found, batches = subject.compared(made.traced, file, pixels)
        traced, notes, int8, lost = made.traced, made.notes, made.int8, made.divergence
        if found is None:
            notes.append(f"not compared with PyTorch: files of {target.title} do not run on this machine")
        elif not found.relative <= allowed:
            raise ExportError(
                f"the file would compute something else than the model: output '{found.output}' differs by "
                f"{found.relative:.2g} of its largest value, which is more than {allowed:.2g}; nothing was written. "
                "Give a larger tolerance (--tolerance) if that is good enough, or another precision or format"
            )
        size = sum(one.stat().st_size for one in stage.rglob("*") if one.is_file())
        publish(stage, path, overwrite)
        tell("export", 3, 3)
    return ExportReport(
        format=to,
        path=str(path),
        bytes=size,
        precision=precision,
        inputs=traced.inputs,
        outputs=traced.outputs,
        absolute=found.absolute if found else None,
        relative=found.relative if found else None,
        tolerance=allowed,
        images=sum(batches) if found else 0,
        batches=batches if found else (),
        real=pixels is not None,
        weights_only=int8.weights_only if int8 else (),
        floats=int8.floats if int8 else (),
        divergence=lost,
        notes=notes,
    )


def check_request(
    path: Path, to: str, precision: str, dynamic_batch: bool, dynamic_size: bool, overwrite: bool
) -> FileFormat:
    """The format, if such a file can be written; :func:`export` asks first, before there is a model."""
    target = file_format(to)
    target.check(path, precision, dynamic_batch, dynamic_size)
    check_target(path, overwrite)
    return target


class _Made(NamedTuple):
    """A file that was written, for whichever reason with what notes."""

    traced: Traced
    notes: list[str]
    int8: Int8 | None = None
    divergence: float | None = None


def _written(subject: ExportSubject, file: Path, metadata: dict[str, Any], *_: Any) -> _Made:
    """A file of floats."""
    traced = subject.trace()
    return _Made(traced, _write(subject.target, traced, file, metadata))


def _written_int8(
    subject: ExportSubject,
    file: Path,
    metadata: dict[str, Any],
    pixels: torch.Tensor | None,
    tolerance: float,
    tell: Progress,
) -> _Made:
    """An int8 file within the tolerance.

    Runtimes quantize otherwise than the simulation does: where the file diverges by more, the simulation is held to as
    much less, a few times.
    """
    choice, held = subject.choice(pixels, tell), tolerance
    for _ in range(_ATTEMPTS):
        int8 = choice.within(held)
        traced = subject.trace(int8)
        layers = {"weights_only_layers": list(int8.weights_only), "float_layers": list(int8.floats)}
        notes = _write(subject.target, traced, file, metadata | layers, int8)
        lost = subject.divergence(file, int8)
        if lost <= tolerance or not int8.divergence:
            break
        held = 0.8 * int8.divergence * tolerance / lost
    if lost > tolerance:
        raise ExportError(
            f"the outputs of the file diverge by {lost:.2g}, and {tolerance:.2g} is allowed, with "
            f"{len(int8.weights_only + int8.floats)} layers that compute in float: give a larger int8_tolerance "
            "(--int8-tolerance)"
        )
    return _Made(traced, notes, int8, lost)


def _write(
    target: FileFormat, traced: Traced, file: Path, metadata: dict[str, Any], int8: Int8 | None = None
) -> list[str]:
    """Write the file with its metadata; what there is to say of it."""
    notes = target.notes()
    if "preprocessing" not in metadata:
        notes.append("the model does not say how its images are normalized, and so the file does not")
    if target.bounded and traced.open_batch:
        notes.append(f"{target.title} plans its memory ahead: batches of up to {MOST_IMAGES} images")
    metadata |= {"inputs": traced.inputs, "outputs": traced.outputs}
    with quiet(), blaming(traced.program, target.title):
        target.write(traced, file, metadata["precision"], as_text(metadata), int8)
    if not target.holds_metadata:
        sidecar = file.with_name(file.name + SIDECAR)
        sidecar.write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
        notes.append(f"{target.title} has no place for metadata: it is in '{sidecar.name}' beside the file")
    return notes
