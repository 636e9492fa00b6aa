"""Callers in an unusual state, or with an argument of another type: it works, or one error says why."""

import pytest
import timm
import torch
from torch import nn

import comcat
from comcat.errors import CheckpointError, ModelError, PlanError
from comcat.models.opening import load_model
from conftest import VIT, vit


def _small(model: nn.Module) -> nn.Module:
    return comcat.compress(model, comcat.Plan({"blocks.0.attn": {"qk": 3}}))


def _saved(model: nn.Module, path) -> nn.Module:
    comcat.save(model, path)
    return comcat.load(path)


def test_inference_mode_of_the_caller_does_not_reach_the_model(tmp_path):
    model, images = vit(dtype=torch.float32), torch.randn(5, 3, 14, 21)
    expected = comcat.calibrate(model, [images], fisher=True)
    with torch.inference_mode():
        found = comcat.calibrate(model, [images.clone()], fisher=True)
        small = _small(model)
        again = _saved(small, tmp_path / "m")
    torch.testing.assert_close(found.moments, expected.moments)
    assert not any(p.is_inference() for m in (small, again) for p in m.parameters())
    again(images).sum().backward()


def test_a_model_made_under_inference_mode_is_refused():
    with torch.inference_mode():
        model = vit(dtype=torch.float32)
    with pytest.raises(ModelError, match=r"made under torch\.inference_mode"):
        _small(model)


def test_load_is_on_the_cpu_whatever_the_default_device(tmp_path):
    small = _small(vit(dtype=torch.float32))
    with torch.device("meta"):
        again = _saved(small, tmp_path / "m")
    assert all(t.device.type == "cpu" for t in [*again.parameters(), *again.buffers()])


@pytest.mark.parametrize("classes", [5, 23])
def test_a_classifier_put_in_by_hand_is_rebuilt(tmp_path, classes):
    """``model.head = nn.Linear(...)`` leaves ``num_classes`` as it was."""
    for name, model in {"before": vit(dtype=torch.float32), "after": _small(vit(dtype=torch.float32))}.items():
        model.head = nn.Linear(15, classes)
        model = _small(model) if name == "before" else model
        again, images = _saved(model, tmp_path / name), torch.randn(2, 3, 14, 21)
        torch.testing.assert_close(again(images), model(images))


def test_pooling_changed_after_compression_is_rebuilt(tmp_path):
    small, images = _small(vit(dtype=torch.float32)), torch.randn(2, 3, 14, 21)
    small.reset_classifier(7, global_pool="avg")
    small.eval()
    torch.testing.assert_close(_saved(small, tmp_path / "m")(images), small(images))


def test_a_model_without_some_of_its_blocks_is_rebuilt(tmp_path):
    model, images = vit(dtype=torch.float32), torch.randn(2, 3, 14, 21)
    model.blocks = nn.Sequential(model.blocks[1])
    small = _small(model)
    torch.testing.assert_close(_saved(small, tmp_path / "m")(images), small(images))


def test_a_part_of_a_compressed_model_says_what_to_save(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = vit(dtype=torch.float32)

        def forward(self, x):
            return self.body(x)

    small = comcat.compress(Wrapper().eval(), comcat.Plan({"body.blocks.0.attn": {"qk": 3}}))
    with pytest.raises(CheckpointError, match="compress the model itself"):
        comcat.save(small.body, tmp_path / "m")


@pytest.mark.parametrize("size", [14, (14, 21), (3, 0, 21), (3, 14.0, 21), "abc"])
def test_input_sizes_that_are_none(size):
    model = vit(dtype=torch.float32)
    for call in (
        lambda: comcat.profile(model, size),
        lambda: comcat.plan(model, comcat.Budget(macs=0.7), input_size=size),
        lambda: comcat.compress(model, comcat.Plan({}), input_size=size),
    ):
        with pytest.raises(ModelError, match=r"an input size is \(channels, height, width\)"):
            call()


def test_other_things_in_the_place_of_a_model_a_plan_or_a_path(tmp_path):
    model = vit(dtype=torch.float32)
    with pytest.raises(PlanError, match=r"a plan is a comcat\.Plan, not dict"):
        comcat.compress(model, {"blocks.0.attn": {"qk": 3}})
    with pytest.raises(ModelError, match=r"a model is a torch\.nn\.Module, not str"):
        comcat.profile("vit_tiny_patch16_224")
    for call in (lambda: comcat.load("a\0b"), lambda: comcat.save(model, "a\0b")):
        with pytest.raises(CheckpointError, match="holds a NUL character"):
            call()


@pytest.mark.parametrize("args", [{"depth": -1}, {"img_size": 0}, {"num_heads": 4}])
def test_wrong_arguments_are_not_blamed_on_the_network(args, monkeypatch):
    made = timm.create_model

    def offline(name, pretrained=False, **others):
        assert not pretrained, "the weights were asked for"
        return made(name, pretrained=False, **others)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ModelError, match="'vit_tiny_patch16_224' cannot be built with"):
        load_model("vit_tiny_patch16_224", model_args={**VIT, **args})
