"""A compressed model is an ordinary module, and making one leaves the dense model alone."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

import comcat
from comcat.errors import CalibrationError, ModelError, PlanError
from comcat.hosts import find_layers
from comcat.hosts.timm import LowRankWindowAttention
from comcat.nn.linear import LowRankLinear
from comcat.nn.low_rank_attention import LowRankAttention
from conftest import VIT, assert_same_outputs, calibrated, images, make, swin, vit

pytestmark = pytest.mark.usefixtures("no_source")

HOSTS = {
    "vit": vit,
    "bare": lambda **a: vit(qkv_bias=False, proj_bias=False, class_token=False, global_pool="avg", **a),
    "dinov2": lambda **a: make("vit_small_patch14_dinov2", **VIT, **a),
    "qk norm": lambda **a: vit(qk_norm=True, **a),
    "swin": swin,
}


def half_plan(model: nn.Module) -> comcat.Plan:
    """About half of every width; the FFNs alternate between their forms."""
    layers = {}
    for i, site in enumerate(find_layers(model).layers):
        full = {part: width for part, width in site.full.items() if any(part in form for form in site.forms)}
        if "neurons" in full:
            full = {"neurons": full["neurons"]} if i % 4 == 1 else {p: full[p] for p in ("fc1", "fc2")}
        layers[site.name] = {part: (width + 1) // 2 for part, width in full.items()}
    return comcat.Plan(layers)


def shrunk(host: str = "vit", dtype: torch.dtype = torch.float64, statistics: bool = True) -> nn.Module:
    model = HOSTS[host](dtype=dtype)
    return comcat.compress(model, half_plan(model), calibrated(model) if statistics else None)


# -- the low-rank model against the dense one -------------------------------------------------------------------------


def layer_outputs(model: nn.Module, names: list[str], x: torch.Tensor) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    handles = [model.get_submodule(n).register_forward_hook(lambda m, a, y, n=n: out.setdefault(n, y)) for n in names]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return out


@pytest.mark.parametrize(
    ("layer", "choice"),
    [
        ("blocks.1.attn", {"vo": 2}),
        ("blocks.1.mlp", {"neurons": 6}),
        ("blocks.1.mlp", {"fc2": 4}),
        ("head", {"rank": 4}),
    ],
)
def test_the_mean_output_of_a_layer_is_kept(layer: str, choice: dict[str, int]) -> None:
    """On the calibration data, where the inputs of the layer are still the dense ones."""
    model = vit()
    x = images(model, 96)
    small = comcat.compress(model, comcat.Plan({layer: choice}), comcat.calibrate(model, [x]))
    expected, got = (layer_outputs(m, [layer], x)[layer].flatten(0, -2) for m in (model, small))
    assert not torch.allclose(got, expected, atol=1e-3)
    torch.testing.assert_close(got.mean(0), expected.mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", ["blocks.0.attn", "blocks.1.attn", "blocks.0.mlp", "blocks.1.mlp", "head"])
def test_statistics_lower_the_error_of_every_layer(layer: str) -> None:
    model = vit()
    x = images(model, 96)
    calibration = comcat.calibrate(model, [x])
    for part, full in find_layers(model)[layer].full.items():
        errors = []
        for statistics in (calibration, None):
            small = comcat.compress(model, comcat.Plan({layer: {part: (full + 1) // 2}}), statistics)
            expected, got = (layer_outputs(m, [layer], x)[layer] for m in (model, small))
            errors.append(float((got - expected).square().mean()))
        if part != "qk" and part != "fc1":  # those are optimal before a nonlinearity, not behind it
            assert errors[0] < errors[1]
        assert errors[0] > 0


def test_errors_fall_with_the_rank() -> None:
    model = vit()
    x = images(model, 96)
    calibration = comcat.calibrate(model, [x])
    for part, layer, full in (("vo", "blocks.0.attn", 5), ("neurons", "blocks.0.mlp", 17), ("rank", "head", 11)):
        errors = []
        for width in range(1, full + 1):
            small = comcat.compress(model, comcat.Plan({layer: {part: width}}), calibration)
            expected, got = (layer_outputs(m, [layer], x)[layer] for m in (model, small))
            errors.append(float((got - expected).square().mean()))
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-18 < errors[0]


def test_the_report_predicts_the_error_of_a_linear_layer() -> None:
    model = vit()
    x = images(model, 96)
    small = comcat.compress(model, comcat.Plan({"head": {"rank": 4}}), comcat.calibrate(model, [x]))
    with torch.no_grad():
        expected, got = model(x), small(x)
    spread = expected - expected.mean(0)
    relative = (got - expected).square().sum() / spread.square().sum()
    assert small.comcat.report.layers[0].error == pytest.approx(float(relative), rel=1e-6)


@pytest.mark.parametrize("host", HOSTS)
def test_loss_aware_factors_are_finite_and_exact_at_full_rank(host: str) -> None:
    model = HOSTS[host]()
    calibration = calibrated(model, 24, fisher=True)
    x = images(model)
    with torch.no_grad():
        full = comcat.compress(model, comcat.full_rank_plan(model), calibration)(x)
        assert (full - model(x)).abs().max() < 1e-9
        assert comcat.compress(model, half_plan(model), calibration)(x).isfinite().all()


@pytest.mark.parametrize("wild", ["zero", "tiny", "huge", "rank one"])
def test_wild_weights_give_finite_models(wild: str) -> None:
    model = vit()
    change = {
        "zero": lambda w: w.zero_(),
        "tiny": lambda w: w.mul_(1e-12),
        "huge": lambda w: w.mul_(1e6),
        "rank one": lambda w: w.copy_(w[:, :1] @ w[:1]),
    }[wild]
    for linear in (model.blocks[0].attn.qkv, model.blocks[0].mlp.fc1, model.blocks[1].attn.proj, model.head):
        change(linear.weight.data)
    x = images(model)
    for calibration in (None, calibrated(model, 2), calibrated(model), calibrated(model, 8, fisher=True)):
        small = comcat.compress(model, half_plan(model), calibration)
        assert small(x).isfinite().all()
        assert all(p.isfinite().all() for p in small.parameters())
        full = comcat.compress(model, comcat.full_rank_plan(model), calibration)
        torch.testing.assert_close(full(x), model(x), rtol=1e-9, atol=1e-9)


# -- an ordinary module -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_every_parameter_trains(host: str) -> None:
    small = shrunk(host).train()
    frozen = {n for n, p in small.named_parameters() if not p.requires_grad}
    before = {n: p.detach().clone() for n, p in small.named_parameters()}
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(small(images(small, 11)), torch.arange(11))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not frozen
    still = {n for n, p in small.named_parameters() if torch.equal(before[n], p)}
    assert {n for n in still if not n.endswith("k_norm.bias")} == set()  # the softmax removes that one


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_casts(host: str, dtype: torch.dtype) -> None:
    small = shrunk(host)
    expected = small(images(small)).detach()
    cast = copy.deepcopy(small).to(dtype)
    got = cast(images(cast)).detach()
    assert got.dtype == dtype
    tolerance = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}[dtype]
    assert (got.double() - expected).abs().max() < tolerance * expected.abs().max()
    back = cast.double()
    assert all(p.dtype == torch.float64 for p in back.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_of_the_model_is_kept(dtype: torch.dtype) -> None:
    model = vit(dtype=dtype)
    for calibration in (None, calibrated(model, 16)):
        small = comcat.compress(model, half_plan(model), calibration)
        assert {p.dtype for p in small.parameters()} == {dtype}
        assert small(images(small)).isfinite().all()


@pytest.mark.parametrize("host", HOSTS)
def test_deepcopy_and_state_dict(host: str) -> None:
    small = shrunk(host)
    again = copy.deepcopy(small)
    x = images(small)
    assert_same_outputs(again(x), small(x))
    again.load_state_dict({n: torch.zeros_like(t) if "head" in n else t for n, t in small.state_dict().items()})
    assert not torch.equal(again(x), small(x))
    assert again.comcat.plan == small.comcat.plan


@pytest.mark.parametrize("host", HOSTS)
def test_compiles_without_graph_breaks(host: str) -> None:
    small = shrunk(host)
    x = images(small, 3)
    torch._dynamo.reset()
    compiled = torch.compile(small, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), small(x))


@pytest.mark.parametrize("host", HOSTS)
def test_exports(host: str) -> None:
    small = shrunk(host, dtype=torch.float32)
    x = images(small, 3)
    with torch.no_grad():
        exported = torch.export.export(small, (x,))
        torch.testing.assert_close(exported.module()(x), small(x))


@pytest.mark.parametrize(("qk", "vo"), [(1, 5), (5, 1), (2, 3), (3, 2), (4, 4)])
def test_ranks_of_queries_and_values_are_free_of_each_other(qk: int, vo: int) -> None:
    model = vit()
    small = comcat.compress(model, comcat.Plan({"blocks.0.attn": {"qk": qk, "vo": vo}}), calibrated(model))
    attention = small.blocks[0].attn
    assert attention.qkv.weight.shape == (3 * (2 * qk + vo), 15)
    assert attention.proj.weight.shape == (15, 3 * vo)
    assert f"num_heads=3, head_dim=5, qk_rank={qk}, vo_rank={vo}" in repr(attention)
    assert small(images(model)).isfinite().all()


@pytest.mark.parametrize("host", ["vit", "swin"])
def test_attributes_of_the_original_attention(host: str) -> None:
    model, small = HOSTS[host](), shrunk(host)
    for site in find_layers(model).layers:
        if site.kind == "attention":
            new = small.get_submodule(site.name)
            assert isinstance(new, LowRankWindowAttention if host == "swin" else LowRankAttention)
            assert (new.num_heads, new.head_dim, new.scale) == (site.heads.num, site.heads.width, site.module.scale)


def test_drop_rates_carry_over() -> None:
    model = vit(attn_drop_rate=0.3, proj_drop_rate=0.4)
    small = comcat.compress(model, half_plan(model))
    attention = small.blocks[0].attn
    assert (attention.attn_drop.p, attention.proj_drop.p) == (0.3, 0.4)
    x = images(small)
    assert torch.equal(small(x), small(x))
    small.train()
    assert not torch.equal(small(x), small(x))


def test_head_ranks_of_a_distilled_model() -> None:
    model = make("deit_tiny_distilled_patch16_224", **VIT)
    small = comcat.compress(model, comcat.Plan({"head": {"rank": 2}, "head_dist": {"rank": 3}}))
    assert (small.head.rank, small.head_dist.rank) == (2, 3)


# -- mode, gradients, the original ------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", [False, True])
def test_compress_leaves_the_original_alone(statistics: bool) -> None:
    model = vit().train()
    x = images(model)
    calibration = calibrated(model) if statistics else None
    modules = dict(model.named_modules())
    state = {n: t.clone() for n, t in model.state_dict().items()}
    small = comcat.compress(model, half_plan(model), calibration)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1)
    assert dict(model.named_modules()) == modules
    assert all(state[n].equal(t) for n, t in model.state_dict().items())
    assert not hasattr(model, "comcat")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules.values())
    assert model(x).isfinite().all()


def test_compress_in_place_equals_compress() -> None:
    model, calibration = vit(), calibrated(vit())
    small = comcat.compress(model, half_plan(model), calibration)
    report = comcat.compress_(model, half_plan(model), calibration)
    assert model.comcat.report is report
    assert report == small.comcat.report
    assert all(small.state_dict()[n].equal(t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("mode", [True, False])
def test_mode_carries_over(mode: bool) -> None:
    model = vit().train(mode)
    model.blocks[0].attn.train(not mode)
    small = comcat.compress(model, half_plan(model))
    assert [m.training for m in small.blocks[0].attn.modules()] == [not mode] * len([*small.blocks[0].attn.modules()])
    assert small.blocks[1].attn.training == small.blocks[1].mlp.fc1.training == small.head.training == mode


def test_frozen_weights_stay_frozen() -> None:
    model = vit().requires_grad_(False)
    model.blocks[1].requires_grad_(True)
    small = comcat.compress(model, half_plan(model))
    for name, parameter in small.named_parameters():
        assert parameter.requires_grad == name.startswith("blocks.1.")


@pytest.mark.parametrize("layers", [{"blocks.0.attn": {"qk": 2}, "blocks.5.attn": {"qk": 2}}, {"head": {"rank": 99}}])
def test_a_plan_that_does_not_fit_changes_nothing(layers: dict[str, Any]) -> None:
    model = vit()
    modules, state = dict(model.named_modules()), {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(PlanError):
        comcat.compress_(model, comcat.Plan(layers))
    assert dict(model.named_modules()) == modules
    assert all(state[n].equal(t) for n, t in model.state_dict().items())
    assert not hasattr(model, "comcat")


def test_a_calibration_that_does_not_fit_changes_nothing() -> None:
    model, foreign = vit(), calibrated(vit(depth=1))
    modules = dict(model.named_modules())
    with pytest.raises(CalibrationError):
        comcat.compress_(model, half_plan(model), foreign)
    assert dict(model.named_modules()) == modules


def test_a_damaged_calibration_changes_nothing() -> None:
    model = vit()
    calibration = calibrated(model)
    calibration.moments["blocks.1.attn"]["q"][0, 0, 0] = float("nan")
    modules = dict(model.named_modules())
    with pytest.raises(CalibrationError):
        comcat.compress_(model, half_plan(model), calibration)
    assert dict(model.named_modules()) == modules


def test_bad_weights_are_refused() -> None:
    model = vit()
    plan = half_plan(model)
    model.blocks[1].mlp.fc2.weight.data[2, 3] = float("inf")
    with pytest.raises(ModelError, match=r"'blocks\.1\.mlp\.fc2\.weight' holds NaN or infinite"):
        comcat.compress(model, plan)


def test_layers_that_the_plan_does_not_name_stay_as_they_are() -> None:
    model = vit()
    attention, head = model.blocks[1].attn, model.head
    comcat.compress_(model, comcat.Plan({"blocks.0.attn": {"qk": 2}, "blocks.0.mlp": {}, "head": {}}))
    assert model.blocks[1].attn is attention
    assert model.head is head
    assert [layer.name for layer in model.comcat.report.layers] == ["blocks.0.attn"]


# -- the report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_the_report_adds_up(host: str) -> None:
    model = HOSTS[host]()
    plan = half_plan(model)
    small = comcat.compress(model, plan)
    report = small.comcat.report
    dense, now = comcat.profile(model), comcat.profile(small)
    assert (report.params_before, report.macs_before) == (dense.params, dense.macs)
    assert (report.params_after, report.macs_after) == (now.params, now.macs)
    assert report.params_before - report.params_after == sum(r.params_before - r.params_after for r in report.layers)
    assert report.macs_before - report.macs_after == sum(r.macs_before - r.macs_after for r in report.layers)
    assert {r.name: r.ranks for r in report.layers} == plan.layers
    for layer in report.layers:
        assert 0 < layer.error < len(layer.ranks)
        assert all(layer.ranks[part] < layer.full[part] for part in layer.ranks)
    assert comcat.Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_the_report_says_what_stays_dense_and_why() -> None:
    model = vit(qk_norm=True)
    report = comcat.compress(model, half_plan(model)).comcat.report
    assert [(d.name, d.cls) for d in report.dense] == [
        ("blocks.0.attn (qk)", "Attention"),
        ("blocks.1.attn (qk)", "Attention"),
    ]
    assert "query-key normalization" in report.dense[0].reason


def test_progress_is_reported() -> None:
    model, seen = vit(), []
    comcat.compress(model, half_plan(model), progress=lambda *args: seen.append(args))
    assert seen == [("compress", i + 1, 5) for i in range(5)]


def test_low_rank_layers_are_not_reduced_again() -> None:
    small = shrunk()
    assert not any(isinstance(s.module, LowRankAttention | LowRankLinear) for s in find_layers(small).layers)
