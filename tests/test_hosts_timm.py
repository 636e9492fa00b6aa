"""Every supported architecture is exact at full rank; what cannot be factored stays dense and is named."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from timm.layers import GluMlp
from timm.layers.attention import Attention
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn

import comcat
from comcat.errors import ModelError
from comcat.hosts import find_layers
from comcat.nn.linear import LowRankLinear
from comcat.nn.low_rank_attention import LowRankAttention
from conftest import SWIN, VIT, calibrated, images, make, randomize, swin, vit


class Host(NamedTuple):
    make: Callable[..., nn.Module]
    dense: dict[str, str] = {}  # noqa: RUF012 - names left dense besides the patch embedding, and a word of the reason
    attention: tuple[str, ...] = ("qk", "vo")
    ffn: tuple[str, ...] = ("neurons", "fc1", "fc2")


def gated(**args: object) -> nn.Module:
    """No timm model gates its plain attention by argument, so one layer is exchanged."""
    model = vit(**args)
    layer = Attention(15, num_heads=3, qkv_bias=True, gated=True)
    model.blocks[0].attn = randomize(layer, seed=3).to(next(model.parameters()).dtype)
    return model.eval()


ATTN, MLP = "blocks.0.attn", "blocks.0.mlp"
HOSTS = {
    "class token": Host(vit),
    "average pooling": Host(partial(vit, class_token=False, global_pool="avg")),
    "registers": Host(partial(vit, reg_tokens=4, no_embed_class=True)),
    "no qkv bias": Host(partial(vit, qkv_bias=False)),
    "no proj bias": Host(partial(vit, proj_bias=False)),
    "no bias at all": Host(partial(vit, qkv_bias=False, proj_bias=False)),
    "pre-norm, final norm": Host(partial(vit, pre_norm=True, final_norm=True)),
    "qk norm": Host(partial(vit, qk_norm=True), {f"{ATTN} (qk)": "query-key normalization"}, ("vo",)),
    "scale attn norm": Host(partial(vit, scale_attn_norm=True), {f"{ATTN} (vo)": "normalization"}, ("qk",)),
    "scale mlp norm": Host(partial(vit, scale_mlp_norm=True), ffn=("fc1", "fc2")),
    "gated": Host(gated, attention=("qk", "channels")),
    "res-post-norm": Host(partial(vit, block_fn=ResPostBlock, init_values=1e-5)),
    "parallel things": Host(partial(vit, block_fn=ParallelThingsBlock), attention=(), ffn=()),
    "wide heads": Host(partial(vit, embed_dim=21, num_heads=3)),
    "narrow heads": Host(partial(vit, embed_dim=14, num_heads=7)),
    "deit": Host(partial(make, "deit_tiny_patch16_224", **VIT)),
    "deit distilled": Host(partial(make, "deit_tiny_distilled_patch16_224", **VIT)),
    "deit3": Host(partial(make, "deit3_small_patch16_224", **VIT)),
    "dinov2": Host(partial(make, "vit_small_patch14_dinov2", **VIT)),
    "dinov2 giant": Host(
        partial(make, "vit_giant_patch14_dinov2", **(VIT | {"mlp_ratio": 26 / 15, "mlp_layer": GluMlp})),
    ),
    "clip": Host(partial(make, "vit_base_patch32_clip_224", **VIT)),
    "clip quickgelu": Host(partial(make, "vit_base_patch32_clip_quickgelu_224", **VIT)),
    "siglip": Host(partial(make, "vit_base_patch16_siglip_224", **VIT)),
    "siglip gap": Host(partial(make, "vit_base_patch16_siglip_gap_224", **VIT)),
    "swin": Host(swin, attention=(), ffn=()),
    "swin, odd grid": Host(partial(swin, img_size=12), attention=(), ffn=()),
    "swin s3": Host(
        partial(make, "swin_s3_tiny_224", **(SWIN | {"window_size": (2, 4), "depths": (2, 2)})),
        attention=(),
        ffn=(),
    ),
    "beit": Host(partial(make, "beit_base_patch16_224", **VIT)),
    "rope": Host(
        partial(make, "eva02_tiny_patch14_224", **(VIT | {"embed_dim": 24})),
        attention=("pairs", "vo"),
    ),
}
"""`attention=()` and `ffn=()` where there is no site of that name."""


pytestmark = pytest.mark.usefixtures("no_source")


def check_same(model: nn.Module, small: nn.Module) -> None:
    """Same logits to rounding, and small is not the dense model in disguise."""
    x = images(model)
    with torch.no_grad():
        expected, got = model(x), small(x)
    assert expected.dtype == got.dtype
    assert expected.std() > 0.1
    relative = (got - expected).abs().max() / expected.abs().max()
    if expected.dtype == torch.float64:
        assert (got - expected).abs().max() < 1e-9
    else:
        assert relative < 1e-5


def replaced(model: nn.Module) -> int:
    return sum(isinstance(m, (LowRankAttention, LowRankLinear)) for m in model.modules())


@pytest.mark.parametrize("ffn", ["low-rank", "neurons"])
@pytest.mark.parametrize("statistics", ["none", "many", "two images"])
@pytest.mark.parametrize("host", HOSTS)
def test_full_rank_changes_nothing(host: str, statistics: str, ffn: str) -> None:
    model = HOSTS[host].make()
    calibration = {"none": None, "many": 64, "two images": 2}[statistics]
    calibration = calibration and calibrated(model, calibration)
    small = comcat.compress(model, comcat.full_rank_plan(model, ffn), calibration)
    assert replaced(small) > 0
    check_same(model, small)


@pytest.mark.parametrize("statistics", [None, 64])
@pytest.mark.parametrize("host", HOSTS)
def test_full_rank_in_float32(host: str, statistics: int | None) -> None:
    model = HOSTS[host].make(dtype=torch.float32)
    calibration = statistics and calibrated(model, statistics)
    check_same(model, comcat.compress(model, comcat.full_rank_plan(model), calibration))


@pytest.mark.parametrize("host", HOSTS)
def test_every_layer_matters(host: str) -> None:
    """The exactness tests above would not notice a layer that the output does not depend on."""
    model = HOSTS[host].make()
    x = images(model, 2)
    with torch.no_grad():
        expected = model(x)
        for site in find_layers(model).layers:
            for linear in site.originals().values():
                for parameter in linear.parameters():
                    kept = parameter.clone()
                    parameter.mul_(0.5)
                    assert (model(x) - expected).abs().max() > 1e-4, site.name
                    parameter.copy_(kept)


@pytest.mark.parametrize("host", HOSTS)
def test_parts_and_dense_layers_are_named(host: str) -> None:
    model, (_, dense, attention, ffn) = HOSTS[host].make(), HOSTS[host]
    inventory = comcat.prepare(model).inventory
    full = {site.name: site.full for site in inventory.layers}
    assert attention == tuple(full.get(ATTN, ()))
    assert ffn == tuple(full.get(MLP, ()))
    reasons = {entry.name: entry.reason for entry in inventory.dense}
    for name, reason in dense.items():
        assert reason in reasons[name]
    if not dense and "swin" not in host:
        assert not reasons


def test_low_rank_parts_are_reduced_and_dense_parts_kept() -> None:
    model = vit(qk_norm=True)
    small = comcat.compress(model, comcat.Plan({ATTN: {"vo": 2}}))
    attention = small.blocks[0].attn
    assert (attention.qk_rank, attention.vo_rank) == (5, 2)
    assert attention.k_norm.weight.shape == (5,)
    assert small.blocks[1].attn.qkv.weight.equal(model.blocks[1].attn.qkv.weight)


def test_parallel_scaling_block_is_left_dense_and_named() -> None:
    inventory = find_layers(vit(block_fn=ParallelScalingBlock))
    assert [site.name for site in inventory.layers] == ["head"]
    assert ("blocks.0", "ParallelScalingBlock") in {(d.name, d.cls) for d in inventory.dense}


def test_model_without_any_known_layer_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Left dense: ParallelScalingBlock \(not a layer that comcat knows"):
        find_layers(vit(block_fn=ParallelScalingBlock, num_classes=0))
    with pytest.raises(ModelError, match="Sequential has no layer that comcat can compress"):
        find_layers(nn.Sequential(nn.Linear(3, 5)))


def test_a_subclass_is_not_taken_for_what_it_derives_from() -> None:
    class Mine(Attention):
        def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 3, 5)).permute(2, 0, 3, 1, 4)
            return self.proj(((q * q).softmax(-1) @ k.mT @ v.softmax(-1)).transpose(1, 2).flatten(2))

    model = vit()
    model.blocks[0].attn = Mine(15, num_heads=3).double()
    inventory = comcat.prepare(model).inventory
    assert ATTN not in [site.name for site in inventory.layers]
    (reason,) = [d.reason for d in inventory.dense if (d.name, d.cls) == (ATTN, "Mine")]
    assert "scores do not follow from the product" in reason
    assert "output does not follow from the product" in reason
    assert "difference 0." in reason


def test_a_subclass_that_computes_the_same_is_proven() -> None:
    class Mine(Attention):
        pass

    model = vit()
    model.blocks[0].attn = Mine(15, num_heads=3).double()
    found = comcat.prepare(model).inventory[ATTN]
    assert found.full == {"qk": 5, "vo": 5}
    check_same(model, comcat.compress(model, comcat.full_rank_plan(model)))


def test_sites_come_in_forward_order() -> None:
    names = [site.name for site in find_layers(make("deit_tiny_distilled_patch16_224", **VIT)).layers]
    assert names == [ATTN, MLP, "blocks.1.attn", "blocks.1.mlp", "head", "head_dist"]


def test_swin_shifts_its_windows_and_masks_them() -> None:
    """Otherwise the exactness tests would not cover masks."""
    model = swin()
    assert [block.attn_mask is not None for block in model.layers[0].blocks] == [False, True]


@pytest.mark.filterwarnings("ignore::UserWarning:timm")
def test_compressed_swin_can_be_given_another_input_size() -> None:
    model = swin()
    small = comcat.compress(model, comcat.full_rank_plan(model))
    for m in (model, small):
        m.set_input_size((16, 12), window_size=(4, 3))
    check_same(model, small)


def test_attention_masks_are_passed_on() -> None:
    model = vit()
    small = comcat.compress(model, comcat.full_rank_plan(model))
    x = torch.randn(2, 7, 15, dtype=torch.float64)
    mask = torch.rand(7, 7) > 0.3
    mask.fill_diagonal_(True)
    for args in ({"attn_mask": mask}, {"attn_mask": mask.double()}, {"is_causal": True}):
        expected, got = model.blocks[0].attn(x, **args), small.blocks[0].attn(x, **args)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
