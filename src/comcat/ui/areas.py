"""Where in the picture an adapter acts: everywhere, a half of it, or where an image is white."""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError

EVERYWHERE, OWN = "everywhere", "where an image is white"
#: Left, upper, right and lower edge of what is white, as shares.
HALVES = {
    "left half": (0.0, 0.0, 0.5, 1.0),
    "right half": (0.5, 0.0, 1.0, 1.0),
    "upper half": (0.0, 0.0, 1.0, 0.5),
    "lower half": (0.0, 0.5, 1.0, 1.0),
}
AREAS = (EVERYWHERE, *HALVES, OWN)
_SIDE = 512  # pixels; a mask is brought to the layers' tokens anyway


def mask_of(area: str, image: str | None, scratch: Path, name: str) -> Path | None:
    """The mask of an area, an image that is made where it is a half; None for everywhere.

    Args:
        image: the one whose white parts are meant, for OWN; name: of the adapter, for the message.

    Raises:
        DataError: there is no such image yet.
    """
    if area == EVERYWHERE:
        return None
    if area == OWN:
        if not image:
            raise DataError(f"{name!r} is to act where an image is white; add the image, or choose another area")
        return Path(image)
    from PIL import Image

    path = scratch / f"{area.replace(' ', '-')}.png"
    if not path.exists():
        left, upper, right, lower = (round(_SIDE * share) for share in HALVES[area])
        picture = Image.new("L", (_SIDE, _SIDE))
        picture.paste(255, (left, upper, right, lower))
        picture.save(path)
    return path
