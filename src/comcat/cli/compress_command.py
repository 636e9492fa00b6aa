"""``comcat compress``: from a trained model to a small one on disk."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..rank_search.search_config import SEARCH, SearchConfig
from . import options as opt
from .config_options import configured, reads_images
from .console import Screen, command
from .denoiser_options import Denoising, denoises, read_texts
from .inputs import Reading, ReadingOf, check_input_file, parse_count, parse_device, parse_model_args
from .judging import Judging
from .prompting import parse_prompting

if TYPE_CHECKING:
    from ..planning.plan import Budget

BUDGET = "Budget (one of these)"
HOW = "How"


@command
@denoises
@reads_images
@configured(SearchConfig, before={"": "search_config"})
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
    keep_latency: Annotated[
        float | None,
        opt.Option(metavar="F", help="Fraction of the time that a batch takes here.", rich_help_panel=BUDGET),
    ] = None,
    max_latency: Annotated[
        float | None,
        opt.Option(min=0.001, metavar="MS", help="Milliseconds for a batch.", rich_help_panel=BUDGET),
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
            metavar="auto|spectrum|probe|uniform|search",
            help="How ranks are chosen; auto compares the three on images kept from the calibration, where it has "
            "more than 256.",
            rich_help_panel=HOW,
        ),
    ] = None,
    parts: Annotated[
        str | None,
        opt.Option(
            help="Parts to compress, of qk, vo, ffn, head and (rotary) pairs; all by default, but pairs not by uniform "
            "and search.",
            rich_help_panel=HOW,
        ),
    ] = None,
    rank_multiple: Annotated[
        int | None,
        opt.Option(
            min=1,
            metavar="N",
            help="Round ranks to multiples of N (8 for GPUs); 8 for a latency budget, else 1.",
            rich_help_panel=HOW,
        ),
    ] = None,
    latency_file: Annotated[
        Path | None,
        opt.Option(
            "--latency",
            metavar="FILE",
            help="Timings of layers for a latency budget: read if the file exists, else measured and written there.",
            rich_help_panel=HOW,
        ),
    ] = None,
    latency_batch: Annotated[
        int | None,
        opt.Option(min=1, metavar="N", help="Images in a batch when timing layers; 1.", rich_help_panel=HOW),
    ] = None,
    runtime: Annotated[
        str | None,
        opt.Option(
            metavar="torch|torch-compile|onnxruntime|openvino",
            help="Where a latency budget is measured, and met within 5 %; PyTorch, where and as the model is.",
            rich_help_panel=HOW,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        opt.Option(metavar="fp32|bf16|fp16|int8", help="In which the runtime computes; fp32.", rich_help_panel=HOW),
    ] = None,
    threads: Annotated[
        int | None,
        opt.Option(min=1, metavar="N", help="Of the runtime; what it takes by itself.", rich_help_panel=HOW),
    ] = None,
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
            help="Weigh errors by output gradients (one backward pass); on.",
            show_default=False,
            rich_help_panel=HOW,
        ),
    ] = None,
    outputs: Annotated[
        str | None,
        opt.Option(
            metavar="KIND",
            help="What the model returns, where it cannot be told: classes, labels, values, features or maps.",
            rich_help_panel=HOW,
        ),
    ] = None,
    stock: Annotated[
        bool,
        opt.Option(
            "--stock",
            help="One width for all attention layers and one for all FFNs, written so that plain transformers or timm "
            "loads it without comcat.",
            rich_help_panel=HOW,
        ),
    ] = False,
    data_free: Annotated[
        bool, opt.Option("--data-free", help="Use the weights only; no images needed.", rich_help_panel=HOW)
    ] = False,
    no_eval: Annotated[
        bool, opt.Option("--no-eval", help="Do not measure accuracy and speed.", rich_help_panel=HOW)
    ] = False,
    search_config: Annotated[
        Path | None,
        opt.Option(metavar="FILE", help="YAML file with settings of comcat.SearchConfig.", rich_help_panel=SEARCH),
    ] = None,
    search_split: Annotated[
        str | None,
        opt.Option(metavar="SPLIT", help="Labelled images to learn from; train.", rich_help_panel=SEARCH),
    ] = None,
    search_batch: Annotated[
        int, opt.Option(min=1, metavar="N", help="Images in a batch of one process.", rich_help_panel=SEARCH)
    ] = 64,
    resume: Annotated[
        bool, opt.Option("--resume", help="Continue the search that was interrupted.", rich_help_panel=SEARCH)
    ] = False,
    denoising: Denoising = Denoising(),  # noqa: B008 - a frozen value
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
    eval_split: opt.EvalSplit = None,
    metric: opt.MetricOption = None,
    prompts: opt.Prompts = None,
    templates: opt.Templates = None,
    class_names: opt.ClassNames = None,
    text: opt.TextModel = None,
    boxes: opt.Boxes = "xywh",
    eval_images: opt.EvalImages = None,
    reading_of: ReadingOf = Reading,
    batch_size: opt.BatchSize = 32,
    workers: opt.Workers = None,
    device: opt.Device = "auto",
    seed: opt.Seed = 0,
    overwrite: opt.Overwrite = False,
    json_output: opt.Json = False,
    **learning: Any,
) -> None:
    """Compress MODEL to a budget and write a small model that loads without the original.

    Calibrates on images of DATA (labels are not used), chooses ranks, and evaluates before and after.

    [dim]comcat compress deit_small_patch16_224 --data imagenet/ --keep 0.5 --out deit-half[/dim]

    [dim]comcat compress BASE --component unet --prompts prompts.txt --keep 0.7 --out unet-small[/dim]
    """
    budget = _budget(plan_file, keep, keep_macs, max_params, max_macs, keep_latency, max_latency, of)
    of_images = denoising.component is None
    learned = (*learning.values(), search_config, search_split, (resume and of_images) or None)
    if method != "search" and any(value is not None for value in learned):
        raise typer.BadParameter("the --search options and --resume belong to it", param_hint="--method search")
    if (latency_file or latency_batch) and keep_latency is None and max_latency is None:
        raise typer.BadParameter("belongs to --keep-latency or --max-latency", param_hint="--latency")
    if (runtime or precision or threads) and keep_latency is None and max_latency is None:
        raise typer.BadParameter("belongs to --keep-latency or --max-latency", param_hint="--runtime")
    if (precision or threads) and runtime is None:
        raise typer.BadParameter("belong to --runtime", param_hint="--precision and --threads")
    args = parse_model_args(model_arg)
    if of_images and (given := denoising.given()):
        raise typer.BadParameter(f"{given[0]} belongs to it", param_hint="--component")
    if not of_images and (data or checkpoint or args or stock or method == "search" or keep_latency or max_latency):
        raise typer.BadParameter(
            "goes without --data, --checkpoint, --model-arg, --stock, --method search and a latency budget",
            param_hint="--component",
        )
    if of_images and data is None and not data_free and not (calibration_file and calibration_file.is_file()):
        raise typer.BadParameter("give --data DATA to calibrate on, or --data-free", param_hint="--data")
    if data_free and (calibration_file or fisher or calibration_images or method in ("auto", "probe", "search")):
        raise typer.BadParameter(
            "goes without --calibration, --calibration-images, --fisher and the methods auto, probe and search",
            param_hint="--data-free",
        )
    if stock and method == "search":
        raise typer.BadParameter("learned ranks differ from layer to layer", param_hint="--stock")
    prompting = parse_prompting(prompts if of_images else None, templates, text, metric)
    screen = Screen(json_output)
    with screen, contextlib.ExitStack() as stack:
        from ..planning.plan import Plan
        from ..storage.atomic import check_free, claimed_output
        from ..storage.owned import MODEL, STOCK
        from ..training.process import process_index
        from .compress_component import ComponentJob
        from .compress_job import CompressJob
        from .compress_settings import CompressSettings
        from .timings import LatencyWanted

        check_free(out, overwrite, STOCK if stock else MODEL)
        if process_index() == 0:
            stack.enter_context(claimed_output(out))
        check_input_file(plan_file, "--plan")
        check_input_file(checkpoint, "--checkpoint")
        check_input_file(search_config, "--search-config")
        settings = CompressSettings(
            model=model,
            out=out,
            overwrite=overwrite,
            method=method,
            parts=None if parts is None else tuple(p.strip() for p in parts.split(",") if p.strip()),
            rank_multiple=rank_multiple,
            latency=LatencyWanted(latency_file, latency_batch, runtime, precision or "fp32", threads),
            calibration_images=calibration_images,
            calibration_file=calibration_file,
            fisher=fisher,
            stock=stock,
            data_free=data_free,
            evaluate=not no_eval,
            calibration_split=calibration_split or split,
            eval_split=eval_split or split,
            eval_images=eval_images,
            batch_size=batch_size,
            workers=workers,
            seed=seed,
            search=None,
            judging=Judging(metric, prompting, boxes, class_names, outputs),
        )
        if method == "search":
            from .searching import Search, read_config, working_folder

            values = {**learning, "outputs": outputs, "seed": seed or None}
            search = Search(
                config=read_config(search_config, values),
                folder=working_folder(out),
                resume=resume,
                split=search_split,
                batch_size=search_batch,
                workers=workers,
                cpu=parse_device(device).type == "cpu",
            )
            settings = replace(settings, search=search)
        planned = Plan.load(plan_file) if plan_file else None
        if of_images:
            job = CompressJob(screen, settings, None if data is None else reading_of(data), budget, planned)
            job.load(checkpoint, args, parse_device(device))
            job.open_data()
            job.run()
            show = job.show
        else:
            part = ComponentJob(screen, settings, denoising, read_texts(prompts), budget, planned, resume)
            part.run(parse_device(device))
            show = part.show
    show()


def _budget(
    plan: Path | None,
    keep: float | None,
    keep_macs: float | None,
    max_params: str | None,
    max_macs: str | None,
    keep_latency: float | None,
    max_latency: float | None,
    of: str,
) -> Budget | None:
    amounts = (keep, keep_macs, max_params, max_macs, keep_latency, max_latency)
    given = [value for value in amounts if value is not None]
    if plan is not None and given:
        raise typer.BadParameter("a plan has its ranks already: leave the budget out", param_hint="--plan")
    if plan is None and len(given) != 1:
        raise typer.BadParameter(
            "give exactly one of --keep, --keep-macs, --keep-latency, --max-params, --max-macs and --max-latency",
            param_hint="budget",
        )
    most_params = parse_count(max_params, "--max-params")
    most_macs = parse_count(max_macs, "--max-macs")
    if plan is not None:
        return None
    from ..planning.plan import Budget

    return Budget(
        params=most_params if keep is None else keep,
        macs=most_macs if keep_macs is None else keep_macs,
        latency=keep_latency if max_latency is None else round(1e6 * max_latency),
        of=of,
    )
