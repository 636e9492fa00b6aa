"""``comcat judge``: what adapters have learned of a subject, and what they have changed beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as opt
from .console import Screen, command
from .customize_command import Base, Denoiser, Device, Variant
from .generate_command import drawing_precision, parse_adapter, parse_seeds, read_prompts
from .inputs import check_input_file, parse_device, read_lines

ENCODERS, TEXTS = "Encoders", "Prompts"


@command
def judge(
    base: Base,
    adapter: Annotated[
        list[str],
        opt.Option(
            metavar="FILE[:S][,token=WORD]",
            help="Adapter, or a LoRA; its strength and its learned word if not its own; repeatable.",
        ),
    ],
    images: Annotated[Path, opt.Option(metavar="DIR", help="Photos of the subject.")],
    out: Annotated[
        Path, opt.Option(metavar="DIR", help="Gets the pictures, judgement.json and grid.png; what is there is kept.")
    ],
    dino: Annotated[
        str | None,
        opt.Option(
            metavar="MODEL",
            help="Image encoder for concept fidelity: a directory, a timm name such as vit_small_patch16_224.dino, or "
            "a Hub repository such as facebook/dinov2-small.",
            rich_help_panel=ENCODERS,
        ),
    ] = None,
    clip: Annotated[
        str | None,
        opt.Option(
            metavar="MODEL",
            help="Model of images and text for CLIP-I and CLIP-T: a directory, a Hub repository of transformers or "
            "open_clip, or open_clip/NAME/TAG.",
            rich_help_panel=ENCODERS,
        ),
    ] = None,
    class_word: Annotated[
        str | None,
        opt.Option(metavar="WORDS", help="What the subject is one of, e.g. dog; from the adapters' captions."),
    ] = None,
    subject: Annotated[
        str | None,
        opt.Option(metavar="WORDS", help="What adapters without a learned word call it, e.g. 'sks dog'."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        opt.Option(metavar="TEXT", help="What to draw, {} is the subject; repeatable.", rich_help_panel=TEXTS),
    ] = None,
    prompts: Annotated[
        Path | None,
        opt.Option(
            metavar="FILE",
            help="A text file with such a prompt on each line; DreamBench's 25 otherwise.",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    retention_prompts: Annotated[
        Path | None,
        opt.Option(
            metavar="FILE",
            help="Prompts without the subject, one a line, {} is its class; a list of 20 otherwise.",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    seeds: opt.Seeds = "0-3",
    steps: opt.Steps = None,
    guidance: opt.Guidance = None,
    negative_prompt: opt.NegativePrompt = None,
    height: opt.Pixels = None,
    width: opt.Pixels = None,
    batch_size: opt.BatchSize = 4,
    precision: Annotated[
        str | None,
        opt.Option(metavar="no|bf16|fp16", help="fp16 on a GPU, no elsewhere, unless given.", rich_help_panel=opt.RUN),
    ] = None,
    variant: Variant = None,
    denoiser: Denoiser = None,
    device: Device = "auto",
    overwrite: Annotated[
        bool,
        opt.Option("--overwrite", help="Draw anew what was drawn with other settings.", rich_help_panel=opt.RUN),
    ] = False,
    json_output: opt.Json = False,
) -> None:
    """Measure adapters on BASE: likeness to the subject, obedience to prompts, what else has changed, costs.

    Give [bold]--dino[/bold], [bold]--clip[/bold] or both. An interrupted run goes on where it was.

    [dim]comcat judge BASE --adapter dog.safetensors --adapter lora.safetensors --images dog/
    --dino vit_small_patch16_224.dino --clip openai/clip-vit-base-patch32 --out judged[/dim]
    """
    screen = Screen(json_output)
    numbers = parse_seeds(seeds)
    files = [parse_adapter(text) for text in adapter]
    masked = next((given for given in files if given.mask is not None), None)
    if masked is not None:
        raise typer.BadParameter(
            f"'{masked.path}' has a mask, and adapters are judged on whole pictures; leave @{masked.mask} out",
            param_hint="--adapter",
        )
    check_input_file(prompts, "--prompts")
    check_input_file(retention_prompts, "--retention-prompts")
    with screen:
        from ..customize.judging.contestants import Contestant
        from ..customize.judging.judge import RESULT, SHEET, check_folder
        from ..customize.judging.judge import judge as run
        from ..customize.judging.jury import open_encoders
        from ..customize.pipelines import open_pipeline
        from .making import told

        place = parse_device(device)
        check_folder(out)
        texts = read_prompts(prompt, prompts) if prompt or prompts else None
        retained = None if retention_prompts is None else read_lines(retention_prompts)
        with told(screen):
            # What is wrong with them is said before the base is read.
            encoders = open_encoders(dino, clip, str(place))
            contestants = [Contestant.read(given.path, given.scale, given.token) for given in files]
            pipe: Any = open_pipeline(
                base, drawing_precision(precision, place.type), place, variant, screen.note, denoiser
            )
            found = run(
                pipe,
                contestants,
                images,
                out=out,
                **encoders,  # type: ignore[arg-type]
                class_word=class_word,
                subject=subject,
                prompts=texts,
                retention_prompts=retained,
                seeds=numbers,
                steps=steps,
                guidance_scale=guidance,
                negative_prompt=negative_prompt,
                height=height,
                width=width,
                batch_size=batch_size,
                overwrite=overwrite,
                progress=screen.progress,
                note=screen.note,
            )
    show(screen, found)
    screen.done((out / RESULT, "bold"), " and ", (out / SHEET, "bold"))
    screen.result({"out": str(out), **found.to_dict()})


def show(screen: Screen, found: Any) -> None:
    """The tables, and what spoils a comparison."""
    from ..report.judge_table import costs_table, scores_tables

    counts = f"{len(found.prompts)} with the subject, {len(found.retention_prompts)} without"
    screen.say(f"class {found.class_word!r}; prompts: {counts}; {len(found.seeds)} seeds each")
    screen.out.print(scores_tables(found))
    screen.out.print(costs_table(found.rows))
    for row in found.rows:
        if row.cost.flagged:
            screen.warn(f"{len(row.cost.flagged)} pictures of {row.name} were blackened by the safety checker")
