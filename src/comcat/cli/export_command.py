"""``comcat export``: a model as a file of another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as opt
from .config_options import reads_images
from .console import Screen, command
from .inputs import Reading, ReadingOf, check_input_file, parse_model_args

if TYPE_CHECKING:
    from ..exporting.exporter import ExportReport

FORMATS = "onnx|openvino|torch|executorch|litert|coreml"
FILE = "File"
INT8 = "Int8 and accuracy"


@command
@reads_images
def export(
    model: opt.Model,
    to: Annotated[str, opt.Option(metavar=FORMATS, help="Format of the file.", rich_help_panel=FILE)],
    out: Annotated[
        Path,
        opt.Option(
            metavar="F",
            help="File to write: .onnx, .xml (OpenVINO), .pt2 (torch), .pte, .tflite or .mlpackage.",
            rich_help_panel=FILE,
        ),
    ],
    precision: Annotated[
        str,
        opt.Option(metavar="fp32|fp16|bf16", help="Of weights and arithmetic; int8 is --int8.", rich_help_panel=FILE),
    ] = "fp32",
    batch: Annotated[
        int | None,
        opt.Option(min=1, metavar="N", help="Batches of N images; of any number otherwise.", rich_help_panel=FILE),
    ] = None,
    dynamic_size: Annotated[
        bool,
        opt.Option("--dynamic-size", help="Take images of any size that the model takes.", rich_help_panel=FILE),
    ] = False,
    tolerance: Annotated[
        float | None,
        opt.Option(
            min=0.0,
            metavar="F",
            help="Largest difference from PyTorch, as a fraction of the largest output; 1e-4 for fp32, 0.02 for fp16, "
            "0.1 for bf16.",
            rich_help_panel=FILE,
        ),
    ] = None,
    int8: Annotated[
        bool,
        opt.Option("--int8", help="Quantize, calibrated on images of --data.", rich_help_panel=INT8),
    ] = False,
    int8_tolerance: Annotated[
        float | None,
        opt.Option(
            min=0.0,
            metavar="F",
            help="Largest divergence of the outputs (nats an image, of classes); layers compute in float until it is "
            "met. 0.001.",
            rich_help_panel=INT8,
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        opt.Option(
            "--evaluate",
            metavar="DATA",
            help="Measure the accuracy of model and file there.",
            rich_help_panel=INT8,
        ),
    ] = None,
    eval_split: opt.EvalSplit = None,
    eval_images: opt.EvalImages = None,
    checkpoint: opt.Checkpoint = None,
    model_arg: opt.ModelArgs = None,
    data: opt.OptionalData = None,
    split: Annotated[
        str | None,
        opt.Option(help="Split of --data; train for --int8, if there is one.", rich_help_panel=opt.DATA),
    ] = None,
    reading_of: ReadingOf = Reading,
    batch_size: opt.BatchSize = 64,
    workers: opt.Workers = None,
    seed: opt.Seed = 0,
    overwrite: opt.Overwrite = False,
    json_output: opt.Json = False,
) -> None:
    """Write MODEL as a file of another runtime, checked against PyTorch.

    The file takes float32 images, normalized as its metadata says, and puts out float32. Its outputs are compared with
    PyTorch's on images of DATA, or on random ones; where they differ by more than the tolerance, nothing is written.

    [dim]comcat export deit-half --to onnx --out deit-half.onnx[/dim]
    """
    args = parse_model_args(model_arg)
    if split is not None and data is None:
        raise typer.BadParameter("belongs to --data", param_hint="--split")
    int8 = int8 or precision == "int8"
    if int8 and precision not in ("fp32", "int8"):
        raise typer.BadParameter("is a precision of its own", param_hint="--int8")
    if int8 and data is None:
        raise typer.BadParameter("give --data DATA to calibrate on", param_hint="--int8")
    if int8_tolerance is not None and not int8:
        raise typer.BadParameter("belongs to --int8", param_hint="--int8-tolerance")
    if (eval_split or eval_images) and evaluate is None:
        raise typer.BadParameter("belongs to --evaluate", param_hint="--eval-split")
    screen = Screen(json_output)
    with screen:
        import torch

        import comcat

        from ..data import calibration_batches, loader
        from ..evaluation.measure import evaluate as measure
        from ..exporting.exporter import CALIBRATION, INT8_TOLERANCE, check_request
        from ..exporting.file_model import FileModel
        from ..exporting.parity import MOST_COMPARED

        check_input_file(checkpoint, "--checkpoint")
        precision = "int8" if int8 else precision
        target = check_request(out, to, precision, batch is None, dynamic_size, overwrite)
        torch.manual_seed(seed)
        loaded = comcat.load_model(model, checkpoint=checkpoint, model_args=args)
        reading = reading_of(data or evaluate or "")
        config = reading.configure(loaded) if data or evaluate or reading != Reading(reading.data) else {}
        images = tested = None
        if data is not None:
            opened = reading.open(split, "calibration" if int8 else "evaluation", config, None)
            count = min(CALIBRATION, len(opened) or CALIBRATION) if int8 else MOST_COMPARED
            images = (
                calibration_batches(opened, count, batch_size, seed, workers)
                if int8
                else loader(opened, count, 0, count)
            )
        if evaluate is not None:
            labelled = reading_of(evaluate).open_labelled(eval_split, config, loaded, screen)
            tested = loader(labelled, batch_size, workers, eval_images)
        most = INT8_TOLERANCE if int8_tolerance is None else int8_tolerance
        report = comcat.export(
            loaded,
            out,
            to,
            precision,
            dynamic_batch=batch is None,
            dynamic_size=dynamic_size,
            batch_size=batch or 1,
            tolerance=tolerance,
            int8_tolerance=most,
            images=images,
            overwrite=overwrite,
            progress=screen.progress,
        )
        measured = {}
        if tested is not None:
            made = FileModel(out, target, precision, list(report.outputs), batch, loaded)
            measured["model"] = measure(loaded, tested, progress=screen.stage("evaluate the model"))
            measured["file"] = measure(made, tested, progress=screen.stage("evaluate the file"))
    say(screen, report, most)
    for name, found in measured.items():
        scores = ", ".join(f"{figure.label} {figure.shown()}" for figure in found.figures())
        screen.say(f"{name}: {scores}, on {found.images} images")
    screen.result(
        {**report.to_dict(), "evaluation": {name: found.to_dict() for name, found in measured.items()} or None}
    )


def say(screen: Screen, report: ExportReport, allowed: float) -> None:
    """The report in words; ``allowed``: the largest divergence of an int8 file."""
    from ..report.format import size

    takes = ", ".join(f"{name} ({' x '.join(map(str, shape))})" for name, shape in report.inputs.items())
    gives = ", ".join(f"{name} ({' x '.join(map(str, shape))})" for name, shape in report.outputs.items())
    screen.done(f"{report.precision}, {size(report.bytes)}, {takes} to {gives}: ", (report.path, "bold"))
    if report.relative is not None and report.absolute is not None:
        kind = "images" if report.real else "random images"
        found = f"differs from PyTorch in fp32 by at most {report.absolute:.2g}, {report.relative:.2g} of the largest "
        found += f"output ({report.tolerance:.2g} allowed)"
        found = found if report.absolute else "computes exactly what PyTorch does in fp32"
        screen.say(f"{found}, on {report.images} {kind}")
    if report.divergence is not None:
        kept = [(report.weights_only, "compute in float with int8 weights"), (report.floats, "stay float")]
        said = ", ".join(f"{len(layers)} layers {what}" for layers, what in kept if layers) or "every layer is int8"
        screen.say(
            f"diverges from PyTorch by {report.divergence:.2g} on the calibration images ({allowed:.2g} allowed; of "
            f"classes, nats an image); {said}"
        )
    for note in report.notes:
        screen.note(note)
