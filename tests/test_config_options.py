"""A field of a configuration class is an option of its command, and nothing is written twice."""

import inspect
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from comcat import FinetuneConfig
from comcat.cli import app
from comcat.cli.config_options import configured
from comcat.customize import CustomizeConfig
from comcat.training.augmentation import Augmentation
from comcat.training.option_texts import setting

#: Fields that only a file of settings and Python give.
NO_OPTION = {CustomizeConfig: {"betas", "keep_checkpoints"}, FinetuneConfig: set(), Augmentation: set()}


@dataclass(frozen=True)
class Wheels:
    number: int = setting(3, "Wheels", "How many.", "N")
    radius: float | None = setting(None, "Wheels", "Metres; the car's own.", "X")
    tread: Literal["soft", "hard"] = setting("hard", "Rubber", "Kind.", shown=False)
    sizes: tuple[float, ...] = setting((0.5, 7.0), "Rubber", "Two of them.")
    names: tuple[str, ...] = setting((), "Rubber", "Repeatable.", flag="--name")
    spokes: tuple[int, ...] = setting((), "Rubber", "A list.")
    spare: bool = setting(False, "Rubber", "One more.")
    hidden: int = 5


def drive(*words: str) -> tuple[str, dict[str, Any]]:
    """What a command with these fields prints, and what it is given."""
    given: dict[str, Any] = {}

    @configured(Wheels, before={"": "fast", "Rubber": "end"})
    def car(fast: bool = False, end: bool = False, **settings: Any) -> None:
        given.update(settings)

    root = typer.Typer()
    root.command()(car)
    result = CliRunner().invoke(root, words)
    assert result.exit_code == 0, result.output
    return result.output, given


def test_fields_become_options() -> None:
    words = [
        "--number",
        "5",
        "--tread",
        "soft",
        "--sizes",
        "1",
        "2",
        "--name",
        "a",
        "--name",
        "b",
        "--spokes",
        "3,7",
        "--spare",
    ]
    assert drive(*words)[1] == {
        "number": 5,
        "radius": None,
        "tread": "soft",
        "sizes": (1.0, 2.0),
        "names": ["a", "b"],
        "spokes": "3,7",
        "spare": True,
    }
    assert set(drive()[1].values()) == {None}


def test_help_shows_texts_groups_and_defaults() -> None:
    help = " ".join(drive("--help")[0].split())
    for text in ("How many. [default: 3]", "[default: 0.5 7]", "Wheels", "Rubber", "--name", "--no-spare"):
        assert text in help
    assert "hidden" not in help
    assert "[default: hard]" not in help


def test_options_stand_where_the_command_says() -> None:
    @configured(Wheels, before={"": "fast", "Rubber": "end", "spare": "fast"})
    def car(fast: bool = False, end: bool = False, **settings: Any) -> None: ...

    names = "number radius spare fast tread sizes names spokes end"
    assert [*inspect.signature(car).parameters] == names.split()


@pytest.mark.parametrize("kind", NO_OPTION, ids=lambda k: k.__name__)
def test_every_setting_is_an_option(kind: Any) -> None:
    name = "customize" if kind is CustomizeConfig else "finetune"
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    hints = get_type_hints(kind)
    options = {param.name: param for param in command.params}
    assert {f.name for f in fields(kind)} - set(options) == NO_OPTION[kind]
    for field in fields(kind):
        if text := field.metadata.get("option"):
            assert options[field.name].help.startswith(text.text)
            for choice in [c for c in get_args(hints[field.name]) if isinstance(c, str)]:
                assert choice in options[field.name].metavar
