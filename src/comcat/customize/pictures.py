"""Images as grids and files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..storage.atomic import atomic_file

_GAP = 4  # pixels between the images of a grid


def grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """One image of all, row by row, on white; cells as large as the largest."""
    images = [image for row in rows for image in row]
    width, height = max(i.width for i in images), max(i.height for i in images)
    columns = max(len(row) for row in rows)
    gap = max(1, min(_GAP, width // 8))
    size = (columns * (width + gap) - gap, len(rows) * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * (width + gap), y * (height + gap)))
    return sheet


def is_black(image: Image.Image) -> bool:
    """Whether no pixel is anything but black, as safety checkers and overflowing decoders leave images."""
    found: tuple[float, float] = image.convert("L").getextrema()  # type: ignore[assignment]
    return found[1] == 0


def as_png(image: Image.Image) -> bytes:
    """The content of a PNG file."""
    content = io.BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()


def save_png(image: Image.Image, path: Path, overwrite: bool = True) -> None:
    """Write a PNG, whole or not at all; without ``overwrite`` never in the place of a file, which is an error."""
    with atomic_file(path, overwrite) as file:
        file.write(as_png(image))
