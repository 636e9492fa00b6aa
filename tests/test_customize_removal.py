"""Nothing is left of an adapter once it is off, in files, in copies and in pipelines around the same models."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from comcat import customize
from diffusion import MODELS, fill, inputs, model, on, output, picture, pipeline, snapshot

# Taken off


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left(name: str) -> None:
    m = model(name, torch.float32)
    x = inputs(m, torch.float32)
    base, before, state = output(m, x), snapshot(m), {k: v.clone() for k, v in m.state_dict().items()}
    one = fill(customize.add_adapter(m, name="one", rank=1))
    two = fill(customize.add_adapter(m, name="two", targets="*.attn*"), 2)
    assert not torch.equal(output(m, x), base)
    alone = {n: output(m, x) for n in ("one", "two") if customize.set_adapters(m, {n: 1.0}) is None}
    customize.set_adapters(m, {"one": 1.0, "two": 1.0})
    one.remove()
    assert torch.equal(output(m, x), alone["two"])
    two.remove()
    assert snapshot(m) == before
    assert m.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in m.state_dict().items())
    assert torch.equal(output(m, x), base)
    assert customize.adapters(m) == {}


def same_tensors(loaded: nn.Module, original: nn.Module) -> None:
    """Bitwise. Outputs are not: tensors lie otherwise in memory, and sums are taken in another order."""
    found, expected = loaded.state_dict(), original.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def written(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_a_pipeline_is_saved_as_it_was_loaded(name: str, tmp_path: Path) -> None:
    pipe = pipeline(name)
    base = picture(pipe)
    parts = {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)}
    before = {key: snapshot(part) for key, part in parts.items()}
    tokenizer = pipe.tokenizer
    pipe.save_pretrained(tmp_path / "before")
    adapter = fill(customize.add_adapter(pipe, text_encoder_rank=1, token="V*"))
    token = customize.add_adapter(
        pipe, name="token", targets="mid_block" if hasattr(pipe, "unet") else None, token="<x>"
    )
    pipe.save_pretrained(tmp_path / "on")
    assert not torch.equal(picture(pipe, "a V* dog"), base)  # and still on afterwards
    token.remove()
    adapter.remove()
    pipe.save_pretrained(tmp_path / "off")
    assert written(tmp_path / "on") == written(tmp_path / "before") == written(tmp_path / "off")
    assert {key: snapshot(part) for key, part in parts.items()} == before
    assert pipe.tokenizer is tokenizer
    empty = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
    again = type(pipe).from_pretrained(tmp_path / "on", local_files_only=True, **empty)
    for key, part in parts.items():
        same_tensors(getattr(again, key), part)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_saved_as_it_was_loaded(name: str, tmp_path: Path) -> None:
    m, _, _, adapter = on(name)
    m.save_pretrained(tmp_path)
    again = type(m).from_pretrained(tmp_path, local_files_only=True)
    adapter.remove()
    same_tensors(again, m)


def test_a_token_alone_stays_out_of_files_too(tmp_path: Path) -> None:
    pipe = pipeline()
    handle = customize.add_adapter(pipe, token="V*")
    pipe.text_encoder.save_pretrained(tmp_path)
    assert not any("extra" in key for key in load_file(tmp_path / "model.safetensors"))
    handle.remove()


# Copies


def test_a_copy_of_the_model_has_its_own_adapters() -> None:
    pipe = pipeline()
    adapter = fill(customize.add_adapter(pipe, text_encoder_rank=1, token="V*"))
    base = picture(pipe)
    unet = copy.deepcopy(pipe.unet)
    copied = customize.adapters(unet)["default"]
    assert copied.pipe is unet
    assert copied.ranks.keys() == {"unet"}
    assert copied.token is None
    attn1 = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert unet.get_submodule(attn1).extras["default"] is copied.layers["unet", attn1]
    copied.scale = 0.5
    fill(copied, 9)
    assert adapter.scale == 1.0
    assert torch.equal(picture(pipe), base)
    copied.remove()
    assert customize.adapters(unet) == {}
    assert customize.adapters(pipe) == {"default": adapter}
    assert not any("adapters" in key for key in unet.state_dict())


def test_a_copy_of_the_pipeline_is_saved_and_cleared_on_its_own(tmp_path: Path) -> None:
    pipe = pipeline()
    base = picture(pipe)
    adapter = fill(customize.add_adapter(pipe, text_encoder_rank=1, token="V*"))
    expected = picture(pipe, "a V* dog")
    other = copy.deepcopy(pipe)
    copied = customize.get_adapter(other, "default")
    assert copied.pipe is other
    assert copied is not adapter
    assert torch.equal(picture(other, "a V* dog"), expected)
    copied.remove()
    assert torch.equal(picture(other), base)
    assert torch.equal(picture(pipe, "a V* dog"), expected)
    other.save_pretrained(tmp_path)
    assert UNet2DConditionModel.from_pretrained(tmp_path / "unet", local_files_only=True) is not None


def test_another_pipeline_around_the_same_models() -> None:
    pipe = pipeline()
    base = picture(pipe)
    adapter = fill(customize.add_adapter(pipe, token="V*"))
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    assert customize.adapters(other) == {"default": adapter}
    customize.remove_adapter(other, "default")
    assert customize.adapters(pipe) == {}
    assert other.tokenizer is pipe.tokenizer
    assert "V*" not in pipe.tokenizer.get_vocab()
    assert torch.equal(picture(pipe), base)


def test_removal_by_the_model_alone() -> None:
    pipe = pipeline()
    base = picture(pipe)
    fill(customize.add_adapter(pipe, text_encoder_rank=1, token="V*"))
    customize.remove_adapter(pipe.unet, "default")
    assert torch.equal(picture(pipe), base)
    assert "V*" not in pipe.tokenizer.get_vocab()


def test_state_can_be_pickled() -> None:
    _, _, _, adapter = on("sd3")
    state = pickle.loads(pickle.dumps(adapter.state_dict()))
    assert all(torch.equal(value, state[key]) for key, value in adapter.state_dict().items())
