"""Budgets, plans and the planner: the cost that is promised is the cost that is built."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import comcat
from comcat.errors import BudgetError, ModelError, PlanError
from comcat.hosts import find_layers
from comcat.layers.base import USUAL_PARTS
from comcat.layers.cost import Cost, break_even
from comcat.models.profile import layer_shapes
from comcat.planning.allocate import TOLERANCE
from conftest import calibrated, swin, vit

pytestmark = pytest.mark.usefixtures("no_source")

#: Wide enough that one component is well below half a per cent of the model.
WIDE = {"embed_dim": 48, "num_heads": 3, "depth": 3, "mlp_ratio": 2.0, "num_classes": 11}


@pytest.fixture(scope="module")
def host() -> nn.Module:
    return vit(**WIDE)


@pytest.fixture(scope="module")
def calibration(host: nn.Module) -> comcat.Calibration:
    return calibrated(host, 96, probe_images=16)


@pytest.fixture(scope="module")
def fisher(host: nn.Module) -> comcat.Calibration:
    return calibrated(host, 96, fisher=True, probe_images=0)


def parts_cost(model: nn.Module, parts: tuple[str, ...]) -> Cost:
    inventory = find_layers(model)
    shapes = layer_shapes(model, inventory, comcat.profile(model).input_size)
    chosen = [s for s in inventory.layers if s.selected(parts)]
    return sum((s.parts_cost(parts, shapes[s.name]) for s in chosen), Cost(0, 0))


def check(model: nn.Module, plan: comcat.Plan, limit: float, parts: tuple[str, ...], multiple: int) -> None:
    """The plan is what it says, within the budget, and touches only what it may."""
    unit = next(u for u in ("params", "macs") if u in plan.budget)
    small = comcat.profile(comcat.compress(model, plan))
    assert (small.params, small.macs) == (plan.estimate["params"], plan.estimate["macs"])
    assert (1 - TOLERANCE) * limit <= getattr(small, unit) <= limit
    inventory = find_layers(model)
    for name, choice in plan.layers.items():
        site = inventory[name]
        assert choice
        assert set(choice) <= set(site.selected(parts))
        for part, width in choice.items():
            assert width % multiple == 0
            assert type(width) is int
            if part in ("fc1", "fc2", "rank"):
                linear = site.linears["linear" if part == "rank" else part]
                assert width < break_even(linear.in_features, linear.out_features)
            else:
                assert width < site.full[part]


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("of", ["model", "parts"])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize("method", ["uniform", "spectrum", "fisher", "probe", "uniform free", "spectrum free"])
def test_budgets_are_met_from_below(
    host: nn.Module,
    calibration: comcat.Calibration,
    fisher: comcat.Calibration,
    method: str,
    unit: str,
    absolute: bool,
    of: str,
    multiple: int,
) -> None:
    whole = getattr(comcat.profile(host), unit)
    parts = USUAL_PARTS[:3] if method.startswith("uniform") else USUAL_PARTS  # uniform leaves the classifier dense
    base = whole if of == "model" else getattr(parts_cost(host, parts), unit)
    kept = int(0.6 * base)
    statistics = None if "free" in method else fisher if method == "fisher" else calibration
    name = {"fisher": "spectrum"}.get(method, method.split()[0])
    budget = comcat.Budget(**{unit: kept if absolute else 0.6}, of=of)
    plan = comcat.plan(host, budget, statistics, name, rank_multiple=multiple)
    assert plan.method == name
    assert plan.budget == {unit: budget.value, "of": of}
    check(host, plan, kept + whole - base, parts, multiple)


@pytest.mark.parametrize("parts", [("qk",), ("vo",), ("qk", "vo"), ("ffn",), ("ffn", "head"), ("vo", "ffn")])
@pytest.mark.parametrize("method", ["uniform", "spectrum", "probe"])
def test_only_the_selected_parts_are_reduced(
    host: nn.Module, calibration: comcat.Calibration, method: str, parts: tuple[str, ...]
) -> None:
    plan = comcat.plan(host, comcat.Budget(params=0.6, of="parts"), calibration, method, parts)
    if method == "uniform" and len(parts) > 1:
        parts = tuple(part for part in parts if part != "head")
    whole, base = comcat.profile(host).params, parts_cost(host, parts).params
    check(host, plan, int(0.6 * base) + whole - base, parts, 1)


@pytest.mark.parametrize("method", ["uniform", "spectrum", "probe"])
def test_swin_meets_its_budget(method: str) -> None:
    model = swin(embed_dim=48, num_heads=(3, 6))
    calibration = calibrated(model, 24, probe_images=8)
    for unit in ("params", "macs"):
        plan = comcat.plan(model, comcat.Budget(**{unit: 0.7}), calibration, method)
        check(model, plan, int(0.7 * getattr(comcat.profile(model), unit)), USUAL_PARTS, 1)


@pytest.mark.parametrize("method", ["uniform", "spectrum"])
def test_a_larger_budget_keeps_more(host: nn.Module, calibration: comcat.Calibration, method: str) -> None:
    losses, params = [], []
    for kept in (0.5, 0.6, 0.7, 0.8, 0.9):
        plan = comcat.plan(host, comcat.Budget(params=kept), calibration, method)
        params.append(plan.estimate["params"])
        losses.append(plan.estimate.get("loss", 0.0))
    assert params == sorted(params)
    assert losses == sorted(losses, reverse=True)


def test_uniform_keeps_the_same_fraction_everywhere(host: nn.Module, calibration: comcat.Calibration) -> None:
    plan = comcat.plan(host, comcat.Budget(params=0.6, of="parts"), calibration, "uniform", ("qk", "vo", "ffn"))
    inventory = find_layers(host)
    kept = [w / inventory[name].full[p] for name, choice in plan.layers.items() for p, w in choice.items()]
    assert len(kept) == 9
    assert max(kept) - min(kept) < 0.15


def test_the_better_form_of_the_ffn_is_chosen() -> None:
    """Dead neurons make one layer narrow, a product of rank eight the other: both fit without any loss."""
    model = vit(**WIDE)
    first, second = model.blocks[0].mlp, model.blocks[1].mlp
    first.fc2.weight.data[:, 20:] = 0
    for linear in (second.fc1, second.fc2):
        U, S, V = linear.weight.data.svd()
        linear.weight.data = U[:, :8] * S[:8] @ V.mT[:8]
    plan = comcat.plan(model, comcat.Budget(params=0.8), calibrated(model), "spectrum", ("ffn",))
    assert plan.layers["blocks.0.mlp"].keys() == {"neurons"}
    assert plan.layers["blocks.1.mlp"].keys() == {"fc1", "fc2"}
    assert plan.estimate["loss"] < 1e-6


def test_planning_does_not_change_the_model(host: nn.Module) -> None:
    model = vit(**WIDE).train()
    modules, weights = dict(model.named_modules()), {n: t.clone() for n, t in model.state_dict().items()}
    comcat.plan(model, comcat.Budget(params=0.6), calibrated(model, 16))
    assert dict(model.named_modules()) == modules
    assert all(module.training for module in modules.values())
    assert all(weights[n].equal(t) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in modules.values())


def test_default_method(host: nn.Module, calibration: comcat.Calibration, fisher: comcat.Calibration) -> None:
    budget = comcat.Budget(params=0.6)
    assert comcat.plan(host, budget).method == "uniform"
    assert comcat.plan(host, budget, calibration).method == "probe"
    assert comcat.plan(host, budget, fisher).method == "spectrum"
    assert comcat.plan(host, budget, replace(calibration, images=calibration.images[:0])).method == "uniform"


def test_macs_count_at_the_given_size() -> None:
    model = vit(**WIDE, dynamic_img_size=True)
    plan = comcat.plan(model, comcat.Budget(macs=0.6), input_size=(3, 28, 42))
    dense, small = (comcat.profile(m, (3, 28, 42)) for m in (model, comcat.compress(model, plan)))
    assert small.macs == plan.estimate["macs"]
    assert (1 - TOLERANCE) * int(0.6 * dense.macs) <= small.macs <= 0.6 * dense.macs


# -- refusals ---------------------------------------------------------------------------------------------------------


REACH = "the figure takes the FFN's narrowest form, which uniform without data does not use"


@pytest.mark.parametrize("of", ["model", "parts"])
@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize("method", ["spectrum", "uniform"])
def test_out_of_reach_names_what_can_be_reached(host: nn.Module, method: str, unit: str, of: str) -> None:
    def ask(budget: comcat.Budget) -> comcat.Plan:
        return comcat.plan(host, budget, method=method, parts=("qk", "ffn"))

    with pytest.raises(
        BudgetError, match=r"out of reach: the smallest reachable .*; head, vo could be reduced"
    ) as error:
        ask(comcat.Budget(**{unit: 0.001}, of=of))
    smallest = int(str(error.value).split(" is ")[-1].split()[0].replace(",", ""))
    assert ask(comcat.Budget(**{unit: smallest})).estimate[unit] == smallest
    with pytest.raises(BudgetError, match="out of reach"):
        ask(comcat.Budget(**{unit: smallest - 1}))


@pytest.mark.parametrize("budget", [{"params": 0.001}, {"macs": 0.001, "of": "parts"}, {"params": 10**9}])
def test_a_budget_can_be_checked_before_anything_is_measured(host: nn.Module, budget: dict[str, Any]) -> None:
    refused = []
    for check in (comcat.check_budget, comcat.plan):
        with pytest.raises(BudgetError) as error:
            check(host, comcat.Budget(**budget), parts=("qk", "vo"))
        refused.append(str(error.value))
    assert refused[0] == refused[1]
    comcat.check_budget(host, comcat.Budget(params=0.6))


def test_too_coarse_a_multiple_is_refused(host: nn.Module) -> None:
    with pytest.raises(BudgetError, match="or use a smaller rank multiple"):
        comcat.plan(host, comcat.Budget(params=0.83, of="parts"), parts=("qk",), rank_multiple=8)


@pytest.mark.parametrize("unit", ["params", "macs"])
def test_what_the_dense_model_meets_is_refused(host: nn.Module, unit: str) -> None:
    dense = getattr(comcat.profile(host), unit)
    with pytest.raises(BudgetError, match=f"not below what the dense model costs \\({dense:,} {unit}\\)"):
        comcat.plan(host, comcat.Budget(**{unit: dense}))
    with pytest.raises(BudgetError, match="not below what the dense parts costs"):
        comcat.plan(host, comcat.Budget(**{unit: dense}, of="parts"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"method": "magic"}, "unknown method 'magic'; choose from uniform, spectrum, probe"),
        ({"method": "probe"}, "'probe' measures on images"),
        ({"parts": ("qk", "mlp")}, r"unknown part \['mlp'\]; choose from qk, vo, ffn, head"),
        ({"parts": ()}, "unknown part"),
        ({"rank_multiple": 0}, "rank_multiple must be a positive integer, not 0"),
        ({"rank_multiple": 1.5}, "rank_multiple must be a positive integer"),
    ],
)
def test_bad_arguments_are_refused(host: nn.Module, args: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        comcat.plan(host, comcat.Budget(params=0.5), **args)


def test_probe_needs_images(host: nn.Module, fisher: comcat.Calibration) -> None:
    with pytest.raises(PlanError, match="probe_images > 0"):
        comcat.plan(host, comcat.Budget(params=0.5), fisher, "probe")


def test_a_model_without_the_part_is_refused() -> None:
    with pytest.raises(PlanError, match="no layer of this model has a part among qk"):
        comcat.plan(vit(qk_norm=True), comcat.Budget(params=0.5), parts=("qk",))


def test_bad_weights_are_refused() -> None:
    model = vit()
    model.head.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"head\.weight"):
        comcat.plan(model, comcat.Budget(params=0.5))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "one of params, macs and latency"),
        ({"params": 0.5, "macs": 0.5}, "one of params, macs and latency"),
        ({"params": 0.0}, "strictly between 0 and 1"),
        ({"params": 1.0}, "strictly between 0 and 1"),
        ({"macs": 1.5}, "strictly between 0 and 1"),
        ({"macs": -0.5}, "strictly between 0 and 1"),
        ({"macs": float("nan")}, "strictly between 0 and 1"),
        ({"params": 1}, "keeps nothing"),
        ({"params": -7}, "keeps nothing"),
        ({"params": True}, "is a number"),
        ({"params": "half"}, "is a number, not 'half'"),
        ({"params": 0.5, "of": "head"}, "of 'model' or of 'parts', not of 'head'"),
    ],
)
def test_a_bad_budget_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        comcat.Budget(**args)


def test_progress_is_reported(host: nn.Module) -> None:
    seen = []
    comcat.plan(host, comcat.Budget(params=0.6), calibrated(host, 16), progress=lambda *args: seen.append(args))
    for stage in {stage for stage, _, _ in seen}:
        steps = [(done, total) for s, done, total in seen if s == stage]
        assert steps == [(i + 1, len(steps)) for i in range(len(steps))]
    assert seen[0][0] == "probe"


@pytest.mark.parametrize("form", ["low-rank", "neurons"])
@pytest.mark.parametrize("method", ["uniform", "spectrum", "probe"])
def test_one_form_of_the_ffn_for_all_layers(
    host: nn.Module, calibration: comcat.Calibration, form: str, method: str
) -> None:
    plan = comcat.plan(host, comcat.Budget(params=0.5), calibration, method=method, ffn=form)
    chosen = {part for choice in plan.layers.values() for part in choice} & {"neurons", "fc1", "fc2"}
    assert chosen
    assert chosen <= ({"neurons"} if form == "neurons" else {"fc1", "fc2"})


def test_an_unknown_form_of_the_ffn_is_refused() -> None:
    with pytest.raises(comcat.PlanError, match="choose one of auto, low-rank, neurons"):
        comcat.plan(vit(), comcat.Budget(params=0.5), ffn="sparse")


@pytest.fixture(scope="module")
def tied() -> nn.Module:
    """Every component of every part is worth the same: all curves are straight."""
    model = vit(embed_dim=64, num_heads=2, mlp_ratio=4.0)
    for i, block in enumerate(model.blocks):
        eye = (0.3 + 0.01 * i) * torch.eye(64, dtype=torch.float64)
        for linear, weight in (
            (block.attn.qkv, eye.repeat(3, 1)),
            (block.attn.proj, eye),
            (block.mlp.fc1, eye.repeat(4, 1)),
            (block.mlp.fc2, eye.repeat(1, 4)),
        ):
            linear.weight.data.copy_(weight)
    return model


@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize("method", ["uniform", "spectrum"])
def test_straight_curves_meet_the_budget(tied: nn.Module, method: str, unit: str) -> None:
    whole = getattr(comcat.profile(tied), unit)
    for kept in (0.48, 0.6, 0.78, 0.93):
        made = comcat.plan(tied, comcat.Budget(**{unit: kept}), None, method)
        built = getattr(comcat.profile(comcat.compress(tied, made)), unit)
        assert built == made.estimate[unit]
        assert 0.994 * kept * whole <= built <= kept * whole
