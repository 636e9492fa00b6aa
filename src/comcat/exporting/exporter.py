"""Exporting: a model is traced, written beside its final name, run there, compared with PyTorch, and then named."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import ExportError
from ..layers.base import check_finite
from ..models.example import Example, example_for, of_any_size
from ..models.modes import copied
from ..models.opening import load_model
from ..models.preprocessing import said_config
from ..models.profile import default_input_size, image_size
from ..models.running import explained, still
from ..models.wrappers import check_plain
from ..nn.low_rank_attention import unpadded
from ..progress import Progress
from ..wording import by
from .file_format import FileFormat
from .file_metadata import SIDECAR, as_text, describe_file
from .file_model import FileModel
from .flat_model import FlatModel
from .formats import file_format
from .int8_choice import FloatChoice, Int8, diverging
from .parity import MOST_COMPARED, TOLERANCES, Deviation, arrays, batches_of, calls, compare, given_images, reference
from .publishing import check_target, publish, staged
from .resampling import products_for_resizing
from .tracing import MOST_IMAGES, Traced, blaming, check_takes, trace

#: Images that int8 is calibrated on.
CALIBRATION = 256
#: Largest divergence of int8 by default. See benchmarks/int8.py for what that costs.
INT8_TOLERANCE = 0.001
#: How often an int8 file is written until it is within its tolerance.
_ATTEMPTS = 4
#: Images of the example that an open batch is traced with; no batch of the parity check has so many.
_TRACED = 3


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
            divergence: how far its outputs are from those of the model on
            the calibration images, in nats an image for classes, otherwise in the unit of
            :func:`comcat.evaluation.outputs.divergence`.
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
            subject = _Subject(model, target, precision, batch, input_size, dynamic_size)
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


def _written(subject: _Subject, file: Path, metadata: dict[str, Any], *_: Any) -> _Made:
    """A file of floats."""
    traced = subject.trace()
    return _Made(traced, _write(subject.target, traced, file, metadata))


def _written_int8(
    subject: _Subject,
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


class _Subject:
    """A model that is exported, and what it is compared on.

    Attributes:
        flat: in float32 on the CPU, a copy.
        batch: images in every batch; None leaves their number open.
        size: (C, H, W); open_size: whether images of other sizes are taken too.
        config: what the model says of its images.
    """

    def __init__(
        self,
        model: nn.Module,
        target: FileFormat,
        precision: str,
        batch: int | None,
        size: Sequence[int] | None,
        open_size: bool,
    ) -> None:
        self.target, self.precision, self.batch, self.open_size = target, precision, batch, open_size
        self.size = image_size(size or default_input_size(model))
        self.config = said_config(model)
        with torch.inference_mode(False):
            self.copy = copied(model).cpu().float().eval().requires_grad_(False)
        self.example = example_for(self.copy, self.size, batch or _TRACED, seed=0)
        if open_size:
            self.example = of_any_size(self.example, self.copy)
        with explained(self.example.pixels), quiet():
            self.flat = FlatModel(self.copy, self.example)

    def choice(self, images: torch.Tensor | None, progress: Progress) -> FloatChoice:
        """What stays float, to be chosen on these images."""
        if images is None:
            raise ExportError("int8 needs images to calibrate on: give images (--data)")
        if len(self.flat.input_names) > 1:
            names = ", ".join(self.flat.input_names)
            raise ExportError(f"int8 files are of models that take images alone, and this one takes {names}")
        return FloatChoice(self.copy, images, self.target.by_token, progress)

    def divergence(self, file: Path, int8: Int8) -> float:
        """Of the file's outputs from the model's, on the calibration images."""
        made = FileModel(file, self.target, self.precision, self.flat.output_names, self.batch, self.copy)
        return diverging(self.copy, made, int8.images)

    def trace(self, int8: Int8 | None = None) -> Traced:
        """The graph that the format is written from."""
        dtype = self.target.traced_dtype(self.precision)
        flat = self.flat if dtype == torch.float32 else self.flat.cast(dtype)
        if int8 is not None:
            flat = self.target.quantized(flat, int8)
        with quiet(), nullcontext() if self.target.pads_heads else unpadded():
            traced = trace(flat, self.example.images, self.batch is None, self.open_size, self.target.bounded)
            if self.open_size:
                check_takes(traced, flat.given(self._other_size(traced)))
        return traced if self.target.antialiases else replace(traced, program=products_for_resizing(traced.program))

    def compared(
        self, traced: Traced, file: Path, pixels: torch.Tensor | None
    ) -> tuple[Deviation | None, tuple[int, ...]]:
        """How far the outputs of the file are from the model's, and the batches that show it."""
        batches = batches_of(self.batch)
        examples = calls(self.copy, self.size, batches, pixels, self.config)
        if self.open_size:
            examples.append(self._other_size(traced))
            batches += (1,)
        wanted = reference(self.flat, examples)
        with quiet(), blaming(traced.program, self.target.title, "run"):
            run = self.target.opened(file, self.precision)
            if run is None:
                return None, batches
            got = [run(batch) for batch in arrays(self.flat, examples)]
        return compare(self.flat.output_names, wanted, got), batches

    def _other_size(self, traced: Traced) -> Example:
        """A call of the model with images of another size, along every axis that the graph leaves open."""
        channels, height, width = self.size
        axes = next(shape[-2:] for shape in traced.inputs.values() if any(isinstance(n, str) for n in shape[1:]))
        for higher, wider in ((32, 64), (64, 32), (height, width)):  # multiples of usual patches, and of any
            sizes = {"height": height + higher, "width": width + wider}
            size = channels, *(sizes[axis] if isinstance(axis, str) else axis for axis in axes)
            example = example_for(self.copy, size, 1, seed=9)
            with suppress(ExportError):
                reference(self.flat, [example])
                return example
        raise ExportError(
            f"the model takes no images but those of {by(self.size)}: leave dynamic_size out (--dynamic-size); models "
            "of timm take others with dynamic_img_size=True (--model-arg)"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Converters speak of their own insides, which says nothing to who exports a model."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
