"""The cost formulas agree with what PyTorch counts in the model that is really built."""

from functools import partial

import numpy as np
import pytest
import torch

import comcat
from comcat.hosts import find_layers
from comcat.layers.base import Layer
from comcat.layers.cost import Cost, Shape, break_even, linear_cost, low_rank_cost
from comcat.models.profile import layer_shapes, profile
from comcat.nn.linear import LowRankLinear
from conftest import VIT, make, swin, vit

pytestmark = pytest.mark.usefixtures("no_source")

HOSTS = {
    "vit": vit,
    "no proj bias": partial(vit, proj_bias=False),
    "no qkv bias": partial(vit, qkv_bias=False),
    "average pooling": partial(vit, class_token=False, global_pool="avg"),
    "distilled": partial(make, "deit_tiny_distilled_patch16_224", **VIT),
    "swin": swin,
    "swin, padded": partial(swin, img_size=12, window_size=4),
}
CHOICES = {
    "attention": [{}, {"qk": 2}, {"vo": 2}, {"qk": 1, "vo": 4}, {"qk": 4, "vo": 1}, {"qk": 4, "vo": 4}],
    "ffn": [{}, {"neurons": 3}, {"fc1": 2}, {"fc2": 3}, {"fc1": 5, "fc2": 1}],
    "head": [{}, {"rank": 4}],
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("pick", range(6))
def test_costs_are_what_the_built_model_costs(host: str, pick: int) -> None:
    model = HOSTS[host]()
    inventory = find_layers(model)
    shapes = layer_shapes(model, inventory, profile(model).input_size)
    plan = comcat.Plan({s.name: CHOICES[s.kind][pick % len(CHOICES[s.kind])] for s in inventory.layers})
    dense, small = profile(model), profile(comcat.compress(model, plan))
    for name, choice in plan.layers.items():
        site = inventory[name]
        assert small.modules[name] == _with_fixed(dense, site, site.priced(choice, shapes[name]), shapes)
    saved = Cost(0, 0)
    for name, choice in plan.layers.items():
        site = inventory[name]
        saved += site.priced({}, shapes[name]) - site.priced(choice, shapes[name])
    assert (dense.params - small.params, dense.macs - small.macs) == saved


def _with_fixed(dense: comcat.Profile, site: Layer, cost: Cost, shapes: dict[str, Shape]) -> Cost:
    """Cost of the whole module: what no choice changes (relative position tables) is added."""
    return cost + dense.modules[site.name] - site.priced({}, shapes[site.name])


def test_costs_broadcast() -> None:
    site = find_layers(vit())["blocks.0.attn"]
    shape = Shape(7, 7)
    grid = site.cost({"qk": np.arange(1, 6)[:, None], "vo": np.arange(1, 6)}, shape)
    for qk in range(1, 6):
        for vo in range(1, 6):
            one = site.priced({"qk": qk, "vo": vo}, shape)
            assert (grid.params[qk - 1, vo - 1], grid.macs[qk - 1, vo - 1]) == one


@pytest.mark.parametrize(("n", "m"), [(5, 7), (15, 45), (17, 15), (4, 4), (1, 9), (192, 768)])
def test_break_even_is_the_smallest_rank_that_saves_nothing(n: int, m: int) -> None:
    limit = break_even(n, m)
    dense = linear_cost(n, m, bias=True, tokens=3)
    for rank in range(1, min(n, m) + 1):
        low = low_rank_cost(n, m, rank, tokens=3)
        assert (low.params < dense.params) == (rank < limit) == (low.macs < dense.macs)


def test_low_rank_cost_is_that_of_the_module() -> None:
    layer = LowRankLinear(5, 7, 3)
    assert low_rank_cost(5, 7, 3, 11) == (sum(p.numel() for p in layer.parameters()), 11 * 3 * 12)


def test_neurons_cost_without_first_bias() -> None:
    model = vit()
    model.blocks[0].mlp.fc1.bias = None
    site = find_layers(model)["blocks.0.mlp"]
    assert site.priced({"neurons": 4}, Shape(7, 7)) == (4 * 30 + 15, 7 * 4 * 30)
    assert profile(comcat.compress(model, comcat.Plan({site.name: {"neurons": 4}}))).modules[site.name] == (
        4 * 30 + 15,
        7 * 4 * 30,
    )


def test_costs_are_plain_integers() -> None:
    """They go into JSON."""
    for site in find_layers(vit()).layers:
        for choice in CHOICES[site.kind]:
            assert [type(v) for v in site.priced(choice, Shape(7, 7))] == [int, int]


def test_low_rank_linear_is_the_product() -> None:
    layer = LowRankLinear(5, 7, 3, dtype=torch.float64)
    x = torch.randn(2, 11, 5, dtype=torch.float64)
    expected = x @ (layer.up.weight @ layer.down.weight).mT + layer.up.bias
    torch.testing.assert_close(layer(x), expected)
    assert LowRankLinear(5, 7, 3, bias=False).up.bias is None
    assert "in_features=5, out_features=7, rank=3" in repr(layer)
