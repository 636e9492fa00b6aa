"""``comcat push``: a compressed model to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as opt
from .console import Screen, command


@command
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What comcat compress or comcat.save wrote.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository; made if it is not there.")],
    private: Annotated[
        bool | None,
        opt.Option("--private/--public", help="Of a new repository; as the organization has it.", show_default=False),
    ] = None,
    revision: Annotated[
        str | None, opt.Option(metavar="BRANCH", help="Branch to commit to, made if it is not there; main.")
    ] = None,
    message: Annotated[str | None, opt.Option(metavar="TEXT", help="Of the commit.")] = None,
    base_model: Annotated[
        str | None, opt.Option(metavar="ORG/NAME", help="The dense model on the Hub, for the card.")
    ] = None,
    license: Annotated[
        str | None, opt.Option(metavar="NAME", help="Licence of the dense model, for the card, e.g. apache-2.0.")
    ] = None,
    dry_run: Annotated[
        bool, opt.Option("--dry-run", help="Show the card and the files, and do not ask the network.")
    ] = False,
    json_output: opt.Json = False,
) -> None:
    """Put the compressed model DIR on the Hub, with a card that says what was cut and how to load it.

    Log in first: hf auth login, or HF_TOKEN. A README.md in DIR is the card; reports and logs, which name paths of
    this machine, are not pushed. In Python it is read back with comcat.load("hf-hub:ORG/NAME").

    [dim]comcat push deit-half you/deit-small-half --license apache-2.0[/dim]
    """
    screen = Screen(json_output)
    with screen:
        from ..sharing.push import prepare_package
        from ..sharing.push import push as put

        if dry_run:
            package = prepare_package(folder, repository, base_model=base_model, license=license)
            screen.out.print(package.card, soft_wrap=True)
            for note in package.notes:
                screen.note(note)
            screen.say(f"would push {', '.join(sorted(package.files))} to {repository}")
            screen.result({"repository": repository, "files": sorted(package.files), "card": package.card})
            return
        done = put(
            folder,
            repository,
            private=private,
            revision=revision,
            message=message,
            base_model=base_model,
            license=license,
        )
    for note in done.notes:
        screen.note(note)
    name = f"hf-hub:{repository}" + (f"@{revision}" if revision else "")
    screen.say("pushed to ", (done.url, "bold"), f"; in Python: comcat.load({name!r})")
    screen.result({"url": done.url, "commit": done.commit, "files": list(done.files), "notes": list(done.notes)})
