"""``comcat customize``: teach a text-to-image model a concept from a few photos."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..customize.teaching.customize_config import PHOTOS, PRIOR, PRODUCTS, RUN, SAVING, CustomizeConfig
from ..training.process import process_index
from ..training.settings import check_fields, read_yaml
from . import options as opt
from .config_options import configured
from .console import Screen, command, main_process_speaks
from .inputs import check_input_file, check_output_file, parse_bytes, parse_device

Base = Annotated[
    str, typer.Argument(metavar="BASE", help="A pipeline of diffusers: its directory, or its name on the Hub.")
]
Variant = Annotated[
    str | None, opt.Option(metavar="NAME", help="Variant of BASE's weights, e.g. fp16.", rich_help_panel=opt.MODEL)
]
Denoiser = Annotated[
    Path | None,
    opt.Option(
        metavar="DIR",
        help="A compressed unet or transformer, from comcat compress --component, in place of BASE's.",
        rich_help_panel=opt.MODEL,
    ),
]
Device = Annotated[
    str, opt.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.", rich_help_panel=opt.RUN)
]


def _o(panel: str, text: str, metavar: str | None = None) -> Any:
    return opt.Option(help=text, rich_help_panel=panel, metavar=metavar, show_default=False)


@command
@configured(
    CustomizeConfig,
    before={
        PRODUCTS: "storage",
        "": "allow_upscale",
        PRIOR: "validation_prompt",
        "validate_every": "validation_prompt",
        SAVING: "run_dir",
        RUN: "overwrite",
    },
)
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
    storage: Annotated[
        str,
        _o(PRODUCTS, "float32, float16, bfloat16, int8 or nf4 [dim]\\[default: float16][/dim]", "TYPE"),
    ] = "float16",
    max_bytes: Annotated[
        str | None,
        _o(
            PRODUCTS,
            "Largest file, e.g. 1M or 500KiB: of --rank, what is worth least goes halfway.",
            "SIZE",
        ),
    ] = None,
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
    validation_prompt: Annotated[
        list[str] | None, _o(SAVING, "What they show; repeatable; the prompt.", "TEXT")
    ] = None,
    run_dir: Annotated[
        Path | None, _o(SAVING, "Checkpoints, log and samples; beside --out, named NAME.run.", "DIR")
    ] = None,
    keep_run: Annotated[
        bool, opt.Option("--keep-checkpoints", help="Keep checkpoints after success too.", rich_help_panel=SAVING)
    ] = False,
    variant: Variant = None,
    denoiser: Denoiser = None,
    device: Annotated[
        str, opt.Option(metavar="auto|cpu", help="auto takes the GPUs there are.", rich_help_panel=opt.RUN)
    ] = "auto",
    overwrite: Annotated[bool, opt.Option("--overwrite", help="Replace --out.", rich_help_panel=opt.RUN)] = False,
    json_output: opt.Json = False,
    **given: Any,
) -> None:
    """Teach BASE a concept from a few photos: small products on every attention head, in one small file.

    [dim]comcat customize stable-diffusion-v1-5/stable-diffusion-v1-5 --images dog/ --prompt "a photo of V* dog"
    --class-prompt "a photo of a dog" --out dog.safetensors[/dim]
    """
    if device not in ("auto", "cpu"):
        raise typer.BadParameter(
            "takes auto or cpu; choose GPUs with CUDA_VISIBLE_DEVICES or accelerate launch", param_hint="--device"
        )
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
            max_bytes=parse_bytes(max_bytes, "--max-bytes"),
            class_prompt=class_prompt,
            class_images=class_images,
            validation_prompts=validation_prompt or (),
            allow_upscale=allow_upscale,
            skip_bad_images=skip_bad_images,
            variant=variant,
            denoiser=denoiser,
            cpu=device == "cpu",
            overwrite=overwrite,
            keep_run=keep_run,
        )
    if rank_ == 0:
        _show(screen, document)


def settings_of(given: dict[str, Any], config: Path | None) -> CustomizeConfig:
    """Settings from the options, where they were given, over those of a file over the defaults."""
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
    denoiser: Path | None,
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
    pipe = open_pipeline(base, settings.precision, "cpu", variant, screen.note, denoiser)
    try:
        handle = train(
            pipe,
            config=settings,
            name=adapter_name(out),
            out=folder,
            storage=storage,
            base=base,
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
