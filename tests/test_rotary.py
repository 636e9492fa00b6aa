"""Rotary pairs: what is chosen and refitted, against scores written out over all positions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers.attention import AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn

import comcat
import transformers_hosts
from comcat.hosts import proven_layers
from comcat.hosts.timm_rotary import NarrowRotary
from comcat.layers.rotation import find_tables, turn_rows
from comcat.linalg.rotary import LAYOUTS, Turns, order_pairs, pair_places, refit_pairs
from comcat.nn.copies import copy_with
from comcat.nn.derived import change_class
from conftest import VIT, calibrated, images, make, randomize

GROUPS, PAIRS, TOKENS, SAMPLES = 2, 5, 7, 64
WIDTH = 2 * PAIRS


def angles(spread: float = 2.0) -> Tensor:
    """(tokens, pairs), of two prefix tokens that are not turned and five that are, fast and slow."""
    generator = torch.Generator().manual_seed(0)
    found = spread * torch.rand(TOKENS, PAIRS, generator=generator, dtype=torch.float64) ** 2
    found[:2] = 0
    return found


def rotations(angle: Tensor, layout: str) -> Tensor:
    """(tokens, d, d): ``x @ R`` is the rotated x."""
    first, second = pair_places(torch.arange(PAIRS), WIDTH, layout).chunk(2)
    turn = torch.zeros(len(angle), WIDTH, WIDTH, dtype=torch.float64)
    turn[:, first, first] = turn[:, second, second] = angle.cos()
    turn[:, first, second], turn[:, second, first] = angle.sin(), -angle.sin()
    return turn


def contents(seed: int) -> Tensor:
    """(groups, samples, d), correlated."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(GROUPS, SAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    return rows @ torch.randn(GROUPS, WIDTH, WIDTH, generator=generator, dtype=torch.float64)


def moment(rows: Tensor) -> Tensor:
    return rows.mT @ rows / rows.shape[-2]


def turns_of(angle: Tensor) -> Turns:
    rows = torch.cat([angle.cos(), angle.sin()], -1)
    return Turns.of((rows.mT @ rows / len(rows))[None])


def score_error(turn: Tensor, q: Tensor, k: Tensor, maps: tuple[Tensor, Tensor], kept: Tensor) -> Tensor:
    """(groups,): every query at every position with every key at every position."""
    scores = []
    small = turn[:, kept][:, :, kept]
    for queries, keys, by in ((q, k, turn), (q @ maps[0], k @ maps[1], small)):
        rotated = [torch.einsum("gsd,tde->gtse", rows, by).flatten(1, 2) for rows in (queries, keys)]
        scores.append(rotated[0] @ rotated[1].mT)
    return (scores[0] - scores[1]).square().mean((1, 2))


