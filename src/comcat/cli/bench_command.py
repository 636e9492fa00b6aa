"""``comcat bench``: dense, compressed and quantized models side by side, in every runtime that is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .console import Screen, command
from .inputs import Reading, check_input_file, check_written_file, parse_model_args, report_skipped

if TYPE_CHECKING:
    from torch import nn

HOW = "How"
_FILES = (".onnx", ".xml")
_OTHERS = (".pt2", ".pte", ".tflite", ".mlpackage")


@command
def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...",
            help="Saved models, names of models, and exported files (.onnx, .xml), such as quantized ones.",
        ),
    ],
    dense: Annotated[
        str | None,
        opt.Option(
            metavar="MODEL",
            help="What the others are compared with; otherwise the architecture that the first directory was made "
            "from, with random weights.",
            rich_help_panel=opt.MODEL,
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        opt.Option(
            "--dense-checkpoint",
            "--checkpoint",
            metavar="FILE",
            help="Its weights (.safetensors), for an architecture.",
            rich_help_panel=opt.MODEL,
        ),
    ] = None,
    model_arg: Annotated[
        list[str] | None,
        opt.Option(
            "--dense-arg",
            "--model-arg",
            metavar="NAME=VALUE",
            help="Argument of its architecture; repeatable.",
            rich_help_panel=opt.MODEL,
        ),
    ] = None,
    runtime: Annotated[
        list[str] | None,
        opt.Option(
            metavar="NAME[,NAME...]",
            help="torch, torch-compile, onnxruntime or openvino, repeatable; all that are installed.",
            rich_help_panel=HOW,
        ),
    ] = None,
    precision: Annotated[
        str, opt.Option(metavar="P[,P...]", help="fp32, bf16, fp16, of what is not quantized.", rich_help_panel=HOW)
    ] = "fp32",
    batch: Annotated[str, opt.Option(metavar="N[,N...]", help="Images in a batch.", rich_help_panel=HOW)] = "1,8",
    threads: Annotated[
        int | None,
        opt.Option(min=1, metavar="N", help="Of every runtime; what each takes by itself.", rich_help_panel=HOW),
    ] = None,
    rounds: Annotated[
        int, opt.Option(min=1, metavar="N", help="Turns of every model; fewer after a minute.", rich_help_panel=HOW)
    ] = 15,
    out: Annotated[
        Path | None, opt.Option(metavar="FILE", help="Also write the figures as JSON.", rich_help_panel=opt.RUN)
    ] = None,
    picture: Annotated[
        Path | None,
        opt.Option(
            metavar="FILE",
            help="Also draw them: accuracy against latency with --data, else speed-up against MACs (PNG).",
            rich_help_panel=opt.RUN,
        ),
    ] = None,
    data: opt.OptionalData = None,
    split: Annotated[
        str | None, opt.Option(help="validation, val or test otherwise.", rich_help_panel=opt.DATA)
    ] = None,
    eval_images: opt.EvalImages = None,
    data_root: opt.DataRoot = None,
    class_map: opt.ClassMap = None,
    skip_bad_images: opt.SkipBad = False,
    mean: opt.Mean = None,
    std: opt.Std = None,
    crop_pct: opt.CropPct = None,
    interpolation: opt.Interpolation = None,
    batch_size: opt.BatchSize = 64,
    workers: opt.Workers = None,
    json_output: opt.Json = False,
) -> None:
    """Time models against the dense one, in turns over all of them and all runtimes.

    [dim]comcat bench deit-half deit-half-int8.onnx --dense deit_small_patch16_224 --picture bench.png[/dim]
    """
    args = parse_model_args(model_arg)
    batches = _numbers(batch)
    precisions = [part.strip() for part in precision.split(",") if part.strip()]
    screen = Screen(json_output)
    with screen:
        import comcat

        from ..report.style import check_drawing
        from ..runtimes.registry import check_precisions, session_class

        asked = [name.strip() for names in runtime or () for name in names.split(",")]
        runtimes = list(dict.fromkeys(asked)) or None
        for name in runtimes or ():
            session_class(name)
        check_precisions(precisions)
        check_input_file(checkpoint, "--dense-checkpoint")
        check_written_file(out, "--out", ".json")
        check_written_file(picture, "--picture", ".png")
        if picture is not None:
            check_drawing()
        found = _models(models, dense, checkpoint, args, trained=data is not None, screen=screen)
        loader: Any = None
        if data is not None:
            from ..data import loader as reader

            modules = [one for one in found.values() if not isinstance(one, Path)]
            # A compressed one knows how its images are prepared, which options may have said when it was made.
            first = next((one for one in modules if _is_compressed(one)), modules[0])
            reading = Reading(data, data_root, class_map, skip_bad_images, mean, std, crop_pct, interpolation)
            images = reading.open_labelled(split, reading.configure(first), first, screen)
            loader = reader(images, batch_size, workers, eval_images)
        measured = comcat.bench(
            found, runtimes, precisions, batches, threads, rounds, loader=loader, progress=screen.progress
        )
    if loader is not None:
        report_skipped(screen, loader.skipped)
    for text in measured.left_out:
        screen.note(f"left out: {text}")

    from ..report.bench_table import bench_tables

    screen.out.print(bench_tables(measured))
    for path, write in ((out, measured.save), (picture, measured.draw)):
        if path is not None:
            write(path)
            screen.say("written to ", (path, "bold"))
    screen.result(measured.to_dict())


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise typer.BadParameter(f"{text!r} is no list of numbers such as 1,8", param_hint="--batch")
    return found


def _models(
    names: list[str], dense: str | None, checkpoint: Path | None, args: dict[str, Any], trained: bool, screen: Screen
) -> dict[str, nn.Module | Path]:
    """What is compared, by name, the dense model first."""
    import comcat

    from ..errors import ModelError
    from ..models.source import recorded_source

    paths = [Path(name) for name in names]
    for path in paths:
        if path.suffix in _OTHERS and path.exists():
            raise ModelError(
                f"'{path}' is not timed here: a bench runs {' and '.join(_FILES)} files, and models as they are. Give "
                "the directory that it was made from"
            )
        if path.suffix in _FILES and not path.is_file():
            raise ModelError(f"there is no file '{path}'. Correct the name, or write it with comcat export")
    found: dict[str, nn.Module | Path] = {}
    for name, path in zip(names, paths, strict=True):
        label = name.rstrip("/").rpartition("/")[2] or name
        label = label if label not in found else name
        if path.suffix in _FILES:
            found[label] = path
        else:
            found[label] = comcat.load_model(name, pretrained=trained or path.is_dir())
    if dense is not None:
        is_there = trained or Path(dense).is_dir() or checkpoint is not None
        first = comcat.load_model(dense, checkpoint=checkpoint, model_args=args, pretrained=is_there)
        return _after(first, found)
    modules = [one for one in found.values() if not isinstance(one, Path)]
    compressed = [one for one in modules if _is_compressed(one)]
    if compressed and len(compressed) == len(modules) and not trained:
        source = recorded_source(compressed[0])
        if source is not None:
            screen.note("the dense model is its architecture with random weights, for its time alone")
            return _after(source.build(), found)
    if trained and not modules:
        raise ModelError("exported files do not say how their images are prepared here: give --dense MODEL too")
    if len(modules) > len(compressed):  # a dense one among them is what the others are compared with
        base = next(n for n, one in found.items() if not isinstance(one, Path) and not _is_compressed(one))
        return {base: found[base], **found}
    return found


def _is_compressed(model: nn.Module) -> bool:
    made: Any = getattr(model, "comcat", None)
    return made is not None and bool(made.plan.layers)


def _after(dense: nn.Module, others: dict[str, nn.Module | Path]) -> dict[str, nn.Module | Path]:
    """The dense model before the others, under a name that none of them has."""
    name = "dense"
    while name in others:
        name += ", given"
    return {name: dense, **others}
