"""Masks of adapters: from whatever an image comes in to numbers, and onto the layers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from ...errors import DataError, ModelError
from ...hosts import canvases
from ...nn.masks import Mask
from .components import denoiser

if TYPE_CHECKING:
    from .attached import Adapter

#: Of 255: what compression may leave of colour in a gray image.
_COLOUR = 24


def as_mask(mask: Any) -> Tensor:
    """(H, W), float64 in [0, 1]: 1 where an adapter acts.

    Args:
        mask: an image or the path of one, white where the adapter acts, black or transparent where it does not; or an
            array or tensor (H, W) or (1, H, W) in [0, 1], of bools, or of whole numbers up to 255 (uint8).

    Raises:
        DataError: it is none of these, holds other numbers or colours, or acts nowhere.
    """
    if isinstance(mask, (str, Path)):
        values, what = _read(Path(mask)), f"the mask '{mask}'"
    elif isinstance(mask, Image.Image):
        values, what = _gray(mask), "the mask"
    elif isinstance(mask, (np.ndarray, Tensor)):
        values, what = _numbers(torch.as_tensor(mask).detach().cpu()), "the mask"
    else:
        raise DataError(f"a mask is an image, the path of one, an array or a tensor, not {type(mask).__name__}")
    if not values.any():
        raise DataError(
            f"{what} is black everywhere, so that the adapter would act nowhere. Paint white where it acts, or leave "
            "the adapter out"
        )
    return values


def _numbers(values: Tensor) -> Tensor:
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    if values.ndim != 2 or not values.numel():
        raise DataError(f"a mask is of the shape (height, width), not {tuple(values.shape)}")
    if values.is_complex():
        raise DataError("a mask holds numbers in [0, 1], not complex ones")
    values = values.double() / 255 if values.dtype == torch.uint8 else values.double()
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise DataError(
            f"a mask holds numbers in [0, 1], and this one {values.min():g} to {values.max():g}; numbers up to 255 are "
            "given as uint8"
        )
    return values


def _read(path: Path) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata; what is corrupt raises
            with Image.open(path) as image:
                image.load()
                return _gray(image, f"the mask '{path}'")
    except (MemoryError, DataError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"there is no mask '{path}'; give an image, white where the adapter acts") from error
    except Exception as error:  # Pillow's decoders raise whatever they like on damaged bytes
        cause = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            cause = "not an image"
        raise DataError(
            f"the mask '{path}' cannot be read ({cause.splitlines()[0].rstrip('.')}). Give a PNG or JPEG, white where "
            "the adapter acts"
        ) from error


def _gray(image: Image.Image, what: str = "the mask") -> Tensor:
    """Any mode as (H, W) in [0, 1]: transparency on black."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # Pillow would clip these at 255
        wide = torch.from_numpy(np.asarray(image).astype(np.float64))
        if image.mode == "F" or wide.min() < 0 or wide.max() > 65535:
            raise DataError(f"{what} has 32-bit pixels, which have no agreed range; save it as PNG or JPEG")
        return wide / 65535
    pixels = torch.from_numpy(np.asarray(image.convert("RGBA")).astype(np.int64))
    seen = pixels[..., :3] * (pixels[..., 3:] > 0)
    if (seen.amax(-1) - seen.amin(-1)).max() > _COLOUR:
        raise DataError(f"{what} has colours; paint it white where the adapter acts, black where not, gray in between")
    return seen.double().mean(-1) * pixels[..., 3].double() / 255**2


def put_mask(handle: Adapter, values: Tensor | None) -> None:
    """Let an adapter act where the mask is, or everywhere again.

    Raises:
        ModelError: the adapter has nothing in the denoiser, or the denoiser is of a kind whose picture is not known.
    """
    component, model = denoiser(handle.pipe)
    layers = {name: layer for (key, name), layer in handle.layers.items() if key == component}
    if values is None:
        for layer in layers.values():
            layer.mask = None
        return
    if not layers:
        raise ModelError(f"{handle.name!r} adds nothing to the {component}, where the picture is: a mask has no effect")
    canvas = canvases.canvas_of(model, getattr(handle.pipe, "vae_scale_factor", None))
    mask = Mask(values, canvas, handle.name)
    for name, layer in layers.items():
        layer.mask = mask if canvas.shows(name) else None


def settle(model: nn.Module, masked: bool) -> None:
    """Without any mask left, the model is no longer looked at."""
    if not masked:
        canvases.release(model)
