"""Counts of parameters and multiply-accumulates."""

import json

import pytest
import torch
from torch import nn

import comcat
from comcat.errors import ModelError
from comcat.hosts import find_layers
from comcat.layers.cost import Shape
from comcat.models.profile import default_input_size, layer_shapes
from conftest import VIT, make, swin, vit


def test_counts_of_a_layer_by_hand() -> None:
    layer = nn.Sequential(nn.Conv2d(3, 5, 2, stride=2), nn.Flatten(2), nn.Linear(6, 7))
    found = comcat.profile(layer, (3, 4, 6))
    conv, linear = 6 * 5 * 3 * 4, 5 * 6 * 7
    assert found.macs == conv + linear
    assert found.params == 5 * 13 + 49
    assert found.modules == {"0": (65, conv), "1": (0, 0), "2": (49, linear)}


def test_counts_of_attention_by_hand() -> None:
    found = comcat.profile(vit())
    tokens, dim, hidden = 7, 15, 17
    attention = tokens * (4 * dim * dim) + 2 * tokens * tokens * dim
    block = attention + tokens * 2 * dim * hidden
    assert found.modules["blocks.0.attn"].macs == attention
    assert found.modules["blocks.0"].macs == block
    assert found.macs == 2 * block + 6 * dim * 3 * 49 + dim * 11
    assert found.params == sum(p.numel() for p in vit().parameters())


@pytest.mark.parametrize("make_model", [vit, swin])
def test_children_add_up_to_the_whole(make_model: object) -> None:
    model = make_model()
    found = comcat.profile(model)
    top = [name for name, _ in model.named_children()]
    assert found.macs == sum(found.modules[name].macs for name in top)
    direct = sum(p.numel() for p in model.parameters(recurse=False))
    assert found.params == direct + sum(found.modules[name].params for name in top)


def test_macs_follow_the_input_size() -> None:
    model = vit(dynamic_img_size=True)
    small, large = comcat.profile(model), comcat.profile(model, (3, 28, 42))
    assert large.input_size == (3, 28, 42)
    assert large.macs > 4 * small.macs
    assert large.params == small.params


def test_a_model_with_attention_pooling_can_be_counted() -> None:
    found = comcat.profile(make("vit_base_patch16_siglip_224", **VIT))
    assert found.modules["attn_pool"].macs > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_counts_do_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    assert comcat.profile(vit(dtype=dtype)) == comcat.profile(vit())


def test_mode_and_hooks_are_kept() -> None:
    model = vit().train()
    model.head.eval()
    comcat.profile(model)
    assert [model.training, model.blocks.training, model.head.training] == [True, True, False]
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_plain_data_for_json() -> None:
    found = comcat.profile(vit())
    data = json.loads(json.dumps(found.to_dict()))
    assert data["params"] == found.params
    assert data["modules"]["head"] == {"params": 176, "macs": 165}


def test_a_wrong_size_is_refused() -> None:
    with pytest.raises(ModelError, match=r"does not run on images of size \(3, 15, 21\)"):
        comcat.profile(vit(), (3, 15, 21))
    model = vit()
    with pytest.raises(ModelError, match=r"does not run on images of size \(3, 15, 21\)"):
        layer_shapes(model, find_layers(model), (3, 15, 21))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_site_that_is_never_called_is_named() -> None:
    model = vit()
    model.unused = vit(depth=1)
    with pytest.raises(ModelError, match=r"'unused\.blocks\.0\.attn' was never called"):
        layer_shapes(model, find_layers(model), (3, 14, 21))


def test_shapes_of_windows() -> None:
    model = swin()
    shapes = layer_shapes(model, find_layers(model), (3, 8, 8))
    assert shapes["layers.0.blocks.0.attn"] == Shape(16, 4)
    assert shapes["layers.1.blocks.0.attn"] == Shape(4, 4)
    assert shapes["head.fc"].tokens == 1


@pytest.mark.parametrize(
    ("model", "size"),
    [(vit, (3, 14, 21)), (swin, (3, 8, 8)), (lambda: vit(in_chans=5), (5, 14, 21)), (nn.Identity, (3, 224, 224))],
)
def test_default_input_size(model: object, size: tuple[int, ...]) -> None:
    assert default_input_size(model()) == size
