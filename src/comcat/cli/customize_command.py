"""``comcat customize``: teach a text-to-image model a concept from a few photos."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..training.process import process_index
from ..training.settings import check_fields, read_yaml
from . import options as opt
from .console import Screen, command, main_process_speaks
from .inputs import check_input_file, check_output_file, parse_device

if TYPE_CHECKING:
    from ..customize.teaching.customize_config import CustomizeConfig

PRODUCTS = "Products"
TOKEN = "Token"
COURSE = "Course"
PHOTOS = "Photos"
PRIOR = "Prior preservation"
SAVING = "Log, samples and checkpoints"

Base = Annotated[
    str, typer.Argument(metavar="BASE", help="A pipeline of diffusers: its directory, or its name on the Hub.")
]
Variant = Annotated[
    str | None, opt.Option(metavar="NAME", help="Variant of BASE's weights, e.g. fp16.", rich_help_panel=opt.MODEL)
]
Device = Annotated[
    str, opt.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.", rich_help_panel=opt.RUN)
]


def _o(panel: str, text: str, metavar: str | None = None) -> Any:
    return opt.Option(help=text, rich_help_panel=panel, metavar=metavar, show_default=False)


@command
def customize(
    base: Base,
    images: Annotated[
        Path, opt.Option(metavar="DIR", help="Photos of the concept; captions beside them (.txt, metadata.jsonl).")
    ],
    out: Annotated[Path, opt.Option(metavar="FILE", help="The adapter to write (.safetensors).")],
    prompt: Annotated[
        str | None,
        opt.Option(help="Caption of all photos, e.g. 'a photo of V* dog'; a word like V* or <dog> is learned."),
    ] = None,
    resume: Annotated[bool, opt.Option("--resume", help="Continue the run of --out, bit by bit.")] = False,
    config: Annotated[
        Path | None, opt.Option(metavar="FILE", help="YAML file with settings; options given here go first.")
    ] = None,
    rank: Annotated[int | None, _o(PRODUCTS, "Rank of every head's products. [dim]\\[default: 2][/dim]", "R")] = None,
    layer_rank: Annotated[
        list[str] | None, _o(PRODUCTS, "Rank of some layers, e.g. attn2=4; repeatable.", "NAME=R")
    ] = None,
    target: Annotated[
        list[str] | None,
        _o(PRODUCTS, "Which attention: self, cross, joint, a part of names (attn2), a glob; repeatable; all.", "NAME"),
    ] = None,
    text_encoder_rank: Annotated[int | None, _o(PRODUCTS, "Rank in the CLIP text encoders; none.", "R")] = None,
    scale: Annotated[float | None, _o(PRODUCTS, "Strength. [dim]\\[default: 1][/dim]", "S")] = None,
    storage: Annotated[
        str, _o(PRODUCTS, "float32, float16, bfloat16 or int8 in the file. [dim]\\[default: float16][/dim]", "TYPE")
    ] = "float16",
    token: Annotated[str | None, _o(TOKEN, "The word to learn, where it does not look like one.", "WORD")] = None,
    token_vectors: Annotated[int | None, _o(TOKEN, "Its vectors. [dim]\\[default: 1][/dim]", "N")] = None,
    token_init: Annotated[str | None, _o(TOKEN, "Words that they start from, e.g. dog.", "WORDS")] = None,
    token_lr: Annotated[
        float | None, _o(TOKEN, "Learning rate, in units of their size. [dim]\\[default: 0.02][/dim]", "X")
    ] = None,
    steps: Annotated[int | None, _o(COURSE, "Updates. [dim]\\[default: 500][/dim]", "N")] = None,
    lr: Annotated[float | None, _o(COURSE, "Learning rate of the products. [dim]\\[default: 3e-4][/dim]", "X")] = None,
    schedule: Annotated[str | None, _o(COURSE, "Of the learning rate.", "constant|linear|cosine")] = None,
    warmup_steps: Annotated[int | None, _o(COURSE, "Linear warm-up; none.", "N")] = None,
    weight_decay: Annotated[float | None, _o(COURSE, "Of AdamW. [dim]\\[default: 0.01][/dim]", "X")] = None,
    clip_grad: Annotated[
        float | None, _o(COURSE, "Largest norm of the gradient. [dim]\\[default: 1][/dim]", "X")
    ] = None,
    optimizer: Annotated[str | None, _o(COURSE, "adamw8bit needs bitsandbytes.", "adamw|adamw8bit")] = None,
    snr_gamma: Annotated[float | None, _o(COURSE, "Min-SNR weighting, e.g. 5; off.", "X")] = None,
    batch_size: Annotated[int | None, _o(COURSE, "Photos per batch. [dim]\\[default: 1][/dim]", "N")] = None,
    accumulate: Annotated[int | None, _o(COURSE, "Batches per step. [dim]\\[default: 1][/dim]", "N")] = None,
    precision: Annotated[
        str | None, _o(COURSE, "Of the base model and of autocast; the products stay float32.", "no|bf16|fp16")
    ] = None,
    grad_checkpointing: Annotated[bool | None, _o(COURSE, "Less memory, more time.")] = None,
    resolution: Annotated[int | None, _o(PHOTOS, "Pixels; the model's own.", "N")] = None,
    buckets: Annotated[
        float | None, _o(PHOTOS, "Keep aspect ratios up to this; 1 crops to squares. [dim]\\[default: 2][/dim]", "X")
    ] = None,
    flip: Annotated[float | None, _o(PHOTOS, "Probability of mirroring; off.", "X")] = None,
    random_crop: Annotated[bool | None, _o(PHOTOS, "Crop elsewhere every time; needs --no-cache-latents.")] = None,
    cache_latents: Annotated[
        bool | None,
        opt.Option("--cache-latents/--no-cache-latents", help="Encode photos once.", rich_help_panel=PHOTOS),
    ] = None,
    caption_dropout: Annotated[float | None, _o(PHOTOS, "Share of examples without caption; 0.", "X")] = None,
    allow_upscale: Annotated[
        bool, opt.Option("--allow-upscale", help="Enlarge photos below the resolution.", rich_help_panel=PHOTOS)
    ] = False,
    skip_bad_images: Annotated[
        bool, opt.Option("--skip-bad-images", help="Leave out what cannot be read.", rich_help_panel=PHOTOS)
    ] = False,
    class_prompt: Annotated[
        str | None, _o(PRIOR, "What the concept is one of, e.g. 'a photo of a dog'.", "TEXT")
    ] = None,
    class_images: Annotated[
        Path | None, _o(PRIOR, "Images of the class; otherwise the model draws them.", "DIR")
    ] = None,
    num_class_images: Annotated[int | None, _o(PRIOR, "How many to draw. [dim]\\[default: 100][/dim]", "N")] = None,
    prior_weight: Annotated[float | None, _o(PRIOR, "Of their loss. [dim]\\[default: 1][/dim]", "X")] = None,
    validate_every: Annotated[int | None, _o(SAVING, "Steps between sample images; none.", "N")] = None,
    validation_prompt: Annotated[
        list[str] | None, _o(SAVING, "What they show; repeatable; the prompt.", "TEXT")
    ] = None,
    validation_images: Annotated[int | None, _o(SAVING, "Per prompt. [dim]\\[default: 4][/dim]", "N")] = None,
    validation_steps: Annotated[
        int | None, _o(SAVING, "Sampling steps, also of class images. [dim]\\[default: 25][/dim]", "N")
    ] = None,
    checkpoint_every: Annotated[
        int | None, _o(SAVING, "Steps between checkpoints. [dim]\\[default: 100][/dim]", "N")
    ] = None,
    log_every: Annotated[
        int | None, _o(SAVING, "Steps between lines of the log. [dim]\\[default: 10][/dim]", "N")
    ] = None,
    run_dir: Annotated[
        Path | None, _o(SAVING, "Checkpoints, log and samples; beside --out, named NAME.run.", "DIR")
    ] = None,
    keep_run: Annotated[
        bool, opt.Option("--keep-checkpoints", help="Keep checkpoints after success too.", rich_help_panel=SAVING)
    ] = False,
    variant: Variant = None,
    device: Annotated[
        str, opt.Option(metavar="auto|cpu", help="auto takes the GPUs there are.", rich_help_panel=opt.RUN)
    ] = "auto",
    seed: Annotated[int | None, _o(opt.RUN, "Of everything random. [dim]\\[default: 0][/dim]", "N")] = None,
    overwrite: Annotated[bool, opt.Option("--overwrite", help="Replace --out.", rich_help_panel=opt.RUN)] = False,
    json_output: opt.Json = False,
) -> None:
    """Teach BASE a concept from a few photos: small products on every attention head, in one small file.

    [dim]comcat customize stable-diffusion-v1-5/stable-diffusion-v1-5 --images dog/ --prompt "a photo of V* dog"
    --class-prompt "a photo of a dog" --out dog.safetensors[/dim]
    """
    given = dict(locals())
    if device not in ("auto", "cpu"):
        raise typer.BadParameter(
            "takes auto or cpu; choose GPUs with CUDA_VISIBLE_DEVICES or accelerate launch", param_hint="--device"
        )
    given.update(layer_ranks=layer_rank, targets=target)
    check_input_file(config, "--config")
    rank_ = process_index()
    screen = Screen(json_output or rank_ > 0)
    document: dict[str, Any] = {}
    with screen, main_process_speaks(rank_) as started:
        settings = settings_of(given, config)
        started.append(True)
        document = _run(
            screen,
            settings,
            base=base,
            images=images,
            prompt=prompt,
            out=out,
            folder=run_dir or out.with_suffix(".run"),
            resume=resume,
            storage=storage,
            class_prompt=class_prompt,
            class_images=class_images,
            validation_prompts=validation_prompt or (),
            allow_upscale=allow_upscale,
            skip_bad_images=skip_bad_images,
            variant=variant,
            cpu=device == "cpu",
            overwrite=overwrite,
            keep_run=keep_run,
        )
    if rank_ == 0:
        _show(screen, document)


def settings_of(given: dict[str, Any], config: Path | None) -> CustomizeConfig:
    """Settings from the options, where they were given, over those of a file over the defaults."""
    from ..customize.teaching.customize_config import CustomizeConfig

    names = [f.name for f in fields(CustomizeConfig)]
    values = dict(read_yaml(config)) if config is not None else {}
    check_fields(values, names)
    values.update({name: given[name] for name in names if given.get(name) is not None})
    return CustomizeConfig.from_dict(values)


def _run(
    screen: Screen,
    settings: CustomizeConfig,
    *,
    base: str,
    out: Path,
    folder: Path,
    storage: str,
    variant: str | None,
    cpu: bool,
    overwrite: bool,
    keep_run: bool,
    **options: Any,
) -> dict[str, Any]:
    from ..customize.files.adapter_file import write_adapter
    from ..customize.files.header import STORAGES
    from ..customize.pipelines import open_pipeline
    from ..customize.teaching.teach import finish, train
    from ..errors import TrainingError

    if storage not in STORAGES:
        raise typer.BadParameter(f"{storage!r} is not one of {', '.join(STORAGES)}", param_hint="--storage")
    check_output_file(out, overwrite)
    if settings.precision == "fp16" and (cpu or parse_device("auto").type == "cpu"):
        raise TrainingError("precision fp16 needs a GPU; use bf16 or no")
    pipe = open_pipeline(base, settings.precision, "cpu", variant, screen.note)
    try:
        handle = train(
            pipe,
            config=settings,
            name=adapter_name(out),
            out=folder,
            cpu=cpu,
            progress=screen.progress,
            note=screen.note,
            **options,
        )
    except KeyboardInterrupt as interrupt:
        from ..training.state import checkpoints

        found = checkpoints(folder)
        kept = f"the checkpoint of step {found[0][0]} is kept, continue with --resume" if found else "no checkpoint yet"
        interrupt.args = (kept,)
        raise
    handle.info["base"] = base
    if process_index() == 0:
        write_adapter(handle, out, storage, overwrite)
        if not keep_run:
            finish(folder)
    return {
        "out": str(out),
        "run": str(folder),
        "bytes": out.stat().st_size if out.exists() else None,
        "parameters": handle.num_parameters,
        "layers": len(handle.layers),
        "token": handle.token.text if handle.token else None,
        "prompt": handle.info["prompt"],
        "training": handle.info["training"],
        "config": asdict(settings),
        "base": base,
    }


def adapter_name(out: Path) -> str:
    """The adapter's name in the file: the file's own, as far as a name may hold it."""
    from torch import nn

    name = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in out.stem)
    return f"{name}_" if hasattr(nn.ModuleDict(), name) else name


def _show(screen: Screen, document: dict[str, Any]) -> None:
    import shlex

    from ..report.format import count, size

    out, run = screen.out, Path(document["run"])
    screen.done(
        (document["out"], "bold"),
        f": {size(document['bytes'])}, {count(document['parameters'])} parameters in {document['layers']} attention "
        "layers",
    )
    if (run / "samples").is_dir():
        screen.done("samples in ", (run / "samples", "bold"))
    words = [document["base"], "--adapter", document["out"], "--prompt", document["prompt"], "--out", "images"]
    out.print("\nYour turn:", style="bold")
    out.print(f"  comcat generate {' '.join(shlex.quote(word) for word in words)}", soft_wrap=True)
    screen.result(document)
