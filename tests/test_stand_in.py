"""The low-rank attention offers what the original did: attention maps, hooks, traces; what would be lost is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from timm.utils import AttentionExtract
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured
from torchvision.models.feature_extraction import create_feature_extractor

import comcat
from comcat.errors import ModelError, PlanError
from comcat.hosts import find_layers
from conftest import calibrated, images, swin, vit

pytestmark = pytest.mark.usefixtures("no_source")

HOSTS = {"vit": vit, "swin": swin, "qk norm": lambda **a: vit(qk_norm=True, **a)}


def attentions(model: nn.Module) -> list[Any]:
    names = [n for n, m in model.named_modules() if n.endswith("attn")]
    return [model.get_submodule(name) for name in names]


def small_widths(model: nn.Module) -> comcat.Plan:
    sites = [s for s in find_layers(model).layers if s.kind == "attention"]
    return comcat.Plan({s.name: {part: 2 + i for i, part in enumerate(s.full)} for s in sites})


@pytest.mark.parametrize("host", HOSTS)
def test_both_ways_compute_the_same(host: str) -> None:
    small = comcat.compress(HOSTS[host](), small_widths(HOSTS[host]()))
    x, found = images(small), []
    for fused in (True, False):
        for attention in attentions(small):
            attention.fused_attn = fused
        found.append(small(x))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_masks_in_both_ways() -> None:
    attention = comcat.compress(vit(), comcat.Plan({"blocks.0.attn": {"qk": 2}})).blocks[0].attn
    x = torch.randn(2, 7, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    boolean = torch.ones(7, 7, dtype=torch.bool).tril()
    additive = torch.zeros(7, 7, dtype=x.dtype).masked_fill(~boolean, float("-inf"))
    found = []
    for fused in (True, False):
        attention.fused_attn = fused
        found += [attention(x, boolean), attention(x, attn_mask=additive), attention(x, is_causal=True)]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("host", HOSTS)
def test_the_way_of_the_original_is_kept_and_its_macs_are_counted(host: str, fused: bool) -> None:
    model = HOSTS[host]()
    for attention in attentions(model):
        attention.fused_attn = fused
    dense = comcat.profile(model)
    small = comcat.compress(model, small_widths(model))
    assert [a.fused_attn for a in attentions(small)] == [fused] * len(attentions(model))
    report = small.comcat.report
    assert report.macs_after == dense.macs - sum(r.macs_before - r.macs_after for r in report.layers)
    assert not report.notes


@pytest.mark.filterwarnings("ignore:NOTE")  # torchvision, about nodes of which there are two modes
@pytest.mark.parametrize("method", ["hook", "fx"])
@pytest.mark.parametrize("host", ["vit", "swin"])
def test_attention_maps(host: str, method: str) -> None:
    model = HOSTS[host](dtype=torch.float32)
    for attention in attentions(model):
        attention.fused_attn = False
    full = comcat.compress(model, comcat.full_rank_plan(model))
    x = images(model, 2)
    expected, got = (dict(AttentionExtract(m, method=method)(x)) for m in (model, full))
    assert expected.keys() == got.keys()
    assert len(got) == len(attentions(model))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("in_place", [True, False])
def test_hooks_and_modes_of_what_is_kept(in_place: bool) -> None:
    model, seen = vit(), []
    for name in ("attn_drop", "proj_drop", "q_norm"):
        getattr(model.blocks[0].attn, name).register_forward_hook(lambda m, a, out, name=name: seen.append(name))
    model.blocks[0].attn.fused_attn = False
    model.blocks[0].attn.attn_drop.train()
    model.blocks[0].attn.remark = "mine"
    if in_place:
        comcat.compress_(model, small_widths(model))
        small = model
    else:
        small = comcat.compress(model, small_widths(model))
    seen.clear()  # costs are counted in a forward pass
    small(images(small))
    assert sorted(seen) == ["attn_drop", "proj_drop", "q_norm"]
    assert small.blocks[0].attn.attn_drop.training
    assert not small.blocks[0].attn.training
    assert small.blocks[0].attn.remark == "mine"


def test_dropout_of_the_attention_map() -> None:
    small = comcat.compress(vit(attn_drop_rate=0.5), small_widths(vit())).train()
    for fused in (True, False):
        for attention in attentions(small):
            attention.fused_attn = fused
        assert not torch.equal(small(images(small)), small(images(small)))


# -- traces -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*torch.fx", "ignore:NOTE", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("host", HOSTS)
def test_traces(host: str, fused: bool) -> None:
    model = HOSTS[host](dtype=torch.float32)
    for attention in attentions(model):
        attention.fused_attn = fused
    plan = small_widths(model)
    small = comcat.compress(model, comcat.Plan({**plan.layers, "head": {"rank": 3}} if host == "vit" else plan.layers))
    x = images(small, 2)
    expected = small(x)
    last = next(reversed([n for n, _ in small.named_modules() if n.endswith("attn")]))
    features = create_feature_extractor(copy.deepcopy(small), [last])(x)[last]
    assert features.isfinite().all()
    torch.testing.assert_close(torch.jit.trace(small, x, check_trace=False)(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), expected, rtol=1e-4, atol=1e-4)


def test_a_symbolic_trace() -> None:
    attention = comcat.compress(vit(), small_widths(vit())).blocks[0].attn
    x = torch.randn(2, 7, 15, dtype=torch.float64)
    traced = torch.fx.symbolic_trace(attention, concrete_args={"attn_mask": None, "is_causal": False})
    torch.testing.assert_close(traced(x, None, False), attention(x), rtol=1e-12, atol=1e-12)


# -- what would be lost -----------------------------------------------------------------------------------------------

REGISTER: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda m: m.register_forward_hook(lambda *a: None),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda *a: None),
    "backward hook": lambda m: m.register_full_backward_hook(lambda *a: None),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda *a: None),
    "state-dict hook": lambda m: m.register_state_dict_post_hook(lambda *a: None),
    "load-state-dict hook": lambda m: m.register_load_state_dict_post_hook(lambda *a: None),
}
ALL = {"blocks.0.attn": {"qk": 2}, "blocks.0.mlp": {"neurons": 5}, "blocks.1.mlp": {"fc2": 2}, "head": {"rank": 3}}


@pytest.mark.parametrize("kind", REGISTER)
@pytest.mark.parametrize(
    "where",
    ["blocks.0.attn", "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.1.mlp.fc2", "head"],
)
def test_hooks_on_what_goes_are_refused(where: str, kind: str) -> None:
    model = vit()
    handle = REGISTER[kind](model.get_submodule(where))
    before = dict(model.named_modules())
    with pytest.raises(ModelError, match=rf"module '{where}' has a {kind}, which would be lost"):
        comcat.compress_(model, comcat.Plan(ALL))
    assert dict(model.named_modules()) == before
    handle.remove()
    comcat.compress_(model, comcat.Plan(ALL))


def test_hooks_on_what_stays_are_kept() -> None:
    model, seen = vit(), []
    for name in ("blocks.0", "blocks.0.mlp", "blocks.1.mlp.fc1", "blocks.1.attn", "blocks.1.attn.qkv"):
        model.get_submodule(name).register_forward_hook(lambda *a, name=name: seen.append(name))
    comcat.compress_(model, comcat.Plan(ALL))
    seen.clear()
    model(images(model))
    assert len(seen) == 5


class Other(Attention):
    """A user's own."""


