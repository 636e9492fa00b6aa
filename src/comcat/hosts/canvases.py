"""Where the picture is in what a denoiser of diffusers computes, so that masks find their tokens.

| model | picture | text |
|---|---|---|
| UNet | latents (B, C, H, W); a layer sees them halved any number of times, the odd ones rounded up | apart |
| PixArt, SANA, SD3, HunyuanDiT, Lumina-Next, PRX | latents (B, C, H, W), in patches | apart |
| AuraFlow, CogView 3 and 4 | latents (B, C, H, W), in patches | in front |
| FLUX.1, FLUX.2, Chroma, Bria, FIBO, LongCat-Image, Ovis-Image | ``img_ids``: row and column of tokens | in front |
| Qwen-Image | ``img_shapes``: frames, rows, columns | apart |
| HunyuanImage, ERNIE-Image | latents (B, C, H, W), in patches | behind |
| Lumina 2 | latents (B, C, H, W), in patches | in front, each sample's own length |
| Z-Image | a list of latents (C, F, H, W), in patches | behind |
| Kandinsky 5 | latents (B, F, H, W, C), in patches | apart |
| Wan, SkyReels, SANA-Video | latents (B, C, F, H, W), in patches | apart |
| HunyuanVideo | latents (B, C, F, H, W), in patches | behind |
| LTX | ``num_frames``, ``height``, ``width`` | apart |

Text "in front" and "behind": of the picture's tokens, in the layers that see both in one stream.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import DataError, ModelError
from ..nn.masks import TokenGrid

Text = Literal["apart", "in front", "behind"]
Size = tuple[int, int, int]  # frames, height, width
Patch = tuple[int, int, int]
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class PictureLayout:
    """How a family of models lays out pictures.

    Attributes:
        read: arguments of a call of the model, and its patch, to the picture's size in tokens.
        lengths: the number of text tokens of each sample, where these differ and stand in front.
        pyramid: layers see the picture halved any number of times.
        apart: parts of the model that see the text alone.
        packed: latents to a token and side where the model itself has no patches.
    """

    read: Callable[[Arguments, Patch], Size]
    text: Text = "apart"
    lengths: Callable[[Arguments], tuple[int, ...]] | None = None
    pyramid: bool = False
    apart: tuple[str, ...] = ()
    packed: int = 1


def _planar(arguments: Arguments, patch: Patch) -> Size:
    latents = arguments.get("hidden_states", arguments.get("sample"))
    assert isinstance(latents, Tensor)
    return 1, latents.shape[-2] // patch[1], latents.shape[-1] // patch[2]


def _video(arguments: Arguments, patch: Patch) -> Size:
    frames, height, width = (size // p for size, p in zip(arguments["hidden_states"].shape[-3:], patch, strict=True))
    return frames, height, width


def _channels_last(arguments: Arguments, patch: Patch) -> Size:
    if (arguments.get("sparse_params") or {}).get("to_fractal"):
        raise DataError("masks do not work with sparse attention, which visits a picture's tokens in another order")
    frames, height, width = (size // p for size, p in zip(arguments["hidden_states"].shape[1:4], patch, strict=True))
    return frames, height, width


def _listed(arguments: Arguments, patch: Patch) -> Size:
    pictures, sides = arguments["x"], (arguments.get("f_patch_size", 1), *[arguments.get("patch_size", 2)] * 2)
    if isinstance(pictures[0], list) or len({picture.shape for picture in pictures}) > 1:
        raise DataError("masks need pictures of one size, and none beside those that are drawn")
    frames, height, width = (size // p for size, p in zip(pictures[0].shape[1:], sides, strict=True))
    return frames, height, width


def _placed(arguments: Arguments, patch: Patch) -> Size:
    ids = arguments["img_ids"]
    rows, columns = ((ids.reshape(-1, ids.shape[-1])[:, i]) for i in (1, 2))
    height, width = (int(places.max() - places.min()) + 1 for places in (rows, columns))
    if height * width != ids.shape[-2]:
        raise DataError("masks need the picture that is drawn to be the only one that the model sees")
    return 1, height, width


def _shaped(arguments: Arguments, patch: Patch) -> Size:
    shapes = arguments["img_shapes"]
    shapes = [shape for sample in shapes for shape in ([sample] if isinstance(sample, tuple) else sample)]
    samples = len(arguments["hidden_states"])
    if len(set(shapes)) > 1 or len(shapes) not in (1, samples):
        raise DataError("masks need the picture that is drawn to be the only one that the model sees")
    frames, height, width = shapes[0]
    return frames, height, width


def _named(arguments: Arguments, patch: Patch) -> Size:
    found = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
    if not all(isinstance(size, int) for size in found):
        raise DataError("masks need the model to be told num_frames, height and width of its latents")
    return found  # type: ignore[return-value]


def _words(arguments: Arguments) -> tuple[int, ...]:
    return tuple(arguments["encoder_attention_mask"].sum(1).tolist())


_UNET = PictureLayout(_planar, pyramid=True)
_PLANAR = PictureLayout(_planar)
_AFTER_TEXT = PictureLayout(_planar, "in front")
_VIDEO = PictureLayout(_video)
_HUNYUAN_VIDEO = PictureLayout(_video, "behind", apart=("context_embedder",))
_FLUX = PictureLayout(_placed, "in front", packed=2)

LAYOUTS: dict[str, PictureLayout] = {
    "UNet2DConditionModel": _UNET,
    "PixArtTransformer2DModel": _PLANAR,
    "SanaTransformer2DModel": _PLANAR,
    "SD3Transformer2DModel": _PLANAR,
    "HunyuanDiT2DModel": _PLANAR,
    "LuminaNextDiT2DModel": _PLANAR,
    "PRXTransformer2DModel": _PLANAR,
    "AuraFlowTransformer2DModel": _AFTER_TEXT,
    "CogView3PlusTransformer2DModel": _AFTER_TEXT,
    "CogView4Transformer2DModel": _AFTER_TEXT,
    "FluxTransformer2DModel": _FLUX,
    "Flux2Transformer2DModel": _FLUX,
    "ChromaTransformer2DModel": _FLUX,
    "BriaTransformer2DModel": _FLUX,
    "BriaFiboTransformer2DModel": _FLUX,
    "LongCatImageTransformer2DModel": _FLUX,
    "OvisImageTransformer2DModel": _FLUX,
    "QwenImageTransformer2DModel": PictureLayout(_shaped, packed=2),
    "HunyuanImageTransformer2DModel": PictureLayout(_planar, "behind", apart=("context_embedder",)),
    "ErnieImageTransformer2DModel": PictureLayout(_planar, "behind"),
    "Lumina2Transformer2DModel": PictureLayout(_planar, "in front", lengths=_words, apart=("context_refiner",)),
    "ZImageTransformer2DModel": PictureLayout(_listed, "behind", apart=("context_refiner",)),
    "Kandinsky5Transformer3DModel": PictureLayout(_channels_last, apart=("text_transformer_blocks",)),
    "WanTransformer3DModel": _VIDEO,
    "WanVACETransformer3DModel": _VIDEO,
    "SkyReelsV2Transformer3DModel": _VIDEO,
    "SanaVideoTransformer3DModel": _VIDEO,
    "HunyuanVideoTransformer3DModel": _HUNYUAN_VIDEO,
    "HunyuanVideo15Transformer3DModel": _HUNYUAN_VIDEO,
    "LTXVideoTransformer3DModel": PictureLayout(_named),
}


class DenoiserCanvas:
    """The picture that one denoiser draws: a hook that looks at every call before the model runs.

    Args:
        scale: pixels to a latent and side, where it is known.
    """

    def __init__(self, model: nn.Module, layout: PictureLayout, scale: int | None) -> None:
        self.layout = layout
        self.model = type(model).__name__
        self.patch = _patch(model)
        self.parameters = list(inspect.signature(type(model).forward).parameters)[1:]
        self.pixels = scale and scale * layout.packed * self.patch[2]
        self.picture: Size | None = None
        self.lengths: tuple[int, ...] = ()
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        self.picture = self.layout.read(arguments, self.patch)
        self.lengths = () if self.layout.lengths is None else self.layout.lengths(arguments)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in tokens; of a UNet in latents."""
        assert self.picture is not None
        return self.picture[1], self.picture[2]

    def describe(self) -> str:
        height, width = self.size
        if self.pixels is None:
            return f"{width} x {height} of the model's cells"
        return f"{width * self.pixels} x {height * self.pixels}"

    def shows(self, layer: str) -> bool:
        """Whether a layer sees the picture, and not the text alone."""
        return not any(layer.startswith(f"{part}.") for part in self.layout.apart)

    def grid(self, tokens: int) -> TokenGrid:
        if self.picture is None:
            raise DataError(f"masks act while the {self.model} itself is called, and a layer was called on its own")
        frames, height, width = self.picture
        factor = 1
        if self.layout.pyramid:
            while factor < max(height, width) and -(-height // factor) * -(-width // factor) > tokens:
                factor *= 2
        grid = TokenGrid(frames, -(-height // factor), -(-width // factor))
        others = tokens - frames * grid.height * grid.width
        if others and self.lengths and others == max(self.lengths):
            return TokenGrid(frames, grid.height, grid.width, self.lengths)
        if others > 0 and self.layout.text == "in front" and not self.lengths:
            return TokenGrid(frames, grid.height, grid.width, (others,))
        if others and not (others > 0 and self.layout.text == "behind"):
            raise DataError(
                f"a layer of {self.model} sees {tokens} tokens, and the picture has {frames} x {height} x {width}: "
                "which of them are the picture's is not known, so no mask can be put on them. Take the masks off"
            )
        return grid


def _patch(model: Any) -> Patch:
    """(frames, height, width) of the patches that a model makes of its latents."""
    found = getattr(model.config, "patch_size", None) or 1
    sides = [found] * 2 if isinstance(found, int) else list(found)
    time = getattr(model.config, "patch_size_t", None) or 1
    frames, height, width = [time, *sides][-3:]
    return frames, height, width


def canvas_of(model: nn.Module, scale: int | None = None) -> DenoiserCanvas:
    """The canvas of a denoiser; the first time it is asked for, the model gets its hook.

    Raises:
        ModelError: it is not known where the picture is in what this model computes.
    """
    there = _hooked(model)
    if there is not None:
        return there
    names = [base.__name__ for base in type(model).__mro__]
    layout = next((LAYOUTS[name] for name in names if name in LAYOUTS), None)
    if layout is None:
        raise ModelError(
            f"masks do not know where the picture is in what {names[0]} computes; use its adapters without a mask"
        )
    return DenoiserCanvas(model, layout, scale)


def release(model: nn.Module) -> None:
    """Take the hook off again."""
    there = _hooked(model)
    if there is not None:
        there.handle.remove()


def _hooked(model: nn.Module) -> DenoiserCanvas | None:
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, DenoiserCanvas)), None)
