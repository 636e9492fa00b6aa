"""Values that are left out channel by channel, where an operation stands between them and the output projection."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers.attention import AttentionRope
from timm.models.efficientformer_v2 import Attention2d
from torch import Tensor, nn

import comcat
from comcat import Budget, PlanError
from comcat.layers.attention import AttentionLayer
from comcat.linalg.factorize import order_channels
from comcat.nn.projections import HeadOutput, HeadProjection
from conftest import VIT, calibrated, images, make, randomize, vit
from test_hosts_layouts import LEVIT, Queries, halo, iformer, made, named
from test_hosts_timm import gated

#: Of queries on a coarser grid than the output, which is brought back to its size.
pytestmark = pytest.mark.filterwarnings("ignore:the compressed model has")


def grouped() -> nn.Module:
    """Four heads, two groups of keys and values, a gate on the output."""
    model: Any = vit()
    model.blocks[0].attn = AttentionRope(
        15, num_heads=4, attn_head_dim=5, num_kv_heads=2, qkv_fused=False, gated=True, num_prefix_tokens=0
    )
    return randomize(model).double().eval()


def rotary() -> nn.Module:
    """Rotated queries and keys, and a gate on the output."""
    model: Any = make("eva02_tiny_patch14_224", **(VIT | {"embed_dim": 24}))
    model.blocks[0].attn = randomize(AttentionRope(24, num_heads=3, gated=True)).double()
    return model.eval()


def filters() -> nn.Module:
    """A filter on every channel of the values, heads that talk, an activation; projections with batch normalization."""
    return made(Queries, attn=Attention2d(14, key_dim=5, num_heads=3, attn_ratio=2, resolution=8, stride=2))


HOSTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "activation": (partial(named, "levit_128s", **LEVIT), "stages.0.blocks.0.attn"),
    "activation, convolutions": (partial(named, "levit_conv_128s", **LEVIT), "stages.1.downsample.attn_downsample"),
    "filters": (filters, "attn"),
    "gate": (gated, "blocks.0.attn"),
    "gate, rotary": (rotary, "blocks.0.attn"),
    "gate, groups": (grouped, "blocks.0.attn"),
    "gate beside the values": (lambda: made(Queries, attn=iformer("SHMA", 14)), "attn"),
    "output projection in the block": (lambda: made(Queries, attn=halo(2)), "attn"),
}


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> tuple[nn.Module, AttentionLayer]:
    build, name = HOSTS[request.param]
    model = build()
    layer = comcat.prepare(model).inventory[name]
    assert isinstance(layer, AttentionLayer)
    return model, layer


def with_dead_channels(layer: AttentionLayer, dead: Tensor, silent: bool) -> None:
    """Take channels (groups, n) away: of the output projection, or with ``silent`` of the values, as constants."""
    heads, stream = layer.heads, layer.stream
    rows = heads.split(torch.arange(layer.linears[stream.value].weight.shape[0]), value_input(layer))["value"]
    of_heads = dead.repeat_interleave(heads.num // heads.groups, 0)
    columns = (torch.arange(heads.num)[:, None] * heads.value_width + of_heads).flatten()
    linears = {path: linear for path, linear in layer.originals().items() if linear._parameters}
    value: Any = next(linear for path, linear in linears.items() if path.startswith(stream.value))
    output: Any = next(linear for path, linear in linears.items() if path.startswith(str(stream.output)))
    with torch.no_grad():
        if silent:
            value.weight[rows.gather(1, dead).flatten()] = 0
        else:
            output.weight[:, columns] = 0


def value_input(layer: AttentionLayer) -> Any:
    return next(one for one in layer.stream.inputs if "value" in one.roles)


def dead_of(layer: AttentionLayer, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    width = layer.heads.value_width
    return torch.stack([torch.randperm(width, generator=generator)[:count] for _ in range(layer.heads.groups)])


@pytest.mark.parametrize("calibrate", [True, False])
def test_channels_that_lead_nowhere_go_first_and_without_a_trace(
    host: tuple[nn.Module, AttentionLayer], calibrate: bool
) -> None:
    model, layer = host
    assert layer.full["channels"] == layer.heads.value_width
    assert layer.part_of("channels") == "vo"
    dead = dead_of(layer, 2)
    with_dead_channels(layer, dead, silent=False)
    ready = comcat.prepare(model)
    layer = ready.inventory[layer.name]
    calibration = calibrated(model, 24) if calibrate else None
    factors = layer.factors(calibration.moments[layer.name] if calibration else None)
    assert factors.channels.order[:, -2:].sort().values.equal(dead.sort().values)
    assert factors.errors("channels")[-3] <= 1e-12 * factors.errors("channels")[0]
    assert (factors.errors("channels").diff() <= 0).all()
    x = images(model, 3)
    for choice in ({"channels": layer.heads.value_width - 2}, {"channels": layer.heads.value_width}):
        small = comcat.compress(ready, comcat.Plan({layer.name: choice}), calibration)
        with torch.no_grad():
            expected, got = model(x), small(x)
        assert (got - expected).abs().max() < 1e-9 * expected.abs().max()


def test_channels_that_are_constant_are_left_out_for_a_bias() -> None:
    """Behind an activation a constant is another one, which the calibration knows."""
    build, path = HOSTS["activation"]
    model = build()
    layer: Any = comcat.prepare(model).inventory[path]
    with_dead_channels(layer, dead_of(layer, 2), silent=True)
    plan = comcat.Plan({path: {"channels": layer.heads.value_width - 2}})
    small = comcat.compress(model, plan, calibrated(model, 24))
    x = images(model, 3)
    with torch.no_grad():
        expected, got = model(x), small(x)
    assert (got - expected).abs().max() < 1e-9 * expected.abs().max()


def test_fewer_channels_are_what_zeros_in_the_output_leave(host: tuple[nn.Module, AttentionLayer]) -> None:
    """Beside narrower queries."""
    model, layer = host
    width = layer.heads.value_width
    scores = {part: layer.full[part] - 1 for part in layer.full if part == layer.qk_part}
    choice = {**scores, "channels": width // 2}
    calibration = calibrated(model, 24)
    small = comcat.compress(model, comcat.Plan({layer.name: choice}), calibration)
    attention = small.get_submodule(layer.name)
    output = next(m for m in attention.modules() if isinstance(m, HeadOutput))
    assert output.linear.weight.shape[1] == layer.heads.num * (width // 2)
    assert any(isinstance(m, HeadProjection) and m.places is not None for m in attention.modules())

    # The same with the weights of full width: kept rows as they are, all other output weights zero.
    factors = layer.factors(calibration.moments[layer.name])
    again = comcat.compress(model, comcat.Plan({layer.name: scores}), calibration)
    at = factors.places_of(factors.channels.order[:, : width // 2].sort(-1).values).flatten()
    weight = torch.zeros_like(layer.output.weight.detach())
    weight[:, at] = output.linear.weight.detach()
    full: Any = again.get_submodule(f"{layer.name}.{layer.stream.output}")
    made = type(output.linear)(weight.shape[1], weight.shape[0], **({} if weight.dim() == 2 else {"kernel_size": 1}))
    made.weight, made.bias = nn.Parameter(weight), nn.Parameter(output.linear.bias.detach().clone())
    parent, _, leaf = f"{layer.name}.{layer.stream.output}".rpartition(".")
    assert full is not None
    setattr(again.get_submodule(parent), leaf, made)
    x = images(model, 3)
    with torch.no_grad():
        expected, got = again(x), small(x)
        assert (got - expected).abs().max() < 1e-9 * expected.abs().max()
        assert (got - model(x)).abs().max() > 1e-3 * expected.abs().max()


def test_a_plan_for_values_takes_channels_and_the_model_is_saved(tmp_path: Path) -> None:
    model = named("levit_128s", **LEVIT)
    calibration = calibrated(model, 24, fisher=True)
    for method in ("uniform", "spectrum"):
        plan = comcat.plan(model, Budget(params=0.9), calibration, parts=("vo",), method=method)
        assert {part for choice in plan.layers.values() for part in choice} == {"channels"}
    small = comcat.compress(model, plan, calibration)
    comcat.save(small, tmp_path / "small")
    x = images(model, 3)
    with torch.no_grad():
        torch.testing.assert_close(comcat.load(tmp_path / "small")(x), small(x), rtol=0, atol=1e-12)


def test_a_part_that_is_not_there_is_refused() -> None:
    model = gated()
    with pytest.raises(PlanError, match="unknown part 'vo'; possible are qk, channels"):
        comcat.compress(model, comcat.Plan({"blocks.0.attn": {"vo": 3}}))
    with pytest.raises(PlanError, match="channels is 6, but must be an integer from 1 to 5"):
        comcat.compress(model, comcat.Plan({"blocks.0.attn": {"channels": 6}}))


def test_a_stock_model_keeps_all_channels() -> None:
    with pytest.raises(PlanError, match="an operation on the channels of the values expects all of them"):
        comcat.plan(named("levit_128s", **LEVIT), Budget(params=0.9), parts=("qk", "vo"), method="uniform", stock=True)


class Normed(AttentionRope):
    """Queries and keys between which a norm, or nothing at all, acts."""

    def __init__(self, norm: Callable[[Tensor], Tensor], swapped: bool = False) -> None:
        super().__init__(15, num_heads=3)
        self.between, self.swapped = norm, swapped

    def forward(self, x: Tensor, rope: Any = None, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 5)).permute(2, 0, 3, 1, 4)
        if self.swapped:  # rows of both in both
            q, k = torch.cat([q[..., :2], k[..., 2:]], -1), torch.cat([k[..., :2], q[..., 2:]], -1)
            return self.proj(((q @ q.mT + k @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
        scores = self.between(q) @ self.between(k).mT
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("norm", "swapped", "reason"),
    [
        (nn.functional.normalize, False, "there is no product of queries and keys"),
        (torch.tanh, False, "there is no product of queries and keys"),
        (torch.sigmoid, False, "their rows lie elsewhere, or"),  # queries of zero are not without effect there
        (torch.tanh, True, "their rows lie elsewhere, or"),
    ],
)
def test_that_there_is_no_product_is_proven(norm: Callable[[Tensor], Tensor], swapped: bool, reason: str) -> None:
    model: Any = vit()
    model.blocks[0].attn = randomize(Normed(norm, swapped)).double()
    found = comcat.prepare(model).inventory["blocks.0.attn"]
    assert tuple(found.full) == ("vo",)
    assert reason in found.dense_parts["qk"]


class Mixed(AttentionRope):
    """What acts on the values is no matter of single channels."""

    def __init__(self, between: Callable[[Tensor], Tensor], **args: Any) -> None:
        super().__init__(15, num_heads=3, **args)
        self.between = between

    def forward(self, x: Tensor, rope: Any = None, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 5)).permute(2, 0, 3, 1, 4)
        return self.proj(self.between(((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2)).flatten(2))


@pytest.mark.parametrize(
    ("between", "parts"),
    [
        (torch.tanh, ("qk", "channels")),
        (lambda z: z.softmax(-1), ("qk",)),
        (lambda z: nn.functional.layer_norm(z, (5,)), ("qk",)),
        (lambda z: z * z.roll(1, -1), ("qk",)),  # neighbours
        (lambda z: torch.cat([z[..., :3], z[..., :1] * z[..., 1:2], z[..., 4:]], -1), ("qk",)),  # a single pair
        (lambda z: z * z.roll(1, -2), ("qk",)),  # the same channel of the next head
        (lambda z: z.roll(1, -2), ("qk",)),  # the heads in another order
    ],
)
def test_only_channels_that_are_free_are_left_out(between: Callable[[Tensor], Tensor], parts: tuple[str, ...]) -> None:
    model: Any = vit()
    model.blocks[0].attn = randomize(Mixed(between)).double()
    found = comcat.prepare(model).inventory["blocks.0.attn"]
    assert tuple(found.full) == parts
    if len(parts) == 1:
        assert "channels depend on each other" in found.dense_parts["vo"]


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (4, 2), (3, 1)])
def test_errors_are_those_of_the_refitted_rest(heads: int, groups: int, block: int) -> None:
    d, out = 5, 7
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(heads * d + 3, heads * d, generator=generator, dtype=torch.float64)
    moment, weight = root.mT @ root, torch.randn(heads, d, out, generator=generator, dtype=torch.float64)
    order, errors = order_channels(moment, weight, groups, block)
    assert order.sort(-1).values.equal(torch.arange(d).expand(groups, -1))
    assert (errors.diff() <= 0).all()
    for r in range(d, 0, -block):
        keep = torch.zeros(groups, d, dtype=torch.bool).scatter(1, order[:, :r], True)
        keep = keep.repeat_interleave(heads // groups, 0).flatten()
        W = weight.flatten(0, 1)[~keep]
        schur = moment[~keep][:, ~keep] - moment[~keep][:, keep] @ torch.linalg.solve(
            moment[keep][:, keep], moment[keep][:, ~keep]
        )
        torch.testing.assert_close(errors[r], (W.mT @ schur @ W).trace(), rtol=1e-4, atol=1e-9)
