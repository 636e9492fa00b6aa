"""How messages list things, and sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable


def some(items: Iterable[str], separator: str = ", ", count: int = 3) -> str:
    """The first ``count``, and how many more there are: ``a, b, c and 4 more``."""
    items = list(items)
    more = len(items) - count
    return separator.join(items[:count]) + (f" and {more} more" if more > 0 else "")


def by(size: Iterable[int]) -> str:
    """``3 x 224 x 224``."""
    return " x ".join(map(str, size))


def slug(text: str) -> str:
    """A text as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48] or "prompt"