def chosen(kept: Tensor) -> tuple[Tensor, Tensor]:
    one = torch.eye(WIDTH, dtype=torch.float64)[:, kept].expand(GROUPS, -1, -1)
    return one, one


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_as_queries_see_them(layout: str) -> None:
    turn, k = rotations(angles(), layout), contents(1)
    expected = torch.zeros(GROUPS, WIDTH, WIDTH, dtype=torch.float64)
    for there in turn:
        for here in turn:
            expected += moment(k @ there @ here.mT) / TOKENS**2
    found = turns_of(angles()).seen(moment(k), layout)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gains_are_the_errors_of_refitted_queries(layout: str) -> None:
    """What an order says that its first pairs cost is what they cost, with queries refitted by least squares."""
    turn, q, k = rotations(angles(), layout), contents(1), contents(2)
    seen = turns_of(angles()).seen(moment(k), layout)
    order, gains = order_pairs(moment(q), seen, layout)
    assert sorted(order.tolist()) == list(range(PAIRS))
    for count in range(1, PAIRS + 1):
        kept = pair_places(order[:count], WIDTH, layout)
        q_map = torch.linalg.solve(seen[:, kept][:, :, kept], seen[:, kept]).mT
        error = score_error(turn, q, k, (q_map, chosen(kept)[1]), kept).sum()
        torch.testing.assert_close(gains[count:].sum(), error, rtol=1e-4, atol=1e-6 * float(gains.sum()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_refitted_pairs_are_better(count: int, layout: str) -> None:
    turn, q, k, turns = rotations(angles(), layout), contents(1), contents(2), turns_of(angles())
    pairs = order_pairs(moment(q), turns.seen(moment(k), layout), layout).order[:count].sort().values
    kept = pair_places(pairs, WIDTH, layout)
    maps = refit_pairs(moment(q), moment(k), pairs, turns, layout)
    error, before = (score_error(turn, q, k, one, kept) for one in (maps, chosen(kept)))
    assert (error < 0.9 * before).all()
    for side in (0, 1):  # nothing near is better than what is best for the other side
        for seed in (3, 4):
            other = list(maps)
            noise = torch.randn(other[side].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            other[side] = other[side] + 0.1 * noise
            assert (score_error(turn, q, k, (other[0], other[1]), kept) > error).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_pairs_stay_as_they_are(layout: str) -> None:
    q, k = contents(1), contents(2)
    maps = refit_pairs(moment(q), moment(k), torch.arange(PAIRS), turns_of(angles()), layout)
    kept = pair_places(torch.arange(PAIRS), WIDTH, layout)
    for found, expected in zip(maps, chosen(kept), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_pairs_that_turn_freely_are_chosen_by_their_lengths() -> None:
    q, k = moment(contents(1)), moment(contents(2))
    turns = Turns.free(PAIRS, q)
    order, gains = order_pairs(q, turns.seen(k, "half"), "half")
    lengths = [m.diagonal(dim1=-2, dim2=-1).unflatten(-1, (2, PAIRS)).sum(1) for m in (q, k)]
    expected = (lengths[0] * lengths[1] / 2).sum(0).sort(descending=True)
    assert torch.equal(order, expected.indices)
    torch.testing.assert_close(gains, expected.values, rtol=1e-5, atol=0)
    pairs = order[:2].sort().values
    for found, same in zip(
        refit_pairs(q, k, pairs, turns, "half"), chosen(pair_places(pairs, WIDTH, "half")), strict=True
    ):
        torch.testing.assert_close(found, same, rtol=0, atol=1e-12)


def eva(dinov3: bool = False) -> nn.Module:
    more: dict[str, Any] = {"rope_type": "dinov3", "rope_rotate_half": True} if dinov3 else {}
    return make("eva02_tiny_patch14_224", **(VIT | {"embed_dim": 24}), **more)


HOSTS = {
    "sines and cosines in one": eva,
    "halves": partial(eva, True),
    "cosines and sines": partial(transformers_hosts.make, "dinov3", dtype=torch.float64),
}


@pytest.mark.parametrize("host", HOSTS)
def test_fewer_pairs_of_a_model(host: str) -> None:
    """Angles are found and used, all pairs leave the model as it is, and fewer stand in for the others."""
    model = HOSTS[host]()
    ready = comcat.prepare(model)
    calibration = calibrated(model)
    free = comcat.Calibration(**{**vars(calibration), "moments": {}})
    names = [layer.name for layer in proven_layers(model, calibration.input_size).layers if layer.kind == "attention"]
    for name, moments in calibration.moments.items():
        assert ("turn" in moments) == (name in names)
        free.moments[name] = {key: value for key, value in moments.items() if key != "turn"}
    x, full = images(model, 16), proven_layers(model, calibration.input_size)[names[0]].full["pairs"]

    def outputs(model: nn.Module) -> Tensor:
        with torch.no_grad():
            found = model(x)
        return found if isinstance(found, Tensor) else found.last_hidden_state

    def error(count: int, calibration: comcat.Calibration) -> float:
        small = comcat.compress(ready, comcat.Plan({name: {"pairs": count} for name in names}), calibration)
        return float((outputs(small) - outputs(model)).square().mean().sqrt())

    assert error(full, calibration) < 1e-9
    assert error(full // 2, calibration) < error(full // 2, free)


def test_pairs_are_cut_by_whoever_knows_what_they_are_worth() -> None:
    """An equal share leaves them; where all parts are compared, the budget is the same for every method."""
    model = eva()
    ready, calibration = comcat.prepare(model), calibrated(model, 384)

    def parts(method: str, kept: float) -> set[str]:
        plan = comcat.plan(ready, comcat.Budget(params=kept), calibration, method)
        return {part for choice in plan.layers.values() for part in choice}

    assert "pairs" not in parts("uniform", 0.7)
    assert "pairs" in parts("spectrum", 0.45) & parts("probe", 0.45)
    with pytest.raises(comcat.ComcatError, match=r"out of reach.*; head, pairs could be reduced too \(parts, "):
        comcat.plan(ready, comcat.Budget(params=0.01), calibration, "spectrum", ("vo", "ffn"))
    costs = {
        method: comcat.plan(ready, comcat.Budget(params=0.7, of="parts"), calibration, method).estimate["params"]
        for method in ("auto", "spectrum")
    }
    assert costs["auto"] <= costs["spectrum"] * 1.005


HEADS, DIM = 4, 24
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "one projection": lambda: EvaAttention(DIM, HEADS, num_prefix_tokens=2, scale_norm=False),
    "three, halves": lambda: EvaAttention(DIM, HEADS, qkv_fused=False, rotate_half=True, scale_norm=False),
    "groups of keys": lambda: AttentionRope(DIM, HEADS, qkv_fused=False, num_kv_heads=2, attn_head_dim=10),
    "wide heads": lambda: AttentionRope(DIM, HEADS, attn_head_dim=10, rotate_half=True, num_prefix_tokens=0),
}


class Around(nn.Module):
    """A model of one such layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        host: Any = self.layer
        tokens = x.flatten(2).mT.repeat(1, 1, DIM // 3)
        return host(tokens, table(tokens.shape[1] - host.num_prefix_tokens, host))


def prepared(model: nn.Module) -> Any:
    return comcat.prepare(model, example=torch.randn(2, 3, 2, 3, generator=torch.Generator().manual_seed(2)).double())


def table(tokens: int, layer: Any, *more: int) -> Tensor:
    """(..., tokens, 2 d): sines, then cosines."""
    generator = torch.Generator().manual_seed(5)
    angle = torch.rand(*more, tokens, layer.head_dim // 2, generator=generator, dtype=torch.float64)
    twice = torch.cat([angle, angle], -1) if layer.rotate_half else angle.repeat_interleave(2, -1)
    return torch.cat([twice.sin(), twice.cos()], -1)


@pytest.mark.parametrize("choice", [{"pairs": 1}, {"pairs": 2, "vo": 3}, {"pairs": 1, "vo": 5}])
@pytest.mark.parametrize("kind", LAYERS)
def test_narrow_tables_do_what_wide_ones_do(kind: str, choice: dict[str, int]) -> None:
    """Against the host's own forward on heads spread to the full width, also with other pairs in every head."""
    model = randomize(Around(LAYERS[kind]())).double().eval()
    small: Any = comcat.compress(prepared(model), comcat.Plan({"layer": choice})).layer
    assert isinstance(small, NarrowRotary)
    host = type(model.layer)
    x = torch.randn(3, 7, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tokens = 7 - small.num_prefix_tokens
    ropes = [None, table(tokens, small), table(tokens, small, 3, 1)]
    if kind != "groups of keys":
        ropes.append(table(tokens, small, HEADS))
    mask = torch.rand(7, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for other_pairs in (False, True):
        if other_pairs:
            for one in (small.qkv,) if small.qkv is not None else (small.q_proj, small.k_proj):
                one.place([_other_places(at, small) if at.shape[1] == 2 * choice["pairs"] else at for at in one.kept()])
        wide = copy_with(small, {})
        change_class(wide, host)
        for rope in ropes:
            for more in ({}, {"attn_mask": mask}, {"attn_mask": mask > 0.4}):
                torch.testing.assert_close(small(x, rope, **more), wide(x, rope, **more), rtol=1e-9, atol=1e-9)


def _other_places(at: Tensor, layer: Any) -> Tensor:
    """Those of one half of the heads, and those of the other."""
    half, generator = layer.head_dim // 2, torch.Generator().manual_seed(6)
    pairs = torch.stack([torch.randperm(half, generator=generator)[: at.shape[1] // 2].sort().values for _ in range(2)])
    places = pair_places(pairs, 2 * half, "half" if layer.rotate_half else "next")
    return places.repeat_interleave(len(at) // 2, 0)


@pytest.mark.parametrize("more", [{"gated": True}, {"scale_norm": True, "norm_layer": nn.LayerNorm}])
def test_what_else_acts_in_the_layer_keeps_the_forward(more: dict[str, Any]) -> None:
    model = randomize(Around(AttentionRope(DIM, HEADS, **more))).double().eval()
    small = comcat.compress(prepared(model), comcat.Plan({"layer": {"pairs": 1}})).layer
    assert type(small) is AttentionRope


def test_tables_are_known_by_their_numbers() -> None:
    angle = angles()
    cos, sin = (torch.cat([table, table], -1) for table in (angle.cos(), angle.sin()))
    x, mask = torch.ones(3, TOKENS, WIDTH), torch.zeros(TOKENS, WIDTH)
    for value in ((cos, sin), torch.cat([sin, cos], -1)):
        found = find_tables([x, mask, None, value], WIDTH, "half")
        assert found is not None
        torch.testing.assert_close(found.cos, angle.cos())
        torch.testing.assert_close(found.sin, angle.sin())
    for value in ((cos, cos), (cos, sin[:3]), (cos, sin, sin), torch.cat([cos, cos], -1), cos):
        assert find_tables([x, mask, value], WIDTH, "half") is None
    assert find_tables([x, (cos, sin)], WIDTH, "next") is None
    found = find_tables([(cos.expand(3, 1, -1, -1), sin.expand(3, 1, -1, -1))], WIDTH, "half")
    assert found is not None
    rows = turn_rows(found, TOKENS + 2, GROUPS)
    assert rows.shape == (1, 3 * (TOKENS + 2), WIDTH)
    assert rows[0, 0].tolist() == [1.0] * PAIRS + [0.0] * PAIRS
    by_head = torch.cat([sin, cos], -1).expand(GROUPS, -1, -1)
    found = find_tables([by_head], WIDTH, "half")
    assert found is not None
    assert turn_rows(found, TOKENS, GROUPS).shape == (GROUPS, TOKENS, WIDTH)
