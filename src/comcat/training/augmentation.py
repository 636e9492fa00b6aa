"""What happens to training images, as settings: cheap to import, for the command line and recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .option_texts import setting

AUGMENT = "Augmentation"


@dataclass(frozen=True)
class Augmentation:
    """What happens to an image before the model sees it.

    Attributes:
        auto_augment: timm's description, e.g. ``rand-m9-mstd0.5-inc1`` (RandAugment) or ``augmix-m3-w3``.
        random_erasing: probability of erasing a random rectangle.
        hflip: probability of a horizontal flip.
        scale, ratio: area (as a share of the image) and aspect ratio of the random crop that is resized.
        color_jitter: strength of changes of brightness, contrast and saturation; off under auto_augment.
        crop_padding: images that already have the model's size are not resized but padded by this many pixels and
            cropped back at random; None: an eighth of the shorter side. 0 leaves them where they are.

    Raises:
        DataError: a value out of range.
    """

    auto_augment: str | None = setting(None, AUGMENT, "E.g. rand-m9-mstd0.5-inc1; off.", "NAME")
    random_erasing: float = setting(0.0, AUGMENT, "Probability of erasing a rectangle.", "X")
    hflip: float = setting(0.5, AUGMENT, "Probability of a horizontal flip.", "X")
    scale: tuple[float, float] = setting((0.08, 1.0), AUGMENT, "Area of the random crop.", "X Y")
    ratio: tuple[float, float] = setting((3 / 4, 4 / 3), AUGMENT, "Its aspect ratio.", "X Y")
    color_jitter: float = setting(0.0, AUGMENT, "Strength; 0 is off.", "X")
    crop_padding: int | None = setting(
        None, AUGMENT, "Pixels around images of the model's size before cropping; an eighth.", "N"
    )

    def __post_init__(self) -> None:
        for name in ("random_erasing", "hflip"):
            if not 0 <= _number(name, getattr(self, name)) <= 1:
                raise DataError(f"{name} is {getattr(self, name)}, but is a probability. Give a number from 0 to 1")
        for name in ("scale", "ratio"):
            pair = getattr(self, name)
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not 0 < _number(name, pair[0]) <= pair[1]:
                raise DataError(f"{name} is {pair!r}. Give two positive numbers, the smaller one first")
            object.__setattr__(self, name, tuple(pair))
        if self.scale[1] > 1:
            raise DataError(f"scale goes up to {self.scale[1]}, beyond the whole image. Give at most 1")
        if _number("color_jitter", self.color_jitter) < 0 or _number("crop_padding", self.crop_padding or 0) < 0:
            raise DataError("color_jitter and crop_padding must not be negative. Use 0 to turn them off")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{name} is {value!r}, but must be a number")
    return value
