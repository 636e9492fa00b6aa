"""``comcat report``: a page about a compressed model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .config_options import reads_images
from .console import Screen, command
from .inputs import (
    Reading,
    ReadingOf,
    check_input_file,
    declared_classes,
    parse_device,
    parse_model_args,
    report_skipped,
)

if TYPE_CHECKING:
    from torch import nn

    from ..report.facts import Facts

DENSE = "Dense model, for spectra and changed answers"


@command
@reads_images
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What comcat compress, comcat finetune or comcat.save wrote.")
    ],
    out: Annotated[
        Path | None, opt.Option(metavar="HTML", help="File to write; report.html in DIR otherwise.", show_default=False)
    ] = None,
    dense: Annotated[
        str | None, opt.Option(metavar="MODEL", help="The model that was compressed.", rich_help_panel=DENSE)
    ] = None,
    dense_checkpoint: Annotated[
        Path | None,
        opt.Option(metavar="FILE", help="Its weights (.safetensors), for DIR's architecture.", rich_help_panel=DENSE),
    ] = None,
    dense_arg: Annotated[
        list[str] | None,
        opt.Option(metavar="NAME=VALUE", help="Argument of its architecture; repeatable.", rich_help_panel=DENSE),
    ] = None,
    calibration_file: Annotated[
        Path | None,
        opt.Option(
            "--calibration",
            metavar="FILE",
            help="Its statistics, from comcat compress: spectra are those of activations instead of weights.",
            rich_help_panel=DENSE,
        ),
    ] = None,
    bench: Annotated[
        Path | None, opt.Option(metavar="FILE", help="Times in runtimes, from comcat bench --out.", show_default=False)
    ] = None,
    outputs: Annotated[
        str | None,
        opt.Option(
            metavar="KIND",
            help="What the models return, where it cannot be told: classes, labels, values, features or maps.",
            rich_help_panel=DENSE,
        ),
    ] = None,
    no_labels: Annotated[
        bool,
        opt.Option("--no-labels", help="DATA's labels are not what the models answer.", rich_help_panel=DENSE),
    ] = False,
    data: opt.OptionalData = None,
    split: opt.EvaluatedSplit = None,
    eval_images: opt.EvalImages = None,
    reading_of: ReadingOf = Reading,
    batch_size: opt.BatchSize = 64,
    workers: opt.Workers = None,
    device: opt.Device = "auto",
    overwrite: Annotated[bool, opt.Option("--overwrite", help="Replace the file.", rich_help_panel=opt.RUN)] = False,
    json_output: opt.Json = False,
) -> None:
    """Write one self-contained HTML page about a compressed model: accuracy and cost, every layer, how it was made.

    With the dense model there are spectra; with DATA too, both are measured on it and the images on which they
    disagree are shown. The page asks the network for nothing and runs no script.

    [dim]comcat report deit-half --dense deit_small_patch16_224 --data imagenet/ --eval-images 5000[/dim]
    """
    args = parse_model_args(dense_arg)
    has_dense = dense is not None or dense_checkpoint is not None
    if not has_dense:
        needs = (("--data", data), ("--calibration", calibration_file), ("--dense-arg", args or None))
        for option, value in needs:
            if value is not None:
                raise typer.BadParameter("goes with the dense model: --dense MODEL", param_hint=option)
    screen = Screen(json_output)
    with screen:
        import comcat

        from ..calibration.statistics import Calibration
        from ..evaluation.outputs import check_kind
        from ..report.facts import read_facts
        from ..report.page import PAGE_NAME, check_page, write_report

        target = out or folder / PAGE_NAME
        check_page(target, overwrite)
        check_input_file(dense_checkpoint, "--dense-checkpoint")
        check_input_file(calibration_file, "--calibration")
        check_input_file(bench, "--bench")
        facts = read_facts(folder)
        more: dict[str, Any] = {"bench": bench}
        if has_dense:
            model = _dense(facts, dense, dense_checkpoint, args).to(parse_device(device)).eval()
            more["dense"] = model
            if calibration_file is not None:
                more["calibration"] = Calibration.load(calibration_file)
            if data is not None:
                reading = reading_of(data)
                small = comcat.load_model(str(folder))  # which knows how its images are prepared
                more |= _images(reading, small, split, batch_size, workers, eval_images)
                more |= {"small": small, "outputs": check_kind(outputs), "labelled": more["labelled"] and not no_labels}
        write_report(folder, out, overwrite=overwrite, progress=screen.progress, **more)
        if "loader" in more:
            report_skipped(screen, more["loader"].skipped)
    size = target.stat().st_size
    from ..report.format import size as shown

    screen.say("written to ", (target, "bold"), f" ({shown(size)}); open it in a browser")
    screen.result({"model": str(folder), "out": str(target), "bytes": size})


def _dense(facts: Facts, name: str | None, checkpoint: Path | None, args: dict[str, Any]) -> nn.Module:
    """The model that was compressed; of the directory's own architecture where only weights are given."""
    import comcat

    from ..errors import ModelError
    from ..models.opening import open_source

    if name is not None:
        return comcat.load_model(name, checkpoint, args)
    assert checkpoint is not None
    if facts.source is None:
        raise ModelError("a stock model does not say what it was made from: name the dense model with --dense MODEL")
    return open_source(facts.source, checkpoint, args)


def _images(
    reading: Reading,
    model: nn.Module,
    split: str | None,
    batch_size: int,
    workers: int | None,
    limit: int | None,
) -> dict[str, Any]:
    from ..data import loader

    images = reading.open(split, "evaluation", reading.configure(model), declared_classes(model) or None)
    place = f"{images.name}, split {images.split}" if images.split else images.name
    return {
        "loader": loader(images, batch_size, workers, limit),
        "labelled": images.labelled and declared_classes(model) != 0,
        "place": place,
        "names": images.class_names,
    }
