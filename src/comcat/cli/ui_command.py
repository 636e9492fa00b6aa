"""``comcat ui``: a web page on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt
from .console import Screen, Terminated, command
from .customize_command import Variant

SERVER = "Server"


@command
def ui(
    base: Annotated[
        str,
        typer.Argument(metavar="[BASE]", help="A pipeline of diffusers to begin with: its directory, or its Hub name."),
    ] = "",
    folder: Annotated[
        Path, opt.Option(metavar="DIR", help="Adapters, the runs that taught them, and pictures.")
    ] = Path("adapters"),
    port: Annotated[
        int, opt.Option(min=0, max=65535, metavar="N", help="Where it answers; 0: any.", rich_help_panel=SERVER)
    ] = 7860,
    host: Annotated[
        str, opt.Option(metavar="ADDRESS", help="0.0.0.0 lets other machines in.", rich_help_panel=SERVER)
    ] = "127.0.0.1",
    variant: Variant = None,
    device: opt.TrainingDevice = "auto",
) -> None:
    """Open a web page: teach a concept from photos, draw with adapters, compress a model.

    It runs what the commands run, one job at a time, and asks the network for nothing. Ctrl-C ends it.

    [dim]comcat ui stable-diffusion-v1-5/stable-diffusion-v1-5[/dim]
    """
    if device not in ("auto", "cpu"):
        raise typer.BadParameter("takes auto or cpu; choose GPUs with CUDA_VISIBLE_DEVICES", param_hint="--device")
    screen = Screen()
    from ..ui.serving import check_packages, listening, serve

    with listening(host, port) as listener:
        check_packages()
        from ..ui.shared import Shared
        from ..ui.workplace import Workplace

        if host not in ("127.0.0.1", "localhost", "::1"):
            screen.warn(
                f"whoever reaches {host} can use this page without a password, and read and write files as you: let "
                "only a network in that you trust"
            )
        shared = Shared(Workplace(base, folder, device, variant))

        def begun(address: str) -> None:
            screen.say("open ", (address, "bold"), "; Ctrl-C ends it")

        try:
            serve(shared, listener, begun)
        except Terminated as signal:
            signal.args = ("the page has ended",)
            raise
        except KeyboardInterrupt:  # as it is meant to end
            pass
        finally:
            screen.note("ending; a training that is on keeps its last checkpoint")
            shared.close()
