"""``comcat compress``: from a trained model to a small one on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as opt
from .console import Screen, command
from .inputs import Reading, check_input_file, parse_count, parse_device, parse_model_args

if TYPE_CHECKING:
    from ..plan import Budget

BUDGET = "Budget (one of these)"
HOW = "How"


@command
def compress(
    model: opt.Model,
    out: Annotated[Path, opt.Option(metavar="DIR", help="Directory to write the small model to.")],
    data: opt.OptionalData = None,
    keep: Annotated[
        float | None, opt.Option(metavar="F", help="Fraction of the parameters.", rich_help_panel=BUDGET)
    ] = None,
    keep_macs: Annotated[
        float | None, opt.Option(metavar="F", help="Fraction of the MACs.", rich_help_panel=BUDGET)
    ] = None,
    max_params: Annotated[
        str | None, opt.Option(metavar="N", help="Parameters, e.g. 11M.", rich_help_panel=BUDGET)
    ] = None,
    max_macs: Annotated[
        str | None, opt.Option(metavar="N", help="MACs of one image, e.g. 2.3G.", rich_help_panel=BUDGET)
    ] = None,
    of: Annotated[
        str,
        opt.Option(
            metavar="model|parts",
            help="Whether the budget is of the whole model or of the compressed parts only.",
            rich_help_panel=BUDGET,
        ),
    ] = "model",
    method: Annotated[
        str | None,
        opt.Option(
            metavar="probe|spectrum|uniform",
            help="How ranks are chosen; probe with images, uniform without.",
            rich_help_panel=HOW,
        ),
    ] = None,
    parts: Annotated[
        str, opt.Option(help="Parts to compress, of qk, vo, ffn and head.", rich_help_panel=HOW)
    ] = "qk,vo,ffn,head",
    rank_multiple: Annotated[
        int,
        opt.Option(min=1, metavar="N", help="Round ranks to multiples of N (8 for GPUs).", rich_help_panel=HOW),
    ] = 1,
    plan_file: Annotated[
        Path | None,
        opt.Option("--plan", metavar="FILE", help="Apply this plan instead of making one.", rich_help_panel=HOW),
    ] = None,
    calibration_images: Annotated[
        int | None,
        opt.Option(metavar="N", help="Images to collect statistics from; 1024 or all.", rich_help_panel=HOW),
    ] = None,
    calibration_file: Annotated[
        Path | None,
        opt.Option(
            "--calibration",
            metavar="FILE",
            help="Statistics: read if the file exists, else collected and written there, to be used again.",
            rich_help_panel=HOW,
        ),
    ] = None,
    fisher: Annotated[
        bool | None,
        opt.Option(
            "--fisher/--no-fisher",
            help="Weigh errors by output gradients (one backward pass); on for models with a classifier.",
            show_default=False,
            rich_help_panel=HOW,
        ),
    ] = None,
    data_free: Annotated[
        bool, opt.Option("--data-free", help="Use the weights only; no images needed.", rich_help_panel=HOW)
    ] = False,
    no_eval: Annotated[
        bool, opt.Option("--no-eval", help="Do not measure accuracy and speed.", rich_help_panel=HOW)
    ] = False,
    checkpoint: opt.Checkpoint = None,
    model_arg: opt.ModelArgs = None,
    split: Annotated[
        str | None,
        opt.Option(help="Split for calibration and evaluation both.", rich_help_panel=opt.DATA),
    ] = None,
    calibration_split: Annotated[
        str | None,
        opt.Option(help="Split to calibrate on; train if there is one.", rich_help_panel=opt.DATA),
    ] = None,
    eval_split: Annotated[
        str | None,
        opt.Option(help="Split to evaluate on; validation, val or test.", rich_help_panel=opt.DATA),
    ] = None,
    eval_images: opt.EvalImages = None,
    data_root: opt.DataRoot = None,
    class_map: opt.ClassMap = None,
    skip_bad_images: opt.SkipBad = False,
    mean: opt.Mean = None,
    std: opt.Std = None,
    crop_pct: opt.CropPct = None,
    interpolation: opt.Interpolation = None,
    batch_size: opt.BatchSize = 32,
    workers: opt.Workers = None,
    device: opt.Device = "auto",
    seed: opt.Seed = 0,
    overwrite: opt.Overwrite = False,
    json_output: opt.Json = False,
) -> None:
    """Compress MODEL to a budget and write a small model that loads without the original.

    Calibrates on images of DATA (labels are not used), chooses ranks, and evaluates before and after.

    [dim]comcat compress deit_small_patch16_224 --data imagenet/ --keep 0.5 --out deit-half[/dim]
    """
    budget = _budget(plan_file, keep, keep_macs, max_params, max_macs, of)
    args = parse_model_args(model_arg)
    if data is None and not data_free and not (calibration_file and calibration_file.is_file()):
        raise typer.BadParameter("give --data DATA to calibrate on, or --data-free", param_hint="--data")
    if data_free and (calibration_file or fisher or calibration_images or method == "probe"):
        raise typer.BadParameter(
            "goes without --calibration, --calibration-images, --fisher and --method probe",
            param_hint="--data-free",
        )
    screen = Screen(json_output)
    with screen:
        from ..files import check_free
        from ..plan import Plan
        from .job import Job, Settings

        check_free(out, overwrite)
        check_input_file(plan_file, "--plan")
        check_input_file(checkpoint, "--checkpoint")
        settings = Settings(
            model=model,
            out=out,
            overwrite=overwrite,
            method=method,
            parts=tuple(p.strip() for p in parts.split(",") if p.strip()),
            rank_multiple=rank_multiple,
            calibration_images=calibration_images,
            calibration_file=calibration_file,
            fisher=fisher,
            data_free=data_free,
            evaluate=not no_eval,
            calibration_split=calibration_split or split,
            eval_split=eval_split or split,
            eval_images=eval_images,
            batch_size=batch_size,
            workers=workers,
            seed=seed,
        )
        reading = None
        if data is not None:
            reading = Reading(data, data_root, class_map, skip_bad_images, mean, std, crop_pct, interpolation)
        given = Plan.load(plan_file) if plan_file else None
        job = Job(screen, settings, reading, budget, given)
        job.load(checkpoint, args, parse_device(device))
        job.open_data()
        job.run()
    job.show()


def _budget(
    plan: Path | None,
    keep: float | None,
    keep_macs: float | None,
    max_params: str | None,
    max_macs: str | None,
    of: str,
) -> Budget | None:
    given = [value for value in (keep, keep_macs, max_params, max_macs) if value is not None]
    if plan is not None and given:
        raise typer.BadParameter("a plan has its ranks already: leave the budget out", param_hint="--plan")
    if plan is None and len(given) != 1:
        raise typer.BadParameter(
            "give exactly one of --keep, --keep-macs, --max-params and --max-macs", param_hint="budget"
        )
    most_params = parse_count(max_params, "--max-params")
    most_macs = parse_count(max_macs, "--max-macs")
    if plan is not None:
        return None
    from ..plan import Budget

    return Budget(
        params=most_params if keep is None else keep,
        macs=most_macs if keep_macs is None else keep_macs,
        of=of,
    )
