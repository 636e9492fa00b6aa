"""From what a user types to a model with weights."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import comcat
from comcat.errors import CheckpointError, ModelError
from comcat.models.source import Source, describe
from conftest import VIT, assert_same_outputs, images, make, swin, vit
from test_compress import half_plan

NAME = "vit_tiny_patch16_224"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file(vit(dtype=torch.float32).state_dict(), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_an_architecture_with_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    expected = vit(dtype=torch.float32)
    model = comcat.load_model(NAME, checkpoint, VIT).eval()
    x = images(expected)
    assert_same_outputs(model(x), expected(x))
    comcat.save(comcat.compress(model, half_plan(model)), tmp_path / "out")


def test_the_arguments_are_remembered(tmp_path: Path) -> None:
    """What could not be read off the model is known when comcat built it."""
    args = VIT | {"reg_tokens": 3, "qkv_bias": False}
    model = comcat.load_model(NAME, model_args=args, pretrained=False)
    small = comcat.compress(model, half_plan(model))
    comcat.save(small, tmp_path / "out")
    again = comcat.load_model(str(tmp_path / "out"))
    x = images(again)
    assert_same_outputs(again(x), small.eval()(x))
    assert again.comcat.source.args == args


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tinny_patch16_224", "timm has no model named 'vit_tinny_patch16_224'; did you mean vit_tiny_patch16_224"),
        ("zzzzzzzz", "timm has no model named 'zzzzzzzz'; see timm.list_models"),
        (
            "someone/model",
            "cannot load 'someone/model' from the Hub: HF_HUB_OFFLINE .*no directory of that name either",
        ),
        ("no/such/place", "neither a directory saved by comcat .* a Hub repository is written ORG/NAME"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        comcat.load_model(name)


def test_a_file_is_no_model(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="neither a directory saved by comcat"):
        comcat.load_model(str(checkpoint))


def test_a_directory_must_hold_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it has no comcat\.json"):
        comcat.load_model(str(tmp_path))


@pytest.mark.parametrize("extra", [{"checkpoint": "w.safetensors"}, {"model_args": {"depth": 2}}])
def test_a_saved_model_takes_no_arguments(tmp_path: Path, extra: dict[str, Any]) -> None:
    comcat.save(vit(dtype=torch.float32), tmp_path / "out")
    with pytest.raises(ModelError, match="takes neither a checkpoint nor model arguments"):
        comcat.load_model(str(tmp_path / "out"), **extra)


@pytest.mark.parametrize("args", [{"wheels": 4}, {"embed_dim": 16, "num_heads": 3}])
def test_arguments_that_the_architecture_does_not_take(args: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"'vit_tiny_patch16_224'.* with"):
        comcat.load_model(NAME, model_args=args, pretrained=False)


def test_weights_that_cannot_be_had() -> None:
    with pytest.raises(
        ModelError, match="cannot load 'nobody/nothing' from the Hub: HF_HUB_OFFLINE is set and the cache"
    ):
        comcat.load_model("hf-hub:nobody/nothing")
    with pytest.raises(
        ModelError, match=r"cannot load the pretrained weights of .*check the network, or give --checkpoint"
    ):
        comcat.load_model("vit_large_patch14_clip_336")


def test_unreadable_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        comcat.load_model(NAME, tmp_path / "missing.safetensors", VIT)
    pickled = tmp_path / "w.pth"
    torch.save({}, pickled)
    with pytest.raises(ModelError, match=r"not a \.safetensors file; pickled checkpoints can run code"):
        comcat.load_model(NAME, pickled, VIT)
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    with pytest.raises(ModelError, match=r"damaged or no safetensors"):
        comcat.load_model(NAME, checkpoint, VIT)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"depth": 3}, r"12 tensors missing \(blocks\.2\."),
        ({"depth": 1}, r"12 tensors unknown \(blocks\.1\."),
        ({"num_classes": 5}, r"2 tensors of another shape \(head\.weight is \(11, 15\), not \(5, 15\)"),
    ],
)
def test_checkpoints_that_do_not_fit_name_the_tensors(checkpoint: Path, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        comcat.load_model(NAME, checkpoint, VIT | args)


# -- where a model comes from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        vit,
        swin,
        lambda: make("deit_tiny_distilled_patch16_224", **VIT),
        lambda: vit(num_classes=0),
        lambda: vit(in_chans=5),
        lambda: swin(window_size=4, img_size=(16, 8)),
    ],
)
def test_a_described_model_can_be_built_again(model: Any) -> None:
    dense = model()
    source = describe(dense)
    again = source.build()
    shapes = {n: t.shape for n, t in dense.state_dict().items()}
    assert {n: t.shape for n, t in again.state_dict().items()} == shapes


def test_defaults_are_not_repeated() -> None:
    import timm

    assert describe(timm.create_model(NAME, num_classes=3)).args == {"num_classes": 3}


def test_what_is_not_from_timm_has_no_source() -> None:
    assert describe(nn.Linear(3, 5)) is None


def test_a_recorded_source_goes_first() -> None:
    model = comcat.load_model(NAME, model_args=VIT, pretrained=False)
    source = describe(model)
    assert (source.name, source.args) == (NAME, VIT)


def test_a_source_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match=r"timm cannot build 'vit_tiny_patch16_224' with 'wheels', which is no argument"
    ):
        Source(NAME, {"wheels": 4}).build()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"embed_dim": 6144, "num_heads": 2}, r"would take [\d,]+ bytes, far beyond the [\d,]+ of the architecture"),
        ({"num_classes": 2**31}, "would take"),
        ({"depth": 2, "mlp_ratio": 1e15}, "cannot be built with"),
    ],
)
def test_huge_arguments_are_refused_before_they_take_memory(args: dict[str, Any], message: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=message):
        comcat.load_model("vit_tiny_patch16_224", model_args=args, pretrained=False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


def test_a_checkpoint_is_compared_before_a_model_is_built(checkpoint: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=r"does not fit the model: .* of another shape"):
        comcat.load_model("vit_tiny_patch16_224", checkpoint, {"embed_dim": 6144, "num_heads": 2})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
