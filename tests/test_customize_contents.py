"""What an adapter file says of itself: its checksum, its tensors without a model, and files of the first format."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from comcat import CheckpointError
from comcat.customize import add_adapter, load_adapter, read_adapter, remove_adapter, save_adapter
from comcat.customize.files.contents import CHECKSUM
from comcat.customize.files.restoring import restore_adapter
from diffusion import changed, fill, picture, pipeline

DATA = Path(__file__).parent / "data"
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture(scope="module")
def pipe():
    """Shared: every test leaves it as it was."""
    return pipeline("sd1")


@pytest.fixture(params=["float32", "int8"])
def file(pipe, tmp_path, request):
    handle = fill(add_adapter(pipe, rank=2, targets="attn1", token="V*", name="dog"))
    save_adapter(pipe, tmp_path / "dog.safetensors", storage=request.param)
    handle.remove()
    return tmp_path / "dog.safetensors"


def test_damage_inside_the_numbers_is_noticed(pipe, file):
    """Every byte: one bit in the middle of each tensor, and in the header's text."""
    content = file.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    places = range(length + 1, len(content), max(1, (len(content) - length) // 40))
    places = [*places, len(content) - 1, content.index(b'\\"scale\\": 1.0') + 13]
    for place in places:
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match="does not match its checksum"):
            load_adapter(pipe, file)
    file.write_bytes(content)
    load_adapter(pipe, file).remove()


def test_files_without_a_checksum_are_read(pipe, file):
    with safe_open(file, "pt") as opened:
        assert set(opened.metadata()) == {"comcat", CHECKSUM}
    before = load_file(file)
    changed(file, lambda data, tensors: None)  # as earlier versions wrote it
    _, tensors = read_adapter(file)
    load_adapter(pipe, file).remove()
    assert len(tensors) == len([name for name in before if not name.endswith(".scale")])


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_files_of_the_first_format_are_read(storage):
    """Written, and drawn with, by the first release. The picture to 1e-3 of its size."""
    other = pipeline("sd1")
    path = DATA / f"adapter-format1-{storage}.safetensors"
    with safe_open(path, "pt") as opened:
        assert json.loads(opened.metadata()["comcat"])["format"] == 1
    handle = load_adapter(other, path)
    assert (handle.name, handle.scale, handle.token.text) == ("dog", 0.75, "V*")
    assert handle.info["prompt"] == "a photo of V* dog"
    wanted = load_file(DATA / "adapter-format1-expected.safetensors")[storage]
    got = picture(other, "a photo of V* dog")
    assert float((got - wanted).norm() / wanted.norm()) < 1e-3
    remove_adapter(other, "dog")
    assert float((picture(other, "a photo of a dog") - wanted).norm() / wanted.norm()) > 0.1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d, t: t.pop(f"{LAYER}.sample.query.weight"), r"missing \(.*query"),
        (lambda d, t: t.pop(f"{LAYER}.sample.output.weight"), r"missing \(.*output"),
        (lambda d, t: t.update({"x": torch.ones(2)}), r"too many \(x\)"),
        (lambda d, t: t.update({f"{LAYER}.sample.query.weight": torch.ones(4)}), "another shape"),
        (lambda d, t: t.update({f"{LAYER}.sample.query.weight": torch.ones(0, 10)}), "another shape"),
        (lambda d, t: t.update({f"{LAYER}.sample.query.weight": torch.ones(6, 10)}), "another shape"),
        (lambda d, t: t.update({f"{LAYER}.sample.other.weight": torch.ones(4, 10)}), "another shape"),
        (lambda d, t: t.update({f"{LAYER}.sample.query.bias": torch.ones(4)}), "another shape"),
        (lambda d, t: t.update({"token.text_encoder": torch.ones(2, 15)}), "another shape"),
        (lambda d, t: t.pop("token.text_encoder"), r"missing \(token\)"),
        (lambda d, t: d["components"]["unet"].update(layers={}), r"missing \(layers of unet\)"),
        (lambda d, t: d["components"]["unet"]["layers"].popitem(), "too many"),
        (lambda d, t: next(iter(d["components"]["unet"]["layers"].values())).update(rank=3), "another shape"),
        (lambda d, t: next(iter(d["components"]["unet"]["layers"].values())).update(rank=0), "another shape"),
        (lambda d, t: next(iter(d["components"]["unet"]["layers"].values())).update(biases=["sample.key"]), "missing"),
    ],
)
def test_another_storage_is_written_of_whole_adapters_only(pipe, tmp_path, edit, message):
    """Without a model there is the header to compare with."""
    handle = fill(add_adapter(pipe, rank=2, targets="attn1", token="V*"))
    save_adapter(pipe, tmp_path / "a.safetensors")
    handle.remove()
    changed(tmp_path / "a.safetensors", edit)
    with pytest.raises(CheckpointError, match=message):
        restore_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "int8")
    assert not (tmp_path / "b.safetensors").exists()


def test_numbers_beyond_the_storage_are_not_written(file, tmp_path):
    def large(_: Any, tensors: Any) -> None:
        for name in tensors:
            if name.endswith(("query.weight", "query.weight.scale")):
                tensors[name] = (tensors[name] * 1e6) if tensors[name].dtype == torch.float32 else tensors[name]

    changed(file, large)
    with pytest.raises(CheckpointError, match="too large for float16"):
        restore_adapter(file, tmp_path / "b.safetensors", "float16")
    assert not (tmp_path / "b.safetensors").exists()
