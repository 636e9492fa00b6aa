"""The adapter file: what is written comes back, and anything else is refused with a reason."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from comcat import customize
from comcat.customize.files.encoding import products_error
from comcat.errors import CheckpointError, ModelError
from diffusion import MODELS, fill, inputs, metadata, model, output, picture, pipeline, refused

STORAGES = ("float32", "float16", "bfloat16", "int8", "nf4")
#: Largest relative error of a product; rounding of the numbers alone.
ROUNDING = {"int8": 0.03, "nf4": 0.25}


@pytest.fixture(scope="module")
def unet() -> Any:
    return model("sd1", torch.float32)


@pytest.fixture
def saved(unet: Any, tmp_path: Path) -> Path:
    adapter = fill(customize.add_adapter(unet, targets="mid_block", rank=2, name="dog", scale=0.7))
    path: Path = customize.save_adapter(unet, tmp_path / "dog.safetensors")
    adapter.remove()
    return path


# There and back


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", MODELS)
def test_comes_back(name: str, storage: Any, tmp_path: Path) -> None:
    m = model(name, torch.float32)
    adapter = fill(customize.add_adapter(m, rank=2, name="dog"))
    if storage.endswith("float16"):
        for parameter in adapter.parameters():
            parameter.data = parameter.data.to(getattr(torch, storage)).float()
    state = {key: value.clone() for key, value in adapter.state_dict().items()}
    customize.save_adapter(m, tmp_path / "x.safetensors", storage=storage)
    adapter.remove()
    again = customize.load_adapter(m, tmp_path / "x.safetensors")
    found = again.state_dict()
    assert found.keys() == state.keys()
    assert all(found[key].shape == value.shape for key, value in state.items())
    if storage in ROUNDING:  # other factors of the same products
        header, stored = customize.read_adapter(tmp_path / "x.safetensors")
        assert all(torch.equal(found[key], value) for key, value in stored.items())
        assert products_error(header, state, found) < ROUNDING[storage]
    else:
        assert all(torch.equal(found[key], value) for key, value in state.items())
    assert again.name == "dog"
    assert not any(p.requires_grad for p in again.parameters())


def test_output_comes_back(unet: Any, saved: Path) -> None:
    x = inputs(unet, torch.float32)
    base = output(unet, x)
    first = customize.load_adapter(unet, saved)
    assert first.scale == 0.7
    expected = output(unet, x)
    first.remove()
    other = customize.load_adapter(unet, saved, name="cat", scale=0.2)
    assert (other.name, other.scale) == ("cat", 0.2)
    assert not torch.equal(output(unet, x), expected)
    other.scale = 0.7
    torch.testing.assert_close(output(unet, x), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="already"):
        customize.load_adapter(unet, saved, name="cat")
    with pytest.raises(ModelError, match="strength must be"):
        customize.load_adapter(unet, saved, scale=float("nan"))
    other.remove()
    assert torch.equal(output(unet, x), base)


@pytest.mark.parametrize("storage", STORAGES)
def test_sizes_and_metadata(unet: Any, storage: Any, tmp_path: Path) -> None:
    adapter = fill(customize.add_adapter(unet, rank={"attn1": 1, "attn2": 2}, name="dog", scale=-0.5))
    adapter.info = {"base": "some/model", "prompt": "a V* dog", "training": {"steps": 3}}
    path = customize.save_adapter(unet, tmp_path / "new folder" / "x.safetensors", storage=storage)
    adapter.remove()
    found = metadata(path)
    assert found["format"] == (2 if storage == "nf4" else 1)
    assert (found["name"], found["scale"], found["storage"]) == ("dog", -0.5, storage)
    assert found["base"] == {"name": "some/model", "class": "UNet2DConditionModel"}
    assert (found["prompt"], found["training"], found["token"]) == ("a V* dog", {"steps": 3}, None)
    layers = found["components"]["unet"]["layers"]
    assert {name: entry["rank"] for name, entry in layers.items()} == {n: 1 + ("attn2" in n) for n in layers}
    dtypes = {t.dtype for key, t in load_file(path).items() if not key.endswith(".scale")}
    assert dtypes == {torch.uint8 if storage == "nf4" else getattr(torch, storage)}
    header, tensors = customize.read_adapter(path)
    assert header.training == {"steps": 3}
    wanted = torch.float32 if storage in ROUNDING else getattr(torch, storage)
    assert {t.dtype for t in tensors.values()} == {wanted}


@pytest.mark.parametrize("storage", ROUNDING)
def test_zero_rows_are_rounded_too(unet: Any, storage: Any, tmp_path: Path) -> None:
    adapter = customize.add_adapter(unet)
    customize.save_adapter(unet, tmp_path / "x.safetensors", storage=storage)
    state = adapter.state_dict()
    adapter.remove()
    again = customize.load_adapter(unet, tmp_path / "x.safetensors")
    for key, value in again.state_dict().items():
        assert value.any() == state[key].any()
    again.remove()


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_tokens_and_text_encoders_come_back(name: str, tmp_path: Path) -> None:
    pipe = pipeline(name)
    count = 1 if name == "sd3" else 2
    adapter = customize.add_adapter(pipe, rank=1, text_encoder_rank=2, token="V*", token_vectors=count)
    fill(adapter)
    state, expected = adapter.state_dict(), picture(pipe, "a V* dog")
    path = customize.save_adapter(pipe, tmp_path / "x.safetensors")
    adapter.remove()
    assert metadata(path)["token"] == {"text": "V*", "vectors": count}
    again = customize.load_adapter(pipe, path, dtype=torch.float64)
    assert {p.dtype for p in again.parameters()} == {torch.float64}
    again.remove()
    again = customize.load_adapter(pipe, path)
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    torch.testing.assert_close(picture(pipe, "a V* dog"), expected, atol=1e-2, rtol=1e-3)
    with pytest.raises(ModelError, match="has learned 'V\\*' already"):
        customize.load_adapter(pipe, path, name="second")
    again.remove()
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    refused(denoiser, path, "for the text encoder 'text_encoder'")


def test_a_token_is_left_out_for_a_bare_model(tmp_path: Path) -> None:
    pipe = pipeline()
    adapter = fill(customize.add_adapter(pipe, token="V*"))
    path = customize.save_adapter(pipe, tmp_path / "x.safetensors")
    adapter.remove()
    assert customize.load_adapter(pipe.unet, path).token is None


def test_which_adapter(unet: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="0 adapters; add one first"):
        customize.save_adapter(unet, tmp_path / "x.safetensors")
    one, two = (customize.add_adapter(unet, name=name) for name in ("one", "two"))
    with pytest.raises(ModelError, match="2 adapters, one, two; say which"):
        customize.save_adapter(unet, tmp_path / "x.safetensors")
    assert metadata(customize.save_adapter(unet, tmp_path / "x.safetensors", name="two"))["name"] == "two"
    one.remove()
    two.remove()


# Writing


def test_nothing_is_left_of_a_write_that_failed(unet: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = customize.add_adapter(unet)
    content, folder = saved.read_bytes(), saved.parent
    with pytest.raises(CheckpointError, match="cannot write"):
        customize.save_adapter(unet, saved / "x.safetensors")
    with pytest.raises(CheckpointError, match="storage is 'int3'"):
        customize.save_adapter(unet, saved, storage="int3")  # type: ignore[arg-type]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device; nothing was written"):
        customize.save_adapter(unet, saved)
    monkeypatch.undo()
    assert saved.read_bytes() == content
    assert list(folder.iterdir()) == [saved]
    for value, storage in ((torch.nan, "float32"), (torch.inf, "int8"), (1e6, "float16"), (1e20, "nf4")):
        next(adapter.parameters()).data[0, 0] = value
        with pytest.raises(CheckpointError, match="NaN or infinite values in unet"):
            customize.save_adapter(unet, saved, storage=storage)  # type: ignore[arg-type]
    assert saved.read_bytes() == content
    assert list(folder.iterdir()) == [saved]
    adapter.remove()
