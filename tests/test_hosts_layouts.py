"""Attention whose projections lie in unusual places, and FFNs with norms or filters: exact, counted, saved."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from timm.layers.attention2d import MultiQueryAttention2d
from timm.layers.attention_pool2d import AttentionPool2d
from timm.layers.halo_attn import HaloAttn
from timm.models.byobnet import LayerFn, SelfAttnBlock
from timm.models.nest import Nest
from timm.models.volo import VOLO
from torch import Tensor, nn

import comcat
from comcat.hosts.folding import folded, parts
from comcat.models.profile import default_input_size
from comcat.nn.projections import HeadOutput
from conftest import calibrated, images, make, randomize


class Queries(nn.Module):
    """A convolutional model around attention with one group of keys and values, or another on 8 x 8 pixels."""

    def __init__(self, attn: nn.Module | None = None, **args: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 14, 4, 4)
        self.attn = attn or MultiQueryAttention2d(14, 14, num_heads=3, key_dim=5, value_dim=7, **args)
        self.head = nn.Linear(14, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + nn.functional.interpolate(self.attn(x), x.shape[-2:])).mean((2, 3)))


def halo(stride: int) -> nn.Module:
    """Attention whose output projection is a layer of its block; queries that skip pixels where ``stride`` is 2."""
    inner = partial(HaloAttn, block_size=4, halo_size=1, num_heads=2, dim_head=5)
    return SelfAttnBlock(14, 14, bottle_ratio=4 / 7, stride=stride, layers=LayerFn(self_attn=inner))


def iformer(name: str, *args: Any, **options: Any) -> nn.Module:
    """A block of timm's iFormer; the test is skipped where timm is too old to have it."""
    return getattr(pytest.importorskip("timm.models.iformer"), name)(*args, **options)


def beside(block: str) -> nn.Module:
    """Attention with a gate in one with the values, and another block after it."""
    return nn.Sequential(iformer("SHMA", 14, head_dim_reduction_ratio=2), iformer(block, 14, 3))


def made(cls: type[nn.Module], **args: Any) -> nn.Module:
    torch.manual_seed(0)
    return sized(randomize(cls(**args)), args.get("img_size", 32))


def named(name: str, **args: Any) -> nn.Module:
    return sized(make(name, **args), args["img_size"])


def sized(model: Any, size: int) -> nn.Module:
    model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), "input_size": (3, size, size)}
    return lively(model)


def lively(model: nn.Module) -> nn.Module:
    """In float64, with running statistics that are not those of the start."""
    generator = torch.Generator().manual_seed(3)
    for module in model.double().modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


class Host(NamedTuple):
    make: Callable[[], nn.Module]
    attention: dict[str, set[tuple[str, ...]]]  # parts by class
    ffn: set[tuple[str, ...]]
    saved: bool = True
    counted: bool = True


