"""Text that came from outside (names of files, prompts, what a file says of itself), as it may be shown."""

from __future__ import annotations

import re

# Control characters (ESC sequences move the cursor, set titles, make links), those that turn the direction of writing
# around, and halves of characters, which cannot be encoded.
_HARMFUL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` without what would act on a terminal instead of being shown; line breaks and tabs stay."""
    return _HARMFUL.sub("", text)


def one_line(text: str) -> str:
    """:func:`printable`, on one line."""
    return printable(" ".join(text.split("\n")).replace("\t", " "))
