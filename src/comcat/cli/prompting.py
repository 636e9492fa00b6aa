"""Options of zero-shot classification: the prompts, the names of the classes, and whose text tower reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import DataError
from .console import Screen
from .inputs import check_input_file, read_lines

if TYPE_CHECKING:
    import torch

    from ..evaluation.zero_shot import ZeroShot

_WORDNET = re.compile(r"n[0-9]{8}")


@dataclass(frozen=True)
class Prompting:
    """What classes are called and asked for.

    Attributes:
        templates: of the prompts.
        text: the model whose tokenizer and, for an image tower, whose text tower is used; the evaluated one where it
            is None.
    """

    templates: tuple[str, ...]
    text: str | None

    def open(self, model: str, data: Any, class_names: Path | None, device: torch.device, screen: Screen) -> ZeroShot:
        """
        Args:
            class_names: a file with one name a line, in the order of the labels; those of ``data`` otherwise.

        Raises:
            DataError: the classes of ``data`` have no names. ModelError: there is no text tower, or no tokenizer.
        """
        from ..evaluation.zero_shot import ZeroShot

        names = class_names_of(data, class_names, screen)
        screen.note(f"{len(names)} classes by {len(self.templates)} prompts each, e.g. {self._example(names)!r}")
        return ZeroShot.open(self.text or model, names, self.templates, device)

    def _example(self, names: list[str]) -> str:
        return self.templates[0].replace("{}", names[0])


def class_names_of(data: Any, file: Path | None, screen: Screen) -> list[str]:
    """Of the classes, from the file or from the data set: underscores are spaces, numbers of WordNet are words.

    Raises:
        DataError: there are none, or not as many as the data set has classes.
    """
    if file is not None:
        names = read_lines(file)
        if data.num_classes and len(names) != data.num_classes:
            raise DataError(
                f"{file} names {len(names)} classes and {data.name} has {data.num_classes}; give one "
                "name a line, in the order of the labels"
            )
        return names
    names = list(data.class_names or ())
    if not names or all(name.strip().isdigit() for name in names):
        raise DataError(
            f"the classes of {data.name} have no names to ask for; give them: --class-names FILE, one a line, in "
            "the order of the labels"
        )
    if all(_WORDNET.fullmatch(name) for name in names):
        names = _words(names, data.name)
        screen.note("classes are numbers of WordNet: the first word of each is taken; --class-names FILE for others")
    return [name.replace("_", " ") for name in names]


def parse_prompting(
    prompts: list[str] | None, templates: Path | None, text: str | None, metric: str | None
) -> Prompting | None:
    """None where no zero-shot classification is asked for."""
    if not prompts and templates is None:
        if text is not None:
            raise typer.BadParameter("belongs to --prompts or --templates", param_hint="--text")
        return None
    if metric is not None:
        raise typer.BadParameter("goes without --prompts and --templates", param_hint="--metric")
    check_input_file(templates, "--templates")
    return Prompting((*(prompts or ()), *(read_lines(templates) if templates else ())), text)


def _words(numbers: list[str], data: str) -> list[str]:
    from timm.data import ImageNetInfo

    known = ImageNetInfo("imagenet-22k-ms")
    try:
        return [known.label_name_to_description(number).split(",")[0] for number in numbers]
    except (KeyError, AttributeError) as error:
        raise DataError(
            f"the classes of {data} are numbers that timm does not know; give --class-names FILE"
        ) from error