BOTH, CHANNELS = ("qk", "vo"), ("qk", "channels")
LOW, NEURONS = ("fc1", "fc2"), ("neurons", "fc1", "fc2")
LEVIT = {"img_size": 64, "embed_dim": (30, 42, 54), "key_dim": 5, "num_heads": (3, 2, 3), "depth": (1, 1, 1)}
FORMER = {"img_size": 64, "embed_dims": (6, 10, 14, 22), "depths": (1, 1, 1, 2), "num_vit": 1}
TNT = {"img_size": 32, "depth": 1, "embed_dim": 24, "inner_dim": 12, "num_heads_inner": 2, "num_heads_outer": 4}
NEST = {"img_size": 32, "num_levels": 2, "embed_dims": (15, 21), "num_heads": (3, 3), "depths": (1, 1)}
VOLOS = {"img_size": 32, "layers": [1, 1, 1, 1], "embed_dims": [12, 24, 24, 24], "num_heads": [3, 4, 4, 4]}
HOSTS = {
    "query and key in one": Host(
        partial(named, "tnt_s_patch16_224", num_classes=11, **TNT), {"Attention": {BOTH}}, {NEURONS}
    ),
    "gated positions": Host(
        partial(named, "convit_tiny", img_size=32, depth=2, embed_dim=6, num_heads=3, local_up_to_layer=1),
        {"GPSA": {BOTH}, "MHSA": {BOTH}},
        {NEURONS},
        saved=False,  # it computes a buffer when it is first run, which the rebuilt model does not have
    ),
    "batch normalization": Host(
        partial(named, "levit_128s", **LEVIT), {"Attention": {CHANNELS}, "AttentionDownsample": {CHANNELS}}, {LOW}
    ),
    "batch normalization, convolutions": Host(
        partial(named, "levit_conv_128s", **LEVIT), {"Attention": {CHANNELS}, "AttentionDownsample": {CHANNELS}}, {LOW}
    ),
    "talking heads, filters": Host(
        partial(named, "efficientformerv2_s0", **FORMER),
        {"Attention2d": {CHANNELS}, "Attention2dDownsample": {CHANNELS}},
        {LOW},
        counted=False,  # one output is at a finer grid than its queries, which comcat does not see, and says so
    ),
    "component by component": Host(
        partial(made, Nest, **NEST, num_classes=11), {"Attention": {BOTH}}, {NEURONS}, saved=False
    ),
    "scores without keys": Host(
        partial(made, VOLO, **VOLOS, num_classes=11, use_aux_head=False),
        {"OutlookAttention": {("vo",)}, "Attention": {BOTH}, "ClassAttention": {BOTH}},
        {NEURONS},
        saved=False,
    ),
    "output projection in the block": Host(
        lambda: made(Queries, attn=halo(1)), {"SelfAttnBlock": {("channels",)}}, set(), saved=False
    ),
    "queries that skip pixels": Host(
        lambda: made(Queries, attn=halo(2)), {"SelfAttnBlock": {("channels",)}}, set(), saved=False
    ),
    "a gate beside the values, an FFN of convolutions": Host(
        lambda: made(Queries, attn=beside("FFN")), {"SHMA": {CHANNELS}}, {LOW}, saved=False
    ),
    "a gate beside the values, filters between convolutions": Host(
        lambda: made(Queries, attn=beside("ConvBlock")), {"SHMA": {CHANNELS}}, set(), saved=False
    ),
    "one group": Host(partial(made, Queries), {"MultiQueryAttention2d": {BOTH}}, set(), saved=False),
    "one group, pooled": Host(
        partial(made, Queries, kv_stride=2), {"MultiQueryAttention2d": {BOTH}}, set(), saved=False
    ),
}


@pytest.fixture(scope="module", params=HOSTS)
def host(request: pytest.FixtureRequest) -> tuple[Host, nn.Module, comcat.Prepared]:
    kind = HOSTS[request.param]
    model = kind.make()
    return kind, model, comcat.prepare(model)


def test_parts(host: tuple[Host, nn.Module, comcat.Prepared]) -> None:
    kind, _, ready = host
    attention: dict[str, set[tuple[str, ...]]] = {}
    ffn = set()
    for layer in ready.inventory.layers:
        if layer.kind == "attention":
            attention.setdefault(type(layer.module).__name__, set()).add(tuple(layer.full))
        elif layer.kind == "ffn":
            ffn.add(tuple(layer.full))
    assert attention == kind.attention
    assert ffn == kind.ffn


@pytest.mark.parametrize("statistics", [None, 32])
def test_full_rank_is_exact(host: tuple[Host, nn.Module, comcat.Prepared], statistics: int | None) -> None:
    _, model, ready = host
    calibration = statistics and calibrated(model, statistics)
    small = comcat.compress(ready, comcat.full_rank_plan(ready, "neurons"), calibration)
    x = images(model, 3)
    with torch.no_grad():
        expected, got = model(x), small(x)
    assert expected.std() > 1e-3
    assert (got - expected).abs().max() / expected.abs().max() < 1e-9


