"""Prompts of a judgement: templates with {} for the subject, texts for what must stay, and the lists of the package."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...storage.reader import read_yaml, validated
from ...wording import some
from ..adapter.words import has_token, placeholders

PLACE = "{}"


@cache
def dreambench() -> dict[str, Any]:
    """``subjects`` (name to class), ``live_classes`` and ``prompts`` (``object`` and ``live``) of DreamBench."""
    found: dict[str, Any] = read_yaml(Path(__file__).with_name("dreambench.yaml"))
    return found


def default_prompts(class_word: str) -> list[str]:
    """DreamBench's 25 for a subject of this class: those for living ones, where it is one of its living classes."""
    lists = dreambench()
    kind = "live" if class_word in lists["live_classes"] else "object"
    return list(lists["prompts"][kind])


@cache
def default_retention() -> tuple[str, ...]:
    """Prompts without the subject; {} is its class."""
    return tuple(read_yaml(Path(__file__).with_name("retention.yaml"))["prompts"])


def templates(prompts: Sequence[str], class_word: str, words: Sequence[str]) -> list[str]:
    """Prompts with {} for the subject; where they spell one of the learned ``words``, {} takes its place.

    A class behind the word goes with it: "a V* dog in the snow" is "a {} in the snow".

    Raises:
        DataError: a prompt says nothing of the subject, or twice; one is there twice; there is none.
    """
    made = []
    for prompt in _texts(prompts):
        text = prompt
        for word in words:
            text = re.sub(rf"(?<!\w){re.escape(word)}( {re.escape(class_word)})?(?!\w)", PLACE, text)
        if text.count(PLACE) != 1:
            raise DataError(
                f"the prompt {prompt!r} must speak of the subject once: write {{}} in its place, as in "
                "'a {} in the snow'"
            )
        made.append(text)
    _once(made)
    return made


def retained(prompts: Sequence[str], class_word: str, words: Sequence[str]) -> list[str]:
    """Prompts without the subject, with its class for {}.

    Raises:
        DataError: one speaks of the subject by its learned word, or is there twice; there is none.
    """
    made = [prompt.replace(PLACE, class_word) for prompt in _texts(prompts)]
    for prompt in made:
        found = [*(word for word in words if has_token(prompt, word)), *placeholders(prompt)]
        if found:
            raise DataError(
                f"the prompt {prompt!r} asks for the subject itself ({found[0]}); retention is measured on prompts "
                "without it"
            )
    _once(made)
    return made


def _texts(prompts: Sequence[str]) -> list[str]:
    texts: list[str] = validated(list[str], list(prompts), "the list of prompts", DataError)
    texts = [" ".join(text.split()) for text in texts]
    if not texts or not all(texts):
        raise DataError("there is no prompt, or an empty one; say what to draw")
    return texts


def _once(prompts: list[str]) -> None:
    twice = sorted({prompt for prompt in prompts if prompts.count(prompt) > 1})
    if twice:
        raise DataError(f"{some(map(repr, twice))} stands in the list of prompts twice; leave one out")
