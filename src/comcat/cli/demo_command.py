"""``comcat demo`` and ``comcat demo customize``; what they run is the package :mod:`comcat_demos`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from . import options as opt
from .console import Screen, command


@command
def demo(
    ctx: typer.Context,
    out: Annotated[Path, opt.Option(metavar="DIR", help="Directory for everything that is made.")] = Path(
        "comcat-demo"
    ),
    epochs: Annotated[
        int, opt.Option(min=0, metavar="N", help="Epochs of training; 0 takes the default.", hidden=True)
    ] = 0,
    seed: opt.Seed = 0,
    overwrite: opt.Overwrite = False,
    json_output: opt.Json = False,
) -> None:
    """Train a small vision transformer on handwritten digits, compress it, fine-tune it, and show all of them.

    Needs no network, no GPU and no data: the digits come with scikit-learn. [bold]comcat demo customize[/bold] shows
    the other half: a tiny diffusion model learns a new concept.
    """
    if ctx.invoked_subcommand is not None:
        return
    screen = Screen(json_output)
    start = time.perf_counter()
    with screen:
        from comcat_demos import vit_demo

        made = vit_demo.run(screen, out, overwrite, seed, epochs or None)
    made.show(time.perf_counter() - start)


@command
def demo_customize(
    out: Annotated[Path, opt.Option(metavar="DIR", help="Directory for everything that is made.")] = Path(
        "comcat-demo-customize"
    ),
    digit: Annotated[
        list[int] | None,
        opt.Option(min=0, max=9, help="A digit that the base never sees and V* is to become; repeatable; 0 and 4."),
    ] = None,
    steps: Annotated[int | None, opt.Option(min=1, metavar="N", help="Updates of every method; 80.")] = None,
    cache: Annotated[
        Path | None, opt.Option(metavar="DIR", help="Where the trained base is kept; ~/.cache/comcat.")
    ] = None,
    base_steps: Annotated[
        int, opt.Option(min=0, metavar="N", help="Training of the base; 0: default.", hidden=True)
    ] = 0,
    seed: opt.Seed = 0,
    overwrite: Annotated[bool, opt.Option("--overwrite", help="Replace an earlier demo.")] = False,
    json_output: opt.Json = False,
) -> None:
    """Build a tiny Stable Diffusion of handwritten digits, and teach it two that it never saw from five images each.

    The images show them single; they are asked for in every color, side and number. Compares added products with LoRA
    at the same size and with full fine-tuning. Needs no network, no GPU and no data.
    """
    screen = Screen(json_output)
    start = time.perf_counter()
    with screen:
        from comcat_demos import contest_demo, scene_contest, scenes

        made = contest_demo.run(
            screen,
            out,
            overwrite,
            taught=digit or scenes.LEFT_OUT,
            steps=steps or scene_contest.STEPS,
            cache=cache,
            base_steps=base_steps,
            seed=seed,
            start=start,
        )
    made.show()
