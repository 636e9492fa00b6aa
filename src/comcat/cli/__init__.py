"""The command line. Heavy imports (torch, timm) happen inside the commands, so ``--help`` is instant."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .adapter_command import app as adapter
from .bench_command import bench
from .compress_command import compress
from .console import remember_command
from .customize_command import customize
from .demo_command import demo, demo_customize
from .evaluate_command import evaluate
from .export_command import export
from .finetune_command import finetune
from .generate_command import generate
from .inspect_command import inspect
from .judge_command import judge
from .push_command import push
from .report_command import report
from .run_command import run
from .ui_command import ui


class _Remembering(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        remember_command(args)
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="comcat",
    cls=_Remembering,
    help="Make attention-based vision models small, and make them yours.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(compress)
app.command()(finetune)
app.command()(run)
app.command()(evaluate)
app.command()(export)
app.command()(bench)
app.command()(inspect)
app.command()(report)
app.command()(push)
app.command()(customize)
app.command()(generate)
app.command()(judge)
app.add_typer(adapter, name="adapter")
app.command()(ui)
demos = typer.Typer(invoke_without_command=True)
demos.callback()(demo)
demos.command("customize")(demo_customize)
app.add_typer(demos, name="demo")


def _version(wanted: bool) -> None:
    if wanted:
        from .._version import __version__

        typer.echo(f"comcat {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make attention-based vision models small (compress, finetune) and make them yours (customize, generate)."""


def main() -> None:
    """The entry point of the command ``comcat``."""
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun
        print("interrupted", file=sys.stderr)
        sys.exit(130)
