"""``comcat export``: a model as a file of another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as opt
from .console import Screen, command
from .inputs import Reading, check_input_file, parse_model_args

if TYPE_CHECKING:
    from ..exporting.exporter import ExportReport

FORMATS = "onnx|openvino|torch|executorch|litert|coreml"
FILE = "File"


@command
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
        str, opt.Option(metavar="fp32|fp16|bf16", help="Of weights and arithmetic.", rich_help_panel=FILE)
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
    checkpoint: opt.Checkpoint = None,
    model_arg: opt.ModelArgs = None,
    data: opt.OptionalData = None,
    split: Annotated[
        str | None,
        opt.Option(help="Split of the images to compare outputs on.", rich_help_panel=opt.DATA),
    ] = None,
    data_root: opt.DataRoot = None,
    class_map: opt.ClassMap = None,
    skip_bad_images: opt.SkipBad = False,
    mean: opt.Mean = None,
    std: opt.Std = None,
    crop_pct: opt.CropPct = None,
    interpolation: opt.Interpolation = None,
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
    screen = Screen(json_output)
    with screen:
        import comcat

        from ..data import loader
        from ..exporting.exporter import check_request
        from ..exporting.parity import MOST_COMPARED

        check_input_file(checkpoint, "--checkpoint")
        check_request(out, to, precision, batch is None, dynamic_size, overwrite)
        loaded = comcat.load_model(model, checkpoint=checkpoint, model_args=args)
        given = (mean, std, crop_pct, interpolation)
        images = None
        if data is not None or any(value is not None for value in given):
            reading = Reading(data or "", data_root, class_map, skip_bad_images, *given)
            config = reading.configure(loaded)
            if data is not None:
                images = loader(reading.open(split, "evaluation", config, None), MOST_COMPARED, 0, MOST_COMPARED)
        report = comcat.export(
            loaded,
            out,
            to,
            precision,
            dynamic_batch=batch is None,
            dynamic_size=dynamic_size,
            batch_size=batch or 1,
            tolerance=tolerance,
            images=images,
            overwrite=overwrite,
            progress=screen.progress,
        )
    say(screen, report)
    screen.result(report.to_dict())


def say(screen: Screen, report: ExportReport) -> None:
    """The report in words."""
    from ..report.format import size

    takes = ", ".join(f"{name} ({' x '.join(map(str, shape))})" for name, shape in report.inputs.items())
    gives = ", ".join(f"{name} ({' x '.join(map(str, shape))})" for name, shape in report.outputs.items())
    screen.done(f"{report.precision}, {size(report.bytes)}, {takes} to {gives}: ", (report.path, "bold"))
    if report.relative is not None and report.absolute is not None:
        kind = "images" if report.real else "random images"
        screen.say(
            f"differs from PyTorch in fp32 by at most {report.absolute:.2g}, {report.relative:.2g} of the largest "
            f"output ({report.tolerance:.2g} allowed), on {report.images} {kind}"
        )
    for note in report.notes:
        screen.note(note)
