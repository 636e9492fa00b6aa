"""``comcat finetune``: win back what compression cost, with the dense model as the teacher."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..training.augmentation import Augmentation
from ..training.finetune_config import FinetuneConfig
from ..training.process import process_index
from ..training.settings import check_fields, read_yaml
from . import options as opt
from .console import Screen, command, main_process_speaks
from .inputs import Reading, check_input_file, parse_model_args

TEACHER = "Teacher"
COURSE = "Course"
LOSS = "Loss"
AUGMENT = "Augmentation"
SAVING = "Log and checkpoints"


_DEFAULTS = {**asdict(FinetuneConfig()), **asdict(Augmentation())}


def _o(panel: str, text: str, metavar: str | None = None) -> Any:
    return opt.Option(help=text, rich_help_panel=panel, metavar=metavar, show_default=False)


def _setting(name: str, panel: str, text: str, metavar: str | None = None) -> Any:
    """An option for a field of the configuration, whose default is shown."""
    value = _DEFAULTS[name]
    shown = " ".join(f"{x:.4g}" for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, float))
    shown = shown or value
    if value is not None and value != () and not isinstance(value, bool):
        text += f" [dim]\\[default: {shown}][/dim]"
    return _o(panel, text, metavar)


@command
def finetune(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A directory saved by comcat.")],
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
    epochs: Annotated[float | None, _setting("epochs", COURSE, "Passes over the training data.", "N")] = None,
    max_steps: Annotated[
        int | None, _setting("max_steps", COURSE, "End after this many steps, if that is sooner.", "N")
    ] = None,
    lr: Annotated[float | None, _setting("lr", COURSE, "Learning rate.", "X")] = None,
    min_lr: Annotated[float | None, _setting("min_lr", COURSE, "Learning rate of the last step.", "X")] = None,
    warmup_epochs: Annotated[float | None, _setting("warmup_epochs", COURSE, "Linear warm-up.", "N")] = None,
    weight_decay: Annotated[
        float | None, _setting("weight_decay", COURSE, "Of AdamW; none for norms and biases.", "X")
    ] = None,
    betas: Annotated[tuple[float, float] | None, _setting("betas", COURSE, "Of AdamW.", "X Y")] = None,
    layer_decay: Annotated[
        float | None, _setting("layer_decay", COURSE, "Learning rate decay per layer, e.g. 0.75.", "X")
    ] = None,
    clip_grad: Annotated[float | None, _setting("clip_grad", COURSE, "Largest norm of the gradient.", "X")] = None,
    accumulate: Annotated[int | None, _setting("accumulate", COURSE, "Batches per step.", "N")] = None,
    precision: Annotated[str | None, _setting("precision", COURSE, "Autocast.", "no|bf16|fp16")] = None,
    grad_checkpointing: Annotated[
        bool | None, _setting("grad_checkpointing", COURSE, "Less memory, more time.")
    ] = None,
    compile: Annotated[bool | None, _setting("compile", COURSE, "Run through torch.compile.")] = None,
    ema: Annotated[
        float | None, _setting("ema", COURSE, "Average the weights with this decay, e.g. 0.9998.", "X")
    ] = None,
    outputs: Annotated[
        str | None,
        _setting(
            "outputs", LOSS, "What the model returns, where it cannot be told.", "classes|labels|values|features|maps"
        ),
    ] = None,
    distillation: Annotated[
        str | None, _setting("distillation", LOSS, "What the student learns from the teacher.", "soft|hard|none")
    ] = None,
    distillation_weight: Annotated[
        float | None, _setting("distillation_weight", LOSS, "Its share of the loss.", "X")
    ] = None,
    distillation_temperature: Annotated[
        float | None, _setting("distillation_temperature", LOSS, "Of the soft form.", "X")
    ] = None,
    feature_blocks: Annotated[
        str | None, _setting("feature_blocks", LOSS, "Blocks to align with the teacher's, e.g. 3,7,-1.", "N,N,...")
    ] = None,
    feature_weight: Annotated[
        float | None, _setting("feature_weight", LOSS, "Factor on their mean squared error.", "X")
    ] = None,
    feature_decay: Annotated[
        str | None, _setting("feature_decay", LOSS, "How it falls to 0.", "cosine|linear|none")
    ] = None,
    label_smoothing: Annotated[
        float | None, _setting("label_smoothing", LOSS, "Of the labels; 0.1 for classes.", "X")
    ] = None,
    mixup: Annotated[float | None, _setting("mixup", AUGMENT, "Alpha of Mixup, e.g. 0.8; off.", "X")] = None,
    cutmix: Annotated[float | None, _setting("cutmix", AUGMENT, "Alpha of CutMix, e.g. 1; off.", "X")] = None,
    mixup_prob: Annotated[float | None, _setting("mixup_prob", AUGMENT, "Share of mixed batches.", "X")] = None,
    mixup_switch_prob: Annotated[
        float | None, _setting("mixup_switch_prob", AUGMENT, "Share of CutMix where both are on.", "X")
    ] = None,
    auto_augment: Annotated[
        str | None, _setting("auto_augment", AUGMENT, "E.g. rand-m9-mstd0.5-inc1; off.", "NAME")
    ] = None,
    random_erasing: Annotated[
        float | None, _setting("random_erasing", AUGMENT, "Probability of erasing a rectangle.", "X")
    ] = None,
    hflip: Annotated[float | None, _setting("hflip", AUGMENT, "Probability of a horizontal flip.", "X")] = None,
    scale: Annotated[tuple[float, float] | None, _setting("scale", AUGMENT, "Area of the random crop.", "X Y")] = None,
    ratio: Annotated[tuple[float, float] | None, _setting("ratio", AUGMENT, "Its aspect ratio.", "X Y")] = None,
    color_jitter: Annotated[float | None, _setting("color_jitter", AUGMENT, "Strength; 0 is off.", "X")] = None,
    crop_padding: Annotated[
        int | None,
        _setting("crop_padding", AUGMENT, "Pixels around images of the model's size before cropping; an eighth.", "N"),
    ] = None,
    eval_every: Annotated[float | None, _setting("eval_every", SAVING, "Epochs between evaluations.", "N")] = None,
    checkpoint_every: Annotated[
        int | None, _setting("checkpoint_every", SAVING, "Steps between checkpoints.", "N")
    ] = None,
    keep_last: Annotated[
        int | None, _setting("keep_checkpoints", SAVING, "How many of the newest checkpoints to keep meanwhile.", "N")
    ] = None,
    log_every: Annotated[
        int | None, _setting("log_every", SAVING, "Steps between lines of metrics.jsonl.", "N")
    ] = None,
    keep_checkpoints: Annotated[
        bool, opt.Option("--keep-checkpoints", help="Keep them after success too.", rich_help_panel=SAVING)
    ] = False,
    train_split: Annotated[str | None, _o(opt.DATA, "Split to train on; train if there is one.")] = None,
    eval_split: Annotated[str | None, _o(opt.DATA, "Split to evaluate on; validation, val or test.")] = None,
    eval_images: opt.EvalImages = None,
    no_eval: Annotated[bool, opt.Option("--no-eval", help="Do not evaluate.", rich_help_panel=opt.DATA)] = False,
    data_root: opt.DataRoot = None,
    class_map: opt.ClassMap = None,
    skip_bad_images: opt.SkipBad = False,
    mean: opt.Mean = None,
    std: opt.Std = None,
    crop_pct: opt.CropPct = None,
    interpolation: opt.Interpolation = None,
    batch_size: Annotated[int, opt.Option(min=1, help="Images of one process.", rich_help_panel=opt.RUN)] = 64,
    workers: opt.Workers = None,
    device: Annotated[
        str, opt.Option(metavar="auto|cpu", help="auto takes the GPUs there are.", rich_help_panel=opt.RUN)
    ] = "auto",
    seed: Annotated[int | None, _setting("seed", opt.RUN, "Of everything random.", "N")] = None,
    json_output: opt.Json = False,
) -> None:
    """Train the compressed model in DIR on DATA, guided by a teacher, usually the dense model that it was made from.

    Under [bold]accelerate launch -m comcat finetune ...[/bold] it runs on many GPUs and machines.

    [dim]comcat finetune deit-half --teacher deit_small_patch16_224 --data imagenet/ --out deit-half-tuned[/dim]
    """
    given = dict(locals())
    if device not in ("auto", "cpu"):
        raise typer.BadParameter(
            "takes auto or cpu; choose GPUs with CUDA_VISIBLE_DEVICES or accelerate launch", param_hint="--device"
        )
    args = parse_model_args(teacher_arg)
    given.update(keep_checkpoints=keep_last, feature_blocks=_parse_blocks(feature_blocks))
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
                keep_checkpoints=keep_checkpoints,
            ),
            Reading(str(data), data_root, class_map, skip_bad_images, mean, std, crop_pct, interpolation),
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
