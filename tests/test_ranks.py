"""Rank gates and their distribution: the mixture, its cost and its start, against what they stand for written out."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import comcat
from comcat import Budget, Plan, PlanError
from comcat.hosts import find_layers
from comcat.rank_search.distribution import RankDistribution, candidate_widths
from comcat.rank_search.space import SearchSpace
from conftest import calibrated, images, make, swin, vit
from test_hosts_layouts import Queries, iformer, made
from test_hosts_timm import gated
from test_latency import measure

pytestmark = pytest.mark.usefixtures("no_source")

HOSTS: dict[str, Any] = {
    "vit": vit,
    "no biases": lambda: vit(qkv_bias=False, proj_bias=False),
    "layer scale": lambda: vit(init_values=0.5),
    "query-key norm": lambda: vit(qk_norm=True),
    "gate": gated,
    "gate beside the values": lambda: made(Queries, attn=iformer("SHMA", 14)),
    "swin": swin,
    "two classifiers": lambda: make(
        "deit_tiny_distilled_patch16_224",
        img_size=14, patch_size=7, embed_dim=15, depth=1, num_heads=3, mlp_ratio=17.5 / 15, num_classes=11,
    ),
}  # fmt: skip


def space(model: nn.Module, budget: Budget | None = None, **args: Any) -> SearchSpace:
    """A space whose start is dense: no plan stands in the way of what is tested."""
    return SearchSpace(model, budget or Budget(params=0.9), Plan({}), **{"candidates": 4, **args})


def one_hot(at: SearchSpace, seed: int) -> tuple[Tensor, Plan]:
    """One random candidate per row, as probabilities and as a plan."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.zeros_like(at.ranks.widths, dtype=torch.float64)
    layers: dict[str, dict[str, int]] = {}
    for row, (site, part, candidates) in enumerate(at.rows):
        chosen = int(torch.randint(len(candidates), (), generator=generator))
        p[row, chosen] = 1
        if candidates[chosen] < site.full[part]:
            layers.setdefault(site.name, {})[part] = candidates[chosen]
    return p, Plan(layers)


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert (a - b).norm() <= tolerance * b.norm(), float((a - b).norm() / b.norm())


@pytest.mark.parametrize("ffn", ["low-rank", "neurons"])
@pytest.mark.parametrize("data", ["calibrated", "data-free"])
@pytest.mark.parametrize("host", HOSTS)
def test_gates_are_the_compressed_models(host: str, data: str, ffn: str) -> None:
    """All gates open: the dense model. One candidate per part: what compress makes of these widths."""
    model = HOSTS[host]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibration = calibrated(model) if data == "calibrated" else None
    at = space(model, calibration=calibration, ffn=ffn)
    tolerance = 1e-5 if calibration else 1e-10  # the refit of a subset has a ridge of its own
    x = images(model)
    with torch.no_grad():
        wanted = model(x)
        last = torch.tensor([len(candidates) - 1 for _, _, candidates in at.rows])
        dense = nn.functional.one_hot(last, at.ranks.widths.shape[1]).double()
        close(at.gated(x, dense), wanted, 1e-9)
        for seed in range(3):
            p, plan = one_hot(at, seed)
            small = comcat.compress(model, plan, calibration)(x)
            assert (small - wanted).norm() > 1e-3 * wanted.norm()
            close(at.gated(x, p), small, tolerance)
    if host == "query-key norm":
        assert not any(part == "qk" for _, part, _ in at.rows)
    assert sum(site.kind == "head" for site, _, _ in at.rows) == 1 + (host == "two classifiers")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_mixture_is_the_sum_of_its_candidates() -> None:
    """Score matrices, value-output products and linear maps are linear in the probabilities of one part."""
    model = vit(depth=1)
    at = space(model, calibration=calibrated(model), ffn="low-rank")
    p = torch.rand(at.ranks.widths.shape, generator=torch.Generator().manual_seed(3)).double() * at.ranks.valid
    p = p / p.sum(-1, keepdim=True)

    def maps(probabilities: Tensor) -> dict[str, Tensor]:
        w = at.gated.weights(at.gated.masks(probabilities))
        q, k, v = w["blocks.0.attn.qkv.weight"].view(3, 3, 5, 15)
        o = w["blocks.0.attn.proj.weight"].mT.view(3, 5, 15)
        names = ("blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "head")
        return {"qk": q.mT @ k, "vo": v.mT @ o, **{name: w[f"{name}.weight"] for name in names}}

    with torch.no_grad():
        mixture = maps(p)
        for row, (site, part, candidates) in enumerate(at.rows):
            name = site.name if site.kind == "head" else part if part in ("qk", "vo") else f"{site.name}.{part}"
            total = torch.zeros_like(mixture[name])
            for a in range(len(candidates)):
                alone = p.clone()
                alone[row] = nn.functional.one_hot(torch.tensor(a), p.shape[1])
                total += p[row, a] * maps(alone)[name]
            close(mixture[name], total, 1e-12)
            assert (mixture[name] - maps(alone)[name]).norm() > 1e-3


def test_gates_are_what_trains() -> None:
    """Every gradient that the mixture needs arrives, at the gates and at what is not gated, and at no other tensor."""
    model = vit()
    at = space(model, calibration=calibrated(model))
    p = at.ranks.probabilities(1.0)
    at.gated(images(model), p).square().mean().backward()
    assert at.ranks.logits.grad is not None
    assert (at.ranks.logits.grad[at.ranks.valid] != 0).all()
    assert (at.ranks.logits.grad[~at.ranks.valid] == 0).all()
    trained = {name: value for name, value in at.gated.named_parameters() if value.requires_grad}
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in trained.values())
    stood_in = set(at.gated.weights(at.gated.masks(p)))
    assert {f"model.{name}" for name in stood_in} == dict(at.gated.named_parameters()).keys() - trained.keys()
    assert all(parameter.grad is None for parameter in model.parameters())