def patched(model: nn.Module) -> None:
    model.blocks[0].attn.forward = lambda x, **rest: x


def grown(model: nn.Module) -> None:
    model.blocks[0].attn.added = nn.Linear(15, 15, dtype=torch.float64)


def parametrized(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.blocks[0].attn.qkv)


def orthogonal(model: nn.Module) -> None:
    nn.utils.parametrizations.orthogonal(model.blocks[0].attn.proj)


def spectral(model: nn.Module) -> None:
    nn.utils.spectral_norm(model.blocks[0].attn.qkv)


def pruned(model: nn.Module) -> None:
    l1_unstructured(model.blocks[0].attn.proj, "weight", amount=0.5)


def wrapped(model: nn.Module) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.blocks[0].attn.proj = Scaled(15, 15, dtype=torch.float64)


CHANGED: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "patched": (patched, "its forward was replaced"),
    "grown": (grown, "it carries 'added'"),
    "parametrized": (parametrized, r"its qkv has a parametrization of weight, .*remove_parametrizations"),
    "orthogonal": (orthogonal, r"its proj has a parametrization of weight"),
    "spectral": (spectral, r"its qkv computes its weight anew .*prune\.remove"),
    "pruned": (pruned, r"its proj computes its weight anew .*prune\.remove"),
    "other linear": (wrapped, r"its proj is a Scaled, not a plain nn\.Linear"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_changed_layers_stay_dense_and_are_named(change: str) -> None:
    model = vit()
    alter, reason = CHANGED[change]
    alter(model)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
    with pytest.raises(PlanError, match=rf"layer 'blocks\.0\.attn' \(\w+\) cannot be reduced: .*{reason}"):
        comcat.compress(model, comcat.Plan(ALL))
    small = copy.deepcopy(model) if change in ("parametrized", "orthogonal", "spectral", "pruned") else model
    comcat.compress_(small, comcat.full_rank_plan(small), calibrated(small, 32))
    assert "blocks.0.attn" in [entry.name for entry in small.comcat.report.dense]
    torch.testing.assert_close(small(x), expected, rtol=1e-7, atol=1e-7)
