"""The reference of the command line, from the commands themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_MARKUP = re.compile(r"(?<!\\)\[/?(?:dim|bold|italic|green|cyan)\]")


def command_reference() -> str:
    """One section for every command, with its options by panel."""
    import typer

    from comcat.cli import app

    root = typer.main.get_command(app)
    parts = ["# The command line\n", "Every command takes `--help`; `comcat --version` prints the version.\n"]
    for name, command in _commands(root, "comcat"):
        parts.append(f"## {name}\n")
        parts += [f"{line}\n" for line in _help(command)]
        parts.append(f"```console\n{name} {_usage(command)}\n```\n")
        for panel, options in _panels(command).items():
            parts.append(f"**{panel}**\n")
            parts.append("| option | what it does |\n|---|---|")
            parts += [_row(option, typer.Context(command, info_name=name)) for option in options]
            parts.append("")
    return "\n".join(parts)


def _commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    for child, command in group.commands.items():
        own = not hasattr(command, "commands") or command.invoke_without_command
        if own:
            yield f"{name} {child}", command
        if hasattr(command, "commands"):
            yield from _commands(command, f"{name} {child}")


def _help(command: Any) -> Iterator[str]:
    """Paragraphs of the help; the last line, an example, as code."""
    for paragraph in (command.help or "").split("\n\n"):
        text = " ".join(paragraph.split())
        example = re.fullmatch(r"\[dim\](.*)\[/dim\]", text)
        yield f"```console\n{_plain(example[1])}\n```" if example else _plain(text)


def _usage(command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    words = [p.metavar or p.name.upper() for p in arguments]
    return " ".join([*words, "[OPTIONS]"])


def _panels(command: Any) -> dict[str, list[Any]]:
    panels: dict[str, list[Any]] = {}
    for parameter in command.params:
        if getattr(parameter, "hidden", False) or parameter.name == "help":
            continue
        panel = getattr(parameter, "rich_help_panel", None)
        default = "Arguments" if parameter.param_type_name == "argument" else "Options"
        panels.setdefault(panel or default, []).append(parameter)
    return panels


def _row(parameter: Any, context: Any) -> str:
    """As ``--help`` has it."""
    flags, text = parameter.get_help_record(context) or (parameter.name, "")
    if parameter.param_type_name == "argument":
        flags = flags.partition(" <")[0]
        text = text.replace("  [required]", "")
    cells = (f"`{flags}`", _plain(" ".join(text.split())))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _plain(text: str) -> str:
    """Without the markup of the terminal."""
    return _MARKUP.sub("", text).replace("\\[", "[").replace("<", "&lt;")
