"""Adapters on a part of the picture, on every kind of model."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers

from comcat import customize
from comcat.customize.adapter.components import denoiser, find_addable
from comcat.customize.adapter.masking import as_mask
from comcat.errors import ComcatError, DataError, ModelError
from comcat.hosts import canvases
from diffusion import MODELS, fill, inputs, model, output, pipeline, snapshot

HEIGHT, WIDTH = 4, 6


def wide(name: str, m: Any) -> tuple[dict[str, Any], int, int]:
    """Inputs for a picture that is no square, and its height and width in tokens (of a UNet in latents)."""
    x = inputs(m)
    key = "sample" if "sample" in x else "hidden_states"
    if x[key].ndim == 3:
        return x, 2, 3  # packed
    generator = torch.Generator().manual_seed(4)
    x[key] = torch.randn(2, x[key].shape[1], HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    patch = m.config.get("patch_size", 1) if "hidden_states" in x else 1
    return x, HEIGHT // patch, WIDTH // patch


def pictures(height: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hard = torch.zeros(height, width)
    hard[0, width // 2 :] = 1
    return {"hard": hard, "soft": torch.rand(height * 3, width * 3, generator=generator), "white": torch.ones(2, 3)}


def outputs_of(m: Any, x: dict[str, Any], layer: str) -> tuple[Tensor, Tensor | None]:
    """What an attention layer gives for its (first) stream, and for the text."""
    kept: list[Any] = []
    hook = m.get_submodule(layer).register_forward_hook(lambda _, __, out: kept.append(out))
    output(m, x)
    hook.remove()
    found = kept[0]
    return found if isinstance(found, tuple) else (found, None)


def names(host: str) -> list[str]:
    return list(find_addable("transformer", model(host))[0])


LAYERS = [(host, name) for host in MODELS for name in names(host)]


@pytest.mark.parametrize(("host", "name"), LAYERS)
def test_inside_it_acts_and_outside_it_does_not(host: str, name: str) -> None:
    """In every attention layer, at its resolution, the tokens of the text left alone."""
    m = model(host)
    x, height, width = wide(host, m)
    base, _ = outputs_of(m, x, name)
    handle = fill(customize.add_adapter(m, targets=[name]))
    full, text = outputs_of(m, x, name)
    others = full.shape[1] - height * width if denoiser(m)[0] == "transformer" else 0
    rows, columns = height, width
    while rows * columns > full.shape[1] - others:
        rows, columns = -(-rows // 2), -(-columns // 2)
    assert rows * columns == full.shape[1] - others
    hard = torch.zeros(rows, columns)
    hard[0, columns // 2 :] = 1
    handle.mask = hard
    found, words = outputs_of(m, x, name)
    inside = torch.cat([torch.ones(others), hard.flatten()]).bool()
    torch.testing.assert_close(found[:, inside], full[:, inside], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found[:, ~inside], base[:, ~inside], rtol=1e-11, atol=1e-11)
    assert not torch.allclose(full[:, ~inside], base[:, ~inside])
    if text is not None and words is not None:
        torch.testing.assert_close(words, text, rtol=1e-11, atol=1e-11)
    handle.mask = np.full((2, 3), 0.25)
    gray, _ = outputs_of(m, x, name)
    handle.mask = None
    handle.scale = 0.25
    quarter, _ = outputs_of(m, x, name)
    if text is None and not others:
        torch.testing.assert_close(gray, quarter, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("host", MODELS)
def test_on_the_whole_model(host: str) -> None:
    """White is no mask; two adapters on two parts; taken off, nothing is left; a copy is on its own."""
    m = model(host)
    x, height, width = wide(host, m)
    base, before = output(m, x), snapshot(m)
    one = fill(customize.add_adapter(m, name="one", rank=1))
    fill(customize.add_adapter(m, name="two"), 2)
    both = output(m, x)
    one.mask = torch.ones(height, width)
    torch.testing.assert_close(output(m, x), both, rtol=1e-10, atol=1e-10)
    left = torch.zeros(height, width)
    left[:, : width // 2] = 1
    scales = {"one": 1.0, "two": 1.0}
    customize.set_adapters(m, scales, {"one": left, "two": 1 - left})
    apart = output(m, x)
    assert not torch.allclose(apart, both)
    customize.set_adapters(m, scales)  # masks stay
    torch.testing.assert_close(output(m, x), apart, rtol=1e-10, atol=1e-10)
    another = copy.deepcopy(m)
    customize.remove_adapter(another, "two")
    assert customize.get_adapter(another, "one").mask is not None
    customize.set_adapters(m, scales, {})
    assert one.mask is None
    assert not m._forward_pre_hooks
    assert len(another._forward_pre_hooks) == 1
    torch.testing.assert_close(output(m, x), both, rtol=1e-10, atol=1e-10)
    one.mask = left
    assert repr(one).endswith("masked)")
    for name in scales:
        customize.remove_adapter(m, name)
    assert snapshot(m) == before
    assert not m._forward_pre_hooks
    assert torch.equal(output(m, x), base)


@pytest.mark.parametrize("host", ["sd1", "sd3", "flux"])
def test_in_a_pipeline(host: str) -> None:
    """Guidance and several pictures at once: what a mask does depends on neither; text encoders stay on."""
    pipe = pipeline(host)

    def draw(*seeds: int) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        found: Tensor = pipe(
            ["a photo of a dog"] * len(seeds),
            height=8,
            width=8,
            num_inference_steps=2,
            generator=generators,
            output_type="latent",
        ).images
        return found

    handle = fill(customize.add_adapter(pipe, text_encoder_rank=2))
    handle.mask = Image.fromarray(np.uint8([[255, 0], [0, 0]]))
    both, alone = draw(3, 4), draw(4)
    torch.testing.assert_close(alone[0], both[1], rtol=1e-3, atol=1e-3)
    handle.mask = None
    assert not torch.allclose(draw(4), alone, rtol=1e-2, atol=1e-2)
    handle.mask = torch.ones(4, 6)
    with pytest.raises(DataError, match=r"mask of 'default' is 6 x 4 pixels .*, and the picture 8 x 8: .*aspect ratio"):
        draw(3)


def test_in_slices() -> None:
    pipe = pipeline("sd1")
    fill(customize.add_adapter(pipe)).mask = torch.tensor([[1.0, 0.3]])
    size = {"height": 8, "width": 16, "steps": 1}
    whole = customize.generate(pipe, ["a dog"], **size)[0][0]
    pipe.enable_attention_slicing(1)
    np.testing.assert_allclose(
        np.asarray(customize.generate(pipe, ["a dog"], **size)[0][0], int), np.asarray(whole, int), atol=1
    )


# What a mask can be


def test_whatever_an_image_comes_in(tmp_path: Path) -> None:
    expected = torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.float64)
    pixels = np.uint8(expected.numpy() * 255)
    image = Image.fromarray(pixels)
    clear = Image.fromarray(np.stack([np.full_like(pixels, 255)] * 3 + [pixels], -1))  # white on nothing
    wide = Image.fromarray(np.uint16(pixels) * 257)
    ways: list[Any] = [image, image.convert("RGB"), image.convert("P"), image.convert("1"), clear, wide]
    ways += [pixels, pixels > 0, pixels / 255, torch.tensor(pixels), expected.half()[None], expected.numpy().tolist()]
    for way in ways[:-1]:
        assert torch.equal(as_mask(way), expected)
    for name in ("a.png", "a.bmp"):
        image.save(tmp_path / name)
        assert torch.equal(as_mask(tmp_path / name), expected)
        assert torch.equal(as_mask(str(tmp_path / name)), expected)
    with pytest.raises(DataError, match="a mask is an image, the path of one, an array or a tensor, not list"):
        as_mask(ways[-1])


COLOURED = Image.new("RGB", (3, 2), "red")

REFUSED: dict[str, tuple[Any, str]] = {
    "black": (torch.zeros(2, 3), "the mask is black everywhere, so that the adapter would act nowhere"),
    "clear": (Image.new("RGBA", (3, 2), (255, 255, 255, 0)), "black everywhere"),
    "colours": (COLOURED, "the mask has colours; paint it white where the adapter acts"),
    "beyond": (torch.tensor([[0.0, 255.0]]), r"numbers in \[0, 1\], and this one 0 to 255; .* as uint8"),
    "nan": (torch.tensor([[0.0, float("nan")]]), r"numbers in \[0, 1\]"),
    "batch": (torch.ones(2, 3, 4), r"of the shape \(height, width\), not \(2, 3, 4\)"),
    "none": (torch.ones(0, 3), r"of the shape \(height, width\), not \(0, 3\)"),
    "complex": (torch.ones(2, 3, dtype=torch.complex64), "not complex ones"),
    "float image": (Image.new("F", (3, 2), 1.0), "32-bit pixels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    given, message = REFUSED[case]
    with pytest.raises(DataError, match=message):
        as_mask(given)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(DataError, match=r"the mask '.*a.png' cannot be read \(not an image\). Give a PNG or JPEG"):
        as_mask(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"there is no mask '.*b.png'"):
        as_mask(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"the mask '.*' cannot be read \(Is a directory\)"):
        as_mask(tmp_path)
    COLOURED.save(tmp_path / "c.png")
    with pytest.raises(DataError, match=r"the mask '.*c.png' has colours"):
        as_mask(tmp_path / "c.png")


def test_a_refused_mask_changes_nothing() -> None:
    m = model("sd1")
    x, height, width = wide("sd1", m)
    handle = fill(customize.add_adapter(m))
    handle.mask = np.eye(height, width)
    before = output(m, x)
    with pytest.raises(DataError):
        handle.mask = torch.zeros(height, width)
    with pytest.raises(DataError):
        customize.set_adapters(m, {"default": 2.0}, {"default": "nowhere.png"})
    with pytest.raises(DataError, match="there is a mask for 'other', which is not among the adapters"):
        customize.set_adapters(m, {"default": 2.0}, {"other": np.ones((1, 1))})
    torch.testing.assert_close(output(m, x), before)


def test_a_lora_has_no_mask(tmp_path: Path) -> None:
    m = model("sd1")
    customize.add_adapter(m).mask = torch.ones(1, 1)
    with pytest.raises(ModelError, match="'default' has a mask, and a LoRA acts everywhere; take it off first"):
        customize.export_lora(m, tmp_path / "lora.safetensors")


# Where there is no picture, or none that is known


def test_an_adapter_of_the_text_alone() -> None:
    pipe = pipeline("sd1")
    handle = customize.add_adapter(pipe, text_encoder_rank=1)
    handle.layers = {key: layer for key, layer in handle.layers.items() if key[0] != "unet"}
    with pytest.raises(ModelError, match="'default' adds nothing to the unet, where the picture is"):
        handle.mask = torch.ones(1, 1)


def test_a_model_that_masks_do_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model("sd1")
    handle = customize.add_adapter(m)
    monkeypatch.delitem(canvases.LAYOUTS, "UNet2DConditionModel")
    with pytest.raises(ModelError, match="masks do not know where the picture is in what UNet2DConditionModel"):
        handle.mask = torch.ones(1, 1)
    assert handle.mask is None


def test_a_layer_called_on_its_own() -> None:
    m = model("sd1")
    handle = fill(customize.add_adapter(m, targets="attn1"))
    handle.mask = torch.ones(1, 1)
    (_, name), _ = next(iter(handle.layers.items()))
    with pytest.raises(DataError, match="masks act while the UNet2DConditionModel itself is called"):
        m.get_submodule(name)(torch.zeros(1, 5, 10, dtype=torch.float64))
    output(m, inputs(m))
    with pytest.raises(DataError, match=r"sees 5 tokens, and the picture has 1 x 4 x 4: .* Take the masks off"):
        m.get_submodule(name)(torch.zeros(1, 5, 10, dtype=torch.float64))


def test_layouts_are_of_models_that_there_are() -> None:
    for name in canvases.LAYOUTS:
        assert hasattr(diffusers, name), name


def latents(*shape: int) -> dict[str, Tensor]:
    return {"hidden_states": torch.zeros(shape)}


ids = torch.cartesian_prod(torch.arange(1), torch.arange(3), torch.arange(5)).float()
more = torch.cat([ids, ids + torch.tensor([1.0, 0, 0])])

READ: dict[str, tuple[str, dict[str, Any], int, Any]] = {
    "flux": ("Flux", {"img_ids": ids + 7}, 15, ((1, 3, 5), (0,))),
    "flux text": ("Flux", {"img_ids": ids}, 22, ((1, 3, 5), (7,))),
    "flux batch": ("Flux2", {"img_ids": torch.cat([ids, ids[:, :1]], 1).expand(2, -1, -1)}, 15, ((1, 3, 5), (0,))),
    "flux two": ("Flux", {"img_ids": more}, 30, "the only one that the model sees"),
    "qwen": ("QwenImage", {**latents(2, 15, 8), "img_shapes": [[(1, 3, 5)]] * 2}, 15, ((1, 3, 5), (0,))),
    "qwen two": ("QwenImage", {**latents(1, 30, 8), "img_shapes": [[(1, 3, 5)] * 2]}, 30, "the only one"),
    "hunyuan": ("HunyuanImage", latents(2, 4, 6, 10), 22, ((1, 3, 5), (0,))),
    "lumina": (
        "Lumina2",
        {**latents(2, 4, 6, 10), "encoder_attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])},
        18,
        ((1, 3, 5), (2, 3)),
    ),
    "z": ("ZImage", {"x": [torch.zeros(4, 1, 6, 10)] * 2}, 32, ((1, 3, 5), (0,))),
    "z omni": ("ZImage", {"x": [[torch.zeros(4, 1, 6, 10)]] * 2}, 32, "pictures of one size"),
    "kandinsky": ("Kandinsky5", latents(2, 2, 6, 10, 4), 30, ((2, 3, 5), (0,))),
    "kandinsky sparse": (
        "Kandinsky5",
        {**latents(2, 2, 6, 10, 4), "sparse_params": {"to_fractal": True}},
        30,
        "sparse attention",
    ),
    "wan": ("Wan", latents(2, 4, 2, 6, 10), 30, ((2, 3, 5), (0,))),
    "ltx": ("LTXVideo", {"num_frames": 2, "height": 3, "width": 5}, 30, ((2, 3, 5), (0,))),
    "ltx places": ("LTXVideo", {"video_coords": None}, 30, "to be told num_frames, height and width"),
    "sd3": ("SD3", latents(2, 4, 6, 10), 15, ((1, 3, 5), (0,))),
    "sd3 more": ("SD3", latents(2, 4, 6, 10), 16, "sees 16 tokens, and the picture has 1 x 3 x 5"),
    "unet": ("UNet", {"sample": torch.zeros(2, 4, 9, 13)}, 12, ((1, 3, 4), (0,))),
}


@pytest.mark.parametrize("case", READ)
def test_what_a_call_says_of_its_picture(case: str) -> None:
    name, arguments, tokens, expected = READ[case]
    layout = next(layout for known, layout in canvases.LAYOUTS.items() if known.startswith(name))
    canvas = canvases.DenoiserCanvas.__new__(canvases.DenoiserCanvas)
    canvas.layout, canvas.model, canvas.parameters = layout, name, []
    canvas.patch = (1, 1, 1) if name == "UNet" else (1, 2, 2)

    def read() -> Any:
        canvas(torch.nn.Identity(), (), arguments)
        return canvas.grid(tokens)

    if isinstance(expected, str):
        with pytest.raises(ComcatError, match=re.escape(expected)):
            read()
        return
    grid = read()
    assert ((grid.frames, grid.height, grid.width), grid.before) == expected