@pytest.mark.filterwarnings("ignore::UserWarning:timm")
def test_reduced_costs_are_those_that_pytorch_counts(
    host: tuple[Host, nn.Module, comcat.Prepared], tmp_path: Path
) -> None:
    kind, model, ready = host
    size = ready.size()
    plan = comcat.Plan(
        {
            layer.name: {part: max(1, layer.full[part] * 3 // 5) for part in layer.forms[0] if part in layer.full}
            for layer in ready.inventory.layers
            if layer.kind != "classifier"
        }
    )
    calibration = calibrated(model, 32)
    with nullcontext() if kind.counted else pytest.warns(UserWarning, match="in a way that comcat does not see"):
        small = comcat.compress(ready, plan, calibration)
    dense, reduced = comcat.profile(model, size), comcat.profile(small, size)
    saved_params = saved_macs = 0
    for name, shape in ready.shapes(size).items():
        layer = ready.inventory[name]
        before, after = layer.priced({}, shape), layer.priced(plan.layers.get(name, {}), shape)
        saved_params += before.params - after.params
        saved_macs += before.macs - after.macs
    assert dense.params - reduced.params == saved_params
    assert (dense.macs - reduced.macs == saved_macs) == kind.counted
    if kind.saved:
        comcat.save(small, tmp_path / "small")
        x = images(model, 2)
        with torch.no_grad():
            torch.testing.assert_close(comcat.load(tmp_path / "small")(x), small(x), rtol=0, atol=1e-12)


def test_batch_normalization_is_folded() -> None:
    generator = torch.Generator().manual_seed(0)
    for linear, norm, shape in (
        (nn.Linear(5, 7), nn.BatchNorm1d(7), (11, 5)),
        (nn.Conv2d(5, 7, 1, bias=False), nn.BatchNorm2d(7), (2, 5, 3, 3)),
    ):
        pair = lively(randomize(nn.Sequential(linear, norm)))
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        assert parts(pair) == (linear, norm)
        torch.testing.assert_close(folded(linear, norm)(x), pair(x), rtol=0, atol=1e-12)
    assert parts(nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.BatchNorm1d(7))) is None
    assert parts(nn.Sequential(nn.Conv2d(5, 7, 3), nn.BatchNorm2d(7))) is None


def test_output_that_takes_component_by_component() -> None:
    linear = nn.Linear(6, 5).double()
    z = torch.randn(2, 12, dtype=torch.float64)  # 3 heads of width 4, of which 2 components are kept
    kept = z.view(2, 4, 3)[:, :2].flatten(1)
    torch.testing.assert_close(HeadOutput(linear, 3, 2, 4, by_component=True)(z), linear(kept))


def test_a_pooling_attention_owns_the_classifier_that_it_projects_to() -> None:
    class Pooled(Queries):
        def __init__(self) -> None:
            super().__init__()
            self.head = AttentionPool2d(14, feat_size=8, head_dim=14, out_features=11, qkv_separate=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + self.attn(x))

        def get_classifier(self) -> nn.Module:
            return self.head.proj

    model = made(Pooled)
    ready = comcat.prepare(model)
    assert {layer.name: tuple(layer.full) for layer in ready.inventory.layers} == {"attn": BOTH, "head": BOTH}
    small = comcat.compress(ready, comcat.full_rank_plan(ready), calibrated(model, 16))
    x = images(model, 3)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "args", "channels"),
    [
        ("nextvit_small", {}, 3),
        ("volo_d1_224", {}, 3),
        ("pvt_v2_b0", {"in_chans": 5}, 5),
        ("vit_small_resnet26d_224", {}, 3),
    ],
)
def test_images_enter_by_the_first_convolution(name: str, args: dict[str, int], channels: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **args)
    assert default_input_size(model) == (channels, 224, 224)
