"""Models of torchvision and open_clip: saved and loaded, opened by name and from directories, and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torchvision.models as zoo
from safetensors.torch import save_file
from torch import nn

import comcat
from comcat.errors import CheckpointError, ModelError
from comcat.models.libraries import said_classes
from comcat.models.profile import default_input_size
from comcat.models.source import describe
from conftest import assert_same_outputs, images, randomize
from test_checkpoint import check_same, edit
from test_cli import Result
from test_data import make_folder

VIT = {"image_size": 14, "patch_size": 7, "num_layers": 2, "num_heads": 3, "hidden_dim": 15, "mlp_dim": 17}
SWIN = {"patch_size": [2, 2], "embed_dim": 10, "depths": [2, 1], "num_heads": [2, 5], "window_size": [2, 2]}
CLIP = {
    "embed_dim": 13,
    "vision_cfg": {"layers": 2, "width": 15, "head_width": 5, "patch_size": 7, "image_size": 14, "mlp_ratio": 1.2},
    "text_cfg": {"layers": 1, "width": 10, "heads": 2, "vocab_size": 23, "context_length": 11},
}
HOSTS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: zoo.VisionTransformer(**VIT, num_classes=11, dropout=0.25),
    "swin": lambda: zoo.SwinTransformer(**SWIN, mlp_ratio=1.7, num_classes=11),
    "builder": lambda: zoo.mobilenet_v3_small(num_classes=11),
    "image tower": lambda: open_clip.CLIP(**CLIP).visual,
}


def make(name: str) -> Any:
    return randomize(HOSTS[name]()).eval()


@pytest.mark.parametrize("name", HOSTS)
def test_save_then_load(name: str, tmp_path: Path) -> None:
    model = make(name)
    comcat.save(model, tmp_path / "out")
    check_same(model, comcat.load(tmp_path / "out"))


@pytest.mark.parametrize("cls", [open_clip.CLIP, open_clip.CustomTextCLIP])
def test_dual_encoders(cls: Any, tmp_path: Path) -> None:
    model = randomize(cls(**CLIP, quick_gelu=True, init_logit_bias=0.1)).eval()
    comcat.save(model, tmp_path / "out")
    again = comcat.load(tmp_path / "out")
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    words = torch.arange(11)[None] % 23
    with torch.no_grad():
        assert_same_outputs(again.encode_text(words), model.encode_text(words))


def test_builders_are_found_by_their_shapes() -> None:
    with torch.device("meta"):
        model = zoo.vit_b_32(num_classes=7)
    source = describe(model)
    assert (source.name, source.args) == ("vit_b_32", {"num_classes": 7})
    assert default_input_size(model) == (3, 224, 224)
    assert said_classes(model) == 7


def test_a_builder_with_a_checkpoint(tmp_path: Path) -> None:
    model = make("builder")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    args = {"num_classes": 11}
    opened = comcat.load_model("torchvision/mobilenet_v3_small", tmp_path / "w.safetensors", args)
    x = images(model, 2)
    with torch.no_grad():
        assert_same_outputs(opened(x), model(x))
    assert opened.comcat_source.config["crop_pct"] == 224 / 256
    with pytest.raises(ModelError, match="2 tensors of another shape"):
        comcat.load_model("torchvision/mobilenet_v3_small", tmp_path / "w.safetensors", {"num_classes": 5})


def test_a_directory_of_open_clip(tmp_path: Path) -> None:
    model = randomize(open_clip.CLIP(**CLIP)).eval()
    prepared = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}
    content = {"model_cfg": CLIP, "preprocess_cfg": prepared}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"holds no open_clip_model\.safetensors"):
        comcat.load_model(str(tmp_path))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    tower = comcat.load_model(str(tmp_path))
    x = images(tower, 2)
    with torch.no_grad():
        assert_same_outputs(tower(x), model.encode_image(x))
    assert tower.comcat_source.config["crop_mode"] == "squash"
    assert said_classes(tower) == 0
    both = comcat.load_model(str(tmp_path), model_args={"towers": "both"})
    assert type(both) is open_clip.CLIP
    content["model_cfg"] = {**CLIP, "text_cfg": {"hf_model_name": "somebody/model"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="would be looked for on the network"):
        comcat.load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision/nothing", "torchvision has no classification model 'nothing'"),
        ("torchvision/vit_b_16", "HF_HUB_OFFLINE is set and .* is not there"),
        ("open_clip/nothing", "open_clip has no model named 'nothing'"),
        ("open_clip/ViT-B-32", "name the weights of 'ViT-B-32' as open_clip/ViT-B-32/TAG, of openai"),
    ],
)
def test_names_that_are_refused(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ModelError, match=message):
        comcat.load_model(name)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vit", lambda a: a.update(name="evil"), "no classification model 'evil'"),
        ("vit", lambda a: a["args"].update(norm_layer="evil"), "with 'norm_layer', which is no argument"),
        ("vit", lambda a: a["args"].update(num_layers=10**6), "no architecture has more than 1000 layers"),
        ("image tower", lambda a: a.update(name="CoCa"), "open_clip has no architecture 'CoCa'"),
        ("image tower", lambda a: a["args"]["model_cfg"].update(evil=1), "unknown fields evil"),
        (
            "image tower",
            lambda a: a["args"]["model_cfg"]["vision_cfg"].update(timm_model_name="hf-hub:evil/model"),
            "timm has no architecture 'hf-hub:evil/model'",
        ),
    ],
)
def test_descriptions_that_are_refused(
    name: str, change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path, sockets_blocked: list[Any]
) -> None:
    comcat.save(make(name), tmp_path / "out")
    edit(tmp_path / "out", lambda config: change(config["architecture"]))
    with pytest.raises(CheckpointError, match=message):
        comcat.load(tmp_path / "out")


def test_compress_and_evaluate(tmp_path: Path, sockets_blocked: list[Any]) -> None:
    """Through the commands, from a saved dense model."""
    for split in ("train", "val"):
        make_folder(tmp_path / "data" / split, per_class=3)
    comcat.save(randomize(zoo.VisionTransformer(**VIT, num_classes=3)), tmp_path / "dense")
    data = ["--data", tmp_path / "data", "--device", "cpu", "--workers", 0, "--json", "--batch-size", 3]
    norm = ["--mean", 0.4, 0.5, 0.6, "--std", 1, 1, 1]
    out = ["--out", tmp_path / "small", "--keep", 0.9, "--data-free"]
    result = Result(["compress", tmp_path / "dense", *data, *norm, *out])
    assert result.code == 0, result.err
    result = Result(["evaluate", tmp_path / "small", *data])
    assert result.code == 0, result.err
