"""``comcat inspect``: which layers are low-rank, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from . import options as opt
from .config_options import reads_images
from .console import Screen, command
from .inputs import Reading, ReadingOf, check_input_file, parse_device, parse_model_args, report_skipped


@command
@reads_images
def inspect(
    model: opt.Model,
    data: opt.OptionalData = None,
    out: Annotated[Path, opt.Option(metavar="PNG", help="Picture of the energy curves.")] = Path("comcat-inspect.png"),
    checkpoint: opt.Checkpoint = None,
    model_arg: opt.ModelArgs = None,
    calibration_images: Annotated[
        int | None,
        opt.Option(metavar="N", help="Images to look at; 1024 or all.", rich_help_panel=opt.DATA),
    ] = None,
    split: Annotated[
        str | None,
        opt.Option(help="train, if there is one, otherwise.", rich_help_panel=opt.DATA),
    ] = None,
    reading_of: ReadingOf = Reading,
    batch_size: opt.BatchSize = 32,
    workers: opt.Workers = None,
    device: opt.Device = "auto",
    seed: opt.Seed = 0,
    overwrite: opt.Overwrite = False,
    json_output: opt.Json = False,
) -> None:
    """Spectra of every part of every layer of MODEL, as a table and a picture.

    With DATA the energies are those of the model's activations on its images, otherwise those of the weights.

    [dim]comcat inspect deit_small_patch16_224 --data imagenet/[/dim]
    """
    args = parse_model_args(model_arg)
    screen = Screen(json_output)
    with screen:
        import torch

        import comcat

        from ..data import calibration_batches
        from ..errors import CheckpointError
        from ..report.figures import draw_spectra
        from ..report.spectra_figure import summarize
        from ..storage.atomic import atomic_file

        if out.exists() and not overwrite:
            raise CheckpointError(f"{out} already exists. Use --overwrite or another --out")
        check_input_file(checkpoint, "--checkpoint")
        torch.manual_seed(seed)
        loaded = comcat.load_model(model, checkpoint=checkpoint, model_args=args).to(parse_device(device)).eval()
        calibration = None
        if data is not None:
            reading = reading_of(data)
            images = reading.open(split, "calibration", reading.configure(loaded), None, seed)
            batches = calibration_batches(images, calibration_images, batch_size, seed, workers)
            calibration = comcat.calibrate(loaded, batches, progress=screen.progress)
            report_skipped(screen, batches.skipped)
        summaries = summarize(comcat.spectra(loaded, calibration))
        source = f"activations on {calibration.num_images} images" if calibration else "weights alone, no images"
        with atomic_file(out, overwrite) as file:
            draw_spectra(summaries, file, f"{model}: how low-rank is it?", f"energies of the {source}")

    from ..report import tables

    screen.out.print(tables.spectra(summaries, calibration is not None))
    screen.say("written to ", (out, "bold"))
    screen.result(
        {
            "model": model,
            "data": data,
            "images": calibration.num_images if calibration else 0,
            "out": str(out),
            "spectra": [s.to_dict() for s in summaries],
        }
    )
