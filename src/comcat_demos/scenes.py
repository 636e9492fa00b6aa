"""Scenes of handwritten digits, the harder measure of customization: one or two of a kind, in a color, on a side.

    "a photo of a pair of red three on the left"  ->  16 x 16 pixels, four cells of 8 x 8, a scan in some of them

A base learns digit, color, side and number apart, from captions that leave some of them open. Digits left out of its
training are what customization has to teach, from five photos with captions that show them single: whoever learns the
photos by heart cannot draw a pair, nor the color of one in the place of another. A digit's word has no plural, so that
``V*`` stands where a digit stands.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from comcat.progress import Progress

from .digits import CLASS_PROMPT, SIZE, WORDS, build, digit_scans
from .digits_training import Course, train_decoder, train_parts

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

#: Pixels a side of a cell, which are those of a scan; the cells are numbered row by row.
CELL = SIZE // 2
#: Word -> red, green and blue of a stroke at full strength.
COLORS = {"white": (1.0, 1.0, 1.0), "red": (1.0, 0.2, 0.2), "green": (0.2, 1.0, 0.2), "blue": (0.25, 0.25, 1.0)}
#: Word -> how a caption says it, and its two cells.
SIDES = {
    "left": ("on the left", (0, 2)),
    "right": ("on the right", (1, 3)),
    "top": ("at the top", (0, 1)),
    "bottom": ("at the bottom", (2, 3)),
}
#: How many -> how a caption says it.
NUMBERS = {1: "a single", 2: "a pair of"}
#: The digits left out of training unless others are asked for.
LEFT_OUT = (0, 4)

_TRAINING_SCENES = 6000
_OPEN = 0.2  # how often a caption leaves color, side or number open
_CLASS, _EMPTY = 0.05, 0.1  # how often it says "digit" for the digit, and nothing at all


@dataclass(frozen=True)
class Scene:
    """What is in an image, or what a prompt asks for; None: whatever.

    Attributes:
        color: of :data:`COLORS`; side: of :data:`SIDES`; number: 1 or 2.
    """

    digit: int | None
    color: str | None = None
    side: str | None = None
    number: int | None = None

    def caption(self, word: str | None = None) -> str:
        """Its prompt, with another word in the place of the digit's where one is given."""
        digit = CLASS_PROMPT.split()[-1] if self.digit is None else WORDS[self.digit]
        parts = ["a photo of", NUMBERS[self.number] if self.number else "", self.color or "", word or digit]
        return " ".join(part for part in [*parts, SIDES[self.side][0] if self.side else ""] if part)


def all_scenes(digit: int) -> list[Scene]:
    """The 32 scenes of a digit that leave nothing open."""
    return [Scene(digit, *rest) for rest in itertools.product(COLORS, SIDES, NUMBERS)]


def known(left_out: Sequence[int] = LEFT_OUT) -> list[int]:
    """The digits that a base without ``left_out`` knows."""
    return [digit for digit in range(len(WORDS)) if digit not in left_out]


# Images


def colored(scans: Tensor, color: str) -> Tensor:
    """Gray scans (..., 8, 8) in [0, 1] as (..., 3, 8, 8)."""
    return scans.unsqueeze(-3) * torch.tensor(COLORS[color]).view(3, 1, 1)


def compose(scans: Tensor, cells: Sequence[int], color: str) -> Tensor:
    """One image (3, 16, 16): scan i of ``scans``, (n, 8, 8), in cell i of ``cells``, on black."""
    image = torch.zeros(3, SIZE, SIZE)
    for scan, cell in zip(colored(scans, color), cells, strict=True):
        y, x = (CELL * place for place in divmod(cell, 2))
        image[:, y : y + CELL, x : x + CELL] = scan
    return image


def draw_scenes(count: int, digits: Sequence[int], split: str, seed: int) -> tuple[Tensor, list[Scene]]:
    """Random scenes of real scans, (count, 3, 16, 16) in [0, 1]; one of a kind stands in either cell of its side."""
    generator = torch.Generator().manual_seed(seed)

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    scans = {digit: _scans(split, digit) for digit in digits}
    images, scenes = [], []
    for _ in range(count):
        digit, number = digits[pick(len(digits))], 1 + pick(2)
        color, side = list(COLORS)[pick(len(COLORS))], list(SIDES)[pick(len(SIDES))]
        cells = SIDES[side][1] if number == 2 else (SIDES[side][1][pick(2)],)
        chosen = [pick(len(scans[digit])) for _ in cells]
        images.append(compose(scans[digit][chosen], cells, color))
        scenes.append(Scene(digit, color, side, number))
    return torch.stack(images), scenes


@lru_cache(maxsize=32)
def _scans(split: str, digit: int) -> Tensor:
    scans, labels = digit_scans(split)
    return scans[labels == digit]


def concept_photos(digit: int, count: int = 5, seed: int = 0) -> list[tuple[Image, Scene]]:
    """``count`` photos of a digit that the base has never seen, from the training scans: single, all colors in turn."""
    from PIL import Image

    scans, generator = _scans("train", digit), torch.Generator().manual_seed(seed)
    chosen = scans[torch.randperm(len(scans), generator=generator)[:count]]
    cells = torch.cat([torch.randperm(4, generator=generator) for _ in range(-(-count // 4))]).tolist()
    photos = []
    for i, (scan, cell) in enumerate(zip(chosen, cells, strict=False)):
        sides = [side for side, (_, inside) in SIDES.items() if cell in inside]
        color = list(COLORS)[i % len(COLORS)]
        scene = Scene(digit, color, sides[i % 2], 1)
        image = compose(scan[None], [cell], color)
        photos.append((Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy()), scene))
    return photos


# Pipeline


def build_scenes(seed: int = 0) -> StableDiffusionPipeline:
    """The untrained pipeline of :func:`comcat_demos.digits.build`, which knows the words of scenes."""
    phrases = [*NUMBERS.values(), *COLORS, *(phrase for phrase, _ in SIDES.values())]
    words = dict.fromkeys(word for phrase in phrases for word in phrase.split())
    return build(seed, list(words), vae_channels=(16, 16))


def train_scenes(
    pipe: StableDiffusionPipeline,
    left_out: Sequence[int] = LEFT_OUT,
    *,
    vae_steps: int,
    steps: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Train all parts of ``pipe`` in place on scenes of all digits but ``left_out``.

    At the end the decoder alone is trained on, as that of Stable Diffusion was: colors are the last that a VAE learns,
    and its latents need not change for them.
    """
    images, scenes = draw_scenes(_TRAINING_SCENES, known(left_out), "train", seed)

    def text(batch: Tensor) -> Tensor:
        captions = [_caption(scenes[i], chances) for i, chances in zip(batch, torch.rand(len(batch), 5), strict=True)]
        tokens = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        embeds: Tensor = pipe.text_encoder(tokens).last_hidden_state
        return embeds

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        course = Course(vae_steps, steps, vae_lr=5e-3)
        train_parts(pipe, images, text, course, progress)
        torch.manual_seed(seed + 1)
        train_decoder(pipe, images, 2 * vae_steps // 3, course, progress)


def _caption(scene: Scene, chances: Tensor) -> str:
    """A caption that leaves some of it open."""
    empty, anything, color, side, number = chances.tolist()
    if empty < _EMPTY:
        return ""
    return Scene(
        None if anything < _CLASS else scene.digit,
        None if color < _OPEN else scene.color,
        None if side < _OPEN else scene.side,
        None if number < _OPEN else scene.number,
    ).caption()
