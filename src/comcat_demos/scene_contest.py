"""The contest on scenes: one of the digits left out, taught from single ones, asked for in every other way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import scenes
from .contest import TOKEN, Contest
from .contest_methods import Method
from .scenes_judge import SceneJudge, SceneScores, score_scenes, varied_scenes

if TYPE_CHECKING:
    from PIL.Image import Image

#: Updates of every method: few, where 200 would let all of them succeed.
STEPS = 80

#: Each at the rate at which a sweep found it best, see ``benchmarks/customize_methods.py``.
METHODS = (
    Method("base", "base"),
    Method("comcat, rank 1", "comcat", 1, 2e-2),
    Method("comcat, rank 2", "comcat", 2, 2e-2),
    Method("comcat, rank 4", "comcat", 4, 2e-2),
    # With 4 heads a LoRA of rank 2 r has as many parameters as products of rank r.
    Method("LoRA, rank 2", "lora", 2, 2e-2),
    Method("LoRA, rank 4", "lora", 4, 2e-2),
    Method("LoRA, rank 8", "lora", 8, 2e-2),
    Method("full fine-tuning", "full", 0, 5e-4),
)


class SceneContest(Contest):
    """As :class:`Contest`, on a base of :mod:`comcat_demos.scenes`.

    Args:
        digit: taught, one of ``left_out``, the digits that the base does not know.
    """

    def __init__(
        self,
        pipe: Any,
        folder: Path,
        digit: int,
        left_out: Sequence[int] = scenes.LEFT_OUT,
        seed: int = 0,
        steps: int = STEPS,
    ) -> None:
        super().__init__(pipe, folder, digit, seed, steps)
        self.left_out = left_out

    @cached_property
    def judge(self) -> SceneJudge:
        return SceneJudge()

    def photos(self) -> list[tuple[Image, str]]:
        return [(image, scene.caption(TOKEN)) for image, scene in scenes.concept_photos(self.digit, seed=self.seed)]

    def class_prompts(self) -> list[str]:
        return [scene.caption() for d in scenes.known(self.left_out) for scene in varied_scenes(d, 8)]

    def score(self, prompt: str | None = TOKEN) -> SceneScores:
        word = None if prompt is None else TOKEN
        return score_scenes(self.pipe, self.judge, word, self.digit, self.left_out, seed=self.seed)