# -- what it costs -------------------------------------------------------------------------------------------------


def latency(model: nn.Module) -> comcat.LatencyTable:
    with pytest.MonkeyPatch.context() as patch:
        return measure(patch, model, widths=5, rounds=1)


@pytest.mark.parametrize("unit", ["params", "macs", "latency"])
@pytest.mark.parametrize("host", [vit, swin])
def test_expected_cost_is_the_expectation(host: Any, unit: str) -> None:
    """Over all candidates of both parts of every site, priced as the planner prices them."""
    model = host()
    table = latency(model) if unit == "latency" else None
    at = space(model, Budget(**{unit: 0.8}), rank_multiple=1, latency=table)
    p = at.ranks.probabilities(2.0, at.ranks.gumbel(torch.Generator().manual_seed(5))).detach()
    expected = float(at.planner.fixed)
    for site in at.planner.inventory.layers:
        rows = [i for i, (other, _, _) in enumerate(at.rows) if other is site]
        choices: list[tuple[float, dict[str, int]]] = [(1.0, {})]
        for row in rows:
            part, candidates = at.rows[row][1:]
            choices = [
                (share * float(p[row, a]), {**choice, part: width})
                for share, choice in choices
                for a, width in enumerate(candidates)
            ]
        for share, choice in choices:
            reduced = {part: width for part, width in choice.items() if width < site.full[part]}
            expected += share * at.planner.price(site, reduced)
    assert float(at.ranks.cost(p)) == pytest.approx(expected / at.planner.limit, rel=1e-6)


