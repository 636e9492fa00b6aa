"""How well a pipeline draws the scenes it is asked for: digit, color, side and number of its images, each by itself.

Color, side and number are plain statistics of the pixels; only the digit needs a classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from comcat.errors import ComcatError

from .digits import digit_scans
from .digits_score import generate
from .scenes import CELL, COLORS, NUMBERS, SIDES, Scene, all_scenes, known

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

PARTS = ("digit", "color", "side", "number")
_INK = 0.12  # mean of a cell from which on something stands in it; scans have 0.18 at least, empty cells almost none


class SceneJudge:
    """Looks at images of scenes, cell by cell; the same each time, and without any knowledge of pipelines.

    The digit in a cell is what a support vector machine on the training scans sees, its color the nearest of
    :data:`COLORS` to the mean of its pixels, weighted by their brightness.

    Raises:
        ComcatError: scikit-learn is not installed.
    """

    def __init__(self) -> None:
        try:
            from sklearn.svm import SVC
        except ImportError as e:
            raise ComcatError("the digits need another package. Install it: pip install scikit-learn") from e
        scans, labels = digit_scans("train")
        self._machine = SVC(C=10.0).fit(scans.flatten(1).numpy(), labels.numpy())
        self._colors = torch.tensor(list(COLORS.values()))

    def look(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is in the four cells of ``images``, (N, 3, 16, 16) in [0, 1].

        Returns:
            whether anything is, which digit, and which color (its place in :data:`COLORS`): (N, 4) each.
        """
        cells = images.unfold(2, CELL, CELL).unfold(3, CELL, CELL)  # (N, 3, 2, 2, 8, 8)
        cells = cells.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)  # (N, 4, 3, 8, 8)
        ink = cells.amax(2)
        digits = torch.from_numpy(self._machine.predict(ink.reshape(-1, CELL * CELL).numpy())).long()
        color = (cells * ink.unsqueeze(2)).sum((3, 4)) / ink.square().sum((2, 3)).clamp_min(1e-6).unsqueeze(2)
        nearest = (color.unsqueeze(2) - self._colors).norm(dim=-1).argmin(-1)
        return ink.mean((2, 3)) > _INK, digits.view(len(images), 4), nearest

    def parts(self, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Which of :data:`PARTS` of ``images`` are what ``scenes`` ask for, (N, 4) bool; what is left open is right."""
        seen, digits, colors = self.look(images)
        names = list(COLORS)
        rows = []
        for scene, here, digit, color in zip(scenes, seen, digits, colors, strict=True):
            anything = bool(here.any())
            elsewhere = here.clone()
            if scene.side is not None:
                elsewhere[list(SIDES[scene.side][1])] = False
            rows.append(
                [
                    scene.digit is None or (anything and bool((digit[here] == scene.digit).all())),
                    scene.color is None or (anything and bool((color[here] == names.index(scene.color)).all())),
                    scene.side is None or (anything and not bool(elsewhere.any())),
                    scene.number is None or int(here.sum()) == scene.number,
                ]
            )
        return torch.tensor(rows)


@dataclass(frozen=True)
class Hits:
    """Percentages of images that are right.

    Attributes:
        right: in everything that was asked for; digit, color, side, number: in this.
    """

    right: float
    digit: float
    color: float
    side: float
    number: float

    @staticmethod
    def of(parts: Tensor) -> Hits:
        """From what :meth:`SceneJudge.parts` returns."""
        return Hits(*(100 * hits.float().mean().item() for hits in (parts.all(1), *parts.unbind(1))))


@dataclass(frozen=True)
class SceneScores:
    """What a pipeline draws.

    Attributes:
        taught: of the concept's scenes, None without a word for it; known: of those of digits that the base knows.
        images: generated: the concept's (under None) and the others' (under their digits), (n, 3, 16, 16) in [0, 1].
    """

    taught: Hits | None
    known: Hits
    images: dict[int | None, Tensor] = field(repr=False)

    @property
    def concept(self) -> float:
        """Percent of the concept's images that are right in everything; NaN without a concept."""
        return float("nan") if self.taught is None else self.taught.right

    @property
    def retention(self) -> float:
        """The same of the digits that the base knows."""
        return self.known.right

    @property
    def details(self) -> dict[str, Any]:
        return {"taught": self.taught and asdict(self.taught), "known": asdict(self.known)}


def score_scenes(
    pipe: StableDiffusionPipeline,
    judge: SceneJudge,
    word: str | None,
    digit: int,
    left_out: Sequence[int],
    *,
    rounds: int = 4,
    other_scenes: int = 8,
    seed: int = 0,
) -> SceneScores:
    """Draw and judge: the 32 scenes of ``digit``, asked for by ``word``, and scenes of every digit of the base.

    Args:
        word: the concept's, e.g. ``V*``; None: the others alone. rounds: images of every scene of the concept.
        other_scenes: of every other digit; together they have all colors, sides and numbers.
    """
    images: dict[int | None, Tensor] = {}
    taught = None
    if word is not None:
        scenes = all_scenes(digit) * rounds
        images[None] = generate(pipe, [scene.caption(word) for scene in scenes], seed=seed)
        taught = Hits.of(judge.parts(images[None], scenes))
    others = [scene for other in known(left_out) for scene in varied_scenes(other, other_scenes)]
    drawn = generate(pipe, [scene.caption() for scene in others], seed=seed + 1)
    images.update(zip(known(left_out), drawn.split(other_scenes), strict=True))
    return SceneScores(taught, Hits.of(judge.parts(drawn, others)), images)


def varied_scenes(digit: int, count: int) -> list[Scene]:
    """``count`` scenes of a digit, of all colors in turn, and other ones for every digit."""
    colors, sides = list(COLORS), list(SIDES)
    return [
        Scene(digit, colors[i % 4], sides[(i + i // 4 + digit) % 4], 1 + (i + i // 2 + digit) % len(NUMBERS))
        for i in range(count)
    ]
