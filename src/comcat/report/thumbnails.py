"""Images as the model saw them, small enough to be part of a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

#: Longest side in pixels.
LONGEST = 128


def data_uri(image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> str:
    """A (C, H, W) image as ``data:image/...``; without its normalization, between its smallest and largest value."""
    array = image.detach().float().cpu().numpy()
    if mean is not None and std is not None and len(mean) == len(std):
        shape = (-1, 1, 1)
        by, to = np.reshape(std, shape), np.reshape(mean, shape)
        if len(mean) != len(array):  # three numbers for a model of one channel
            by, to = by.mean(), to.mean()
        array = array * by + to
    else:
        low, high = float(array.min()), float(array.max())
        array = (array - low) / max(high - low, 1e-12)
    pixels = (255 * array.clip(0, 1)).round().astype(np.uint8)
    picture = Image.fromarray(pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0])
    if max(picture.size) > LONGEST:
        picture.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    if max(picture.size) <= 64:
        picture.save(buffer, "PNG")
        kind = "png"
    else:
        picture.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