def random_distribution(seed: int, dtype: torch.dtype = torch.float64) -> RankDistribution:
    """Three sites with two parts and two with one, of 3, 5, 7 and 11 candidates; dense is 1.9 budgets."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [3, 5, 7, 11, 2, 5, 3, 7]
    groups = [[0, 1], [2, 3], [4], [5, 6], [7]]
    widths = [[*range(1, n), n + 2] for n in sizes]
    prices = []
    for group in groups:
        shape = [sizes[row] for row in group]
        steps = torch.rand(shape, generator=generator, dtype=torch.float64)
        for axis in range(len(shape)):
            steps = steps.cumsum(axis)
        prices.append(0.36 * steps / steps.max())
    start = [float(n) / 2 for n in sizes]
    return RankDistribution(widths, [w[-1] for w in widths], groups, prices, 0.1, start, 1.5).to(dtype)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_on_budget_costs_the_budget(seed: int, noisy: bool) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
        ranks = random_distribution(seed, dtype)
        noise = ranks.gumbel(torch.Generator().manual_seed(seed)).to(dtype) if noisy else None
        for temperature in (0.3, 1.0, 5.0):
            p = ranks.on_budget(temperature, noise).detach()
            assert float(ranks.cost(p)) == pytest.approx(1, abs=tolerance)
            assert (p[~ranks.valid] == 0).all()
            torch.testing.assert_close(p.sum(-1), torch.ones_like(p[:, 0]))


@pytest.mark.parametrize("seed", range(3))
def test_gradients_stay_on_the_budget(seed: int) -> None:
    """Those of finite differences of the constrained distribution, blind to what the constraint takes back."""
    ranks = random_distribution(seed)
    generator = torch.Generator().manual_seed(seed + 100)
    noise = ranks.gumbel(generator).double()
    weights, direction = (
        torch.randn(ranks.logits.shape, generator=generator, dtype=torch.float64) * ranks.valid for _ in range(2)
    )
    start, temperature, step = ranks.logits.detach().clone(), 0.7, 1e-3

    @torch.no_grad()
    def value(shift: float) -> float:
        ranks.logits.copy_(start + shift * direction)
        return (weights * ranks.on_budget(temperature, noise)).sum().item()

    numeric = (8 * (value(step) - value(-step)) - value(2 * step) + value(-2 * step)) / (12 * step)
    value(0)
    p = ranks.on_budget(temperature, noise)
    (gradient,) = torch.autograd.grad((weights * p).sum(), ranks.logits, retain_graph=True)
    assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=1e-6)
    # Logits that move along the prices are tilted back: nothing changes.
    assert float((gradient * ranks.slope).sum()) == pytest.approx(0, abs=1e-9 * gradient.norm().item())
    (cost,) = torch.autograd.grad(ranks.cost(p), ranks.logits)
    assert float(cost.norm()) < 1e-9


def test_noise_depends_on_the_seed_alone() -> None:
    ranks = random_distribution(0)
    one, same, other = (ranks.gumbel(torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    p = ranks.probabilities(1.0, one.double())
    assert torch.equal(p, ranks.probabilities(1.0, same.double()))
    assert (p[~ranks.valid] == 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones_like(p[:, 0]))


def test_samples_follow_the_distribution() -> None:
    """Gumbel-max: the largest noisy logit is a candidate drawn from the softmax."""
    ranks = random_distribution(2, torch.float32)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([ranks.probabilities(1.0, ranks.gumbel(generator)).argmax(-1) for _ in range(3000)])
    for row in range(len(ranks.logits)):
        seen = torch.bincount(draws[:, row], minlength=ranks.logits.shape[1]) / len(draws)
        assert (seen - ranks.probabilities(1.0)[row]).abs().max() < 0.05


# -- where it may go -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [2, 3, 5, 16, 256])
def test_candidates(count: int, multiple: int) -> None:
    """Ascending multiples below break-even, the smallest first, dense last; one more than asked for at most."""
    for site in [*find_layers(vit()).layers, *find_layers(swin()).layers]:
        for part, full in site.full.items():
            widths = candidate_widths(site, part, count, multiple)
            limit = site.reach(part)
            assert widths == sorted(set(widths))
            assert widths[-1] == full
            assert all(width % multiple == 0 and width < limit for width in widths[:-1])
            assert len(widths) <= count + 1
            assert widths[0] == (multiple if multiple < limit else full)
            gaps = [b - a for a, b in pairwise([0, *widths[:-1], limit])]
            assert max(gaps) <= limit / count + 2 * multiple


@pytest.mark.parametrize(("width", "multiple", "expected"), [
    (5, 1, [1, 2, 3, 4, 5]),
    (7, 1, [1, 2, 3, 4, 5, 6, 7]),
    (7, 3, [3, 6, 7]),
    (7, 8, [7]),
])  # fmt: skip
def test_few_candidates_of_narrow_heads(width: int, multiple: int, expected: list[int]) -> None:
    site = find_layers(vit(embed_dim=3 * width)).layers[0]
    assert candidate_widths(site, "qk", 16, multiple) == expected


def test_a_dense_linear_layer_counts_as_its_break_even_rank() -> None:
    at = space(vit(), ffn="low-rank")
    for row, (site, part, candidates) in enumerate(at.rows):
        last = float(at.ranks.widths[row, len(candidates) - 1])
        if site.kind != "attention":
            rows, columns = site.linear_size(part)
            assert last - 1 < rows * columns / (rows + columns) <= last
        else:
            assert last == site.heads.width


def test_the_start_surrounds_the_plan() -> None:
    model = vit(embed_dim=39, mlp_ratio=2.0)
    plan = comcat.plan(model, Budget(params=0.5))
    narrow = SearchSpace(model, Budget(params=0.5), plan, candidates=16, spread=0.3)
    wide = SearchSpace(model, Budget(params=0.5), plan, candidates=16, spread=3.0)
    p, q = (at.ranks.probabilities(1.0).detach() for at in (narrow, wide))
    for row, ((site, part, _), width) in enumerate(zip(narrow.rows, narrow.ranks.expected_widths(p), strict=True)):
        wanted = plan.layers.get(site.name, {}).get(part, site.reach(part))
        assert abs(float(width) - wanted) <= site.reach(part) / 16 + 0.6
        assert p[row].max() > q[row].max()


def test_unknown_form_of_the_ffn() -> None:
    with pytest.raises(PlanError, match="ffn is 'both'; choose one of auto, low-rank, neurons"):
        space(vit(), ffn="both")
