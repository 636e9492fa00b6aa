"""Pictures side by side: a row for each prompt, a column for the photos, the base and every adapter."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..teaching.photos import decode
from .album import Album, read_picture

_CELL, _GAP, _HEAD, _SIDE = 192, 6, 26, 190  # pixels
_CONCEPT, _REST = 6, 3  # rows at most
_FONT = 13


def sheet(
    albums: Mapping[str, Album],
    texts: Mapping[str, Sequence[str]],
    prompts: Sequence[str],
    retained: Sequence[str],
    seed: int,
    photos: Sequence[Path],
) -> Image.Image:
    """
    Args:
        texts: what each drew for ``prompts``, by the name of its album.
    """
    picked = _spread(len(prompts), _CONCEPT)
    rows: list[tuple[str, list[Image.Image]]] = []
    for number, index in enumerate(picked):
        photo = _fit(decode(photos[number % len(photos)]))
        drawn = [_fit(read_picture(album.path(texts[name][index], seed))) for name, album in albums.items()]
        rows.append((prompts[index], [photo, *drawn]))
    blank = Image.new("RGB", (_CELL, _CELL), "white")
    for index in _spread(len(retained), _REST):
        drawn = [_fit(read_picture(album.path(retained[index], seed))) for album in albums.values()]
        rows.append((retained[index], [blank, *drawn]))
    return _page(["photos", *albums], rows)


def _page(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    step = _CELL + _GAP
    page = Image.new("RGB", (_SIDE + len(heads) * step, _HEAD + len(rows) * step), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(_FONT)
    for x, head in enumerate(heads):
        pen.text((_SIDE + x * step, 6), textwrap.shorten(head, 26, placeholder="..."), fill="black", font=font)
    for y, (prompt, images) in enumerate(rows):
        top = _HEAD + y * step
        pen.multiline_text((_GAP, top), textwrap.fill(prompt, 26), fill="black", font=font)
        for x, image in enumerate(images):
            page.paste(image, (_SIDE + x * step, top))
    return page


def _fit(image: Image.Image) -> Image.Image:
    """In the middle of a white square; what is tiny is enlarged without smoothing."""
    scale = _CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resampling = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
    cell = Image.new("RGB", (_CELL, _CELL), "white")
    cell.paste(image.resize(size, resampling), ((_CELL - size[0]) // 2, (_CELL - size[1]) // 2))
    return cell


def _spread(count: int, most: int) -> list[int]:
    """At most so many of ``count``, evenly over all."""
    return [i * count // min(count, most) for i in range(min(count, most))]
