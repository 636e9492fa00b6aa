"""``comcat finetune``: win back what compression cost, with the dense model as the teacher."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..training.augmentation import Augmentation
from ..training.finetune_config import RUN, SAVING, FinetuneConfig
from ..training.process import process_index
from ..training.settings import check_fields, read_yaml
from . import options as opt
from .config_options import configured, reads_images
from .console import Screen, command, main_process_speaks
from .inputs import Reading, ReadingOf, check_input_file, parse_model_args

TEACHER = "Teacher"


def _o(panel: str, text: str, metavar: str | None = None) -> Any:
    return opt.Option(help=text, rich_help_panel=panel, metavar=metavar, show_default=False)


@command
@reads_images
@configured(FinetuneConfig, Augmentation, before={"": "keep_all", RUN: "json_output"})
def finetune(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A directory saved by comcat, or by save_pretrained.")],
    data: opt.Data,
    out: Annotated[Path, opt.Option(metavar="DIR", help="Directory for the trained model, its log and checkpoints.")],
    resume: Annotated[bool, opt.Option("--resume", help="Continue the run in --out, bit by bit.")] = False,
    config: Annotated[
        Path | None, opt.Option(metavar="FILE", help="YAML file with settings; options given here go first.")
    ] = None,
    teacher: Annotated[
        str | None,
        _o(
            TEACHER,
            "The dense model, as MODEL elsewhere: a timm name asks the network for its weights. May be left out with "
            "--teacher-checkpoint: then it is the architecture that DIR was made from.",
            "MODEL",
        ),
    ] = None,
    teacher_checkpoint: Annotated[Path | None, _o(TEACHER, "Its weights (.safetensors).", "FILE")] = None,
    teacher_arg: Annotated[list[str] | None, _o(TEACHER, "Argument of timm's model; repeatable.", "NAME=VALUE")] = None,
    keep_all: Annotated[
        bool, opt.Option("--keep-checkpoints", help="Keep them after success too.", rich_help_panel=SAVING)
    ] = False,
    train_split: Annotated[str | None, _o(opt.DATA, "Split to train on; train if there is one.")] = None,
    eval_split: opt.EvalSplit = None,
    eval_images: opt.EvalImages = None,
    no_eval: Annotated[bool, opt.Option("--no-eval", help="Do not evaluate.", rich_help_panel=opt.DATA)] = False,
    metric: opt.MetricOption = None,
    reading_of: ReadingOf = Reading,
    batch_size: Annotated[int, opt.Option(min=1, help="Images of one process.", rich_help_panel=opt.RUN)] = 64,
    workers: opt.Workers = None,
    device: opt.TrainingDevice = "auto",
    json_output: opt.Json = False,
    **given: Any,
) -> None:
    """Train the compressed model in DIR on DATA, guided by a teacher, usually the dense model that it was made from.

    Under [bold]accelerate launch -m comcat finetune ...[/bold] it runs on many GPUs and machines.

    [dim]comcat finetune deit-half --teacher deit_small_patch16_224 --data imagenet/ --out deit-half-tuned[/dim]
    """
    if device not in ("auto", "cpu"):
        raise typer.BadParameter(
            "takes auto or cpu; choose GPUs with CUDA_VISIBLE_DEVICES or accelerate launch", param_hint="--device"
        )
    if metric is not None and no_eval:
        raise typer.BadParameter("goes without --no-eval", param_hint="--metric")
    args = parse_model_args(teacher_arg)
    given["feature_blocks"] = _parse_blocks(given["feature_blocks"])
    check_input_file(config, "--config")
    check_input_file(teacher_checkpoint, "--teacher-checkpoint")

    rank = process_index()
    screen = Screen(json_output or rank > 0)  # only the main process prints
    with screen, main_process_speaks(rank) as started:
        from .finetune_job import FinetuneJob, FinetuneOptions

        settings, augmentation = merge(given, read_yaml(config) if config is not None else {})
        job = FinetuneJob(
            screen,
            FinetuneOptions(
                model=model,
                out=out,
                resume=resume,
                teacher=teacher,
                teacher_checkpoint=teacher_checkpoint,
                teacher_args=args,
                train_split=train_split,
                eval_split=eval_split,
                eval_images=eval_images,
                evaluate=not no_eval,
                batch_size=batch_size,
                workers=workers,
                cpu=device == "cpu",
                keep_checkpoints=keep_all,
                metric=metric,
            ),
            reading_of(str(data)),
            settings,
            augmentation,
        )
        job.prepare()
        started.append(True)
        job.run()
    if rank == 0:
        job.show()


def merge(given: dict[str, Any], values: dict[str, Any]) -> tuple[FinetuneConfig, Augmentation]:
    """Settings from the options, where they were given, over those of a file over the defaults.

    Raises:
        TrainingError, DataError: the file or a value is wrong.
    """
    names = {kind: [f.name for f in fields(kind)] for kind in (FinetuneConfig, Augmentation)}
    everything = [name for own in names.values() for name in own]
    check_fields(values, everything)
    values = dict(values)
    values.update({name: given[name] for name in everything if given.get(name) is not None})
    chosen = [{name: values[name] for name in own if name in values} for own in names.values()]
    return FinetuneConfig.from_dict(chosen[0]), Augmentation(**chosen[1])


def _parse_blocks(text: str | None) -> list[int] | None:
    """``3,7,-1`` -> ``[3, 7, -1]``."""
    if text is None:
        return None
    try:
        return [int(item) for item in text.split(",") if item.strip()]
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a list of block numbers such as 3,7,-1", param_hint="--feature-blocks"
        ) from error
