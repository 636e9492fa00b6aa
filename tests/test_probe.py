"""Measured sensitivities: replay is exact, probing leaves no trace and is paid for once."""

from functools import partial
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import ParallelThingsBlock
from torch import nn

import comcat
from comcat.hosts import find_layers
from comcat.layers.base import Inventory
from comcat.models.modes import evaluating
from comcat.nn.swap import swapped
from comcat.planning.probe import Prober, sample_size
from conftest import VIT, calibrated, images, make, swin, vit

pytestmark = pytest.mark.usefixtures("no_source")

HOSTS = {
    "vit": vit,
    "distilled": partial(make, "deit_tiny_distilled_patch16_224", **VIT),
    "siglip": partial(make, "vit_base_patch16_siglip_224", **VIT),
    "parallel things": partial(vit, block_fn=ParallelThingsBlock),
    "features": partial(vit, num_classes=0),
    "swin": swin,
}
#: Branches that run side by side cannot be replayed; there every measurement is a full pass.
REPLAYED = set(HOSTS) - {"parallel things"}


def prober_of(model: nn.Module) -> tuple[Prober, Inventory]:
    inventory = find_layers(model)
    return Prober(model, images(model, 11), batch_size=4), inventory


@pytest.mark.parametrize("host", HOSTS)
def test_replay_measures_what_a_full_pass_measures(host: str) -> None:
    model = HOSTS[host]()
    prober, inventory = prober_of(model)
    prober.record(inventory)
    assert bool(prober.blocks) == (host in REPLAYED)
    blocks = prober.blocks
    for site in inventory.layers:
        factors = site.factors()
        for part in site.full:
            prober.blocks = blocks
            fast = prober.measure(site, factors, {part: 1})
            prober.blocks = []
            assert fast == prober.measure(site, factors, {part: 1}) > 0


def test_divergence_is_the_mean_kl() -> None:
    model = vit()
    x = images(model, 11)
    prober, inventory = prober_of(model)
    prober.record(inventory)
    site = inventory["blocks.0.attn"]
    small = comcat.compress(model, comcat.Plan({site.name: {"vo": 2}}))
    p, q = (m(x).detach().log_softmax(-1) for m in (model, small))
    expected = (p.exp() * (p - q)).sum(-1).mean()
    measured = prober.measure(site, site.factors(), {"vo": 2})
    assert measured == pytest.approx(float(expected), rel=1e-4)
    assert measured == prober.measure_all(site.factors().build({"vo": 2}))


def test_features_are_compared_by_relative_error() -> None:
    model = vit(num_classes=0)
    prober, _ = prober_of(model)
    assert prober.divergence(prober.reference) == 0
    assert prober.divergence((prober.reference[0].mean(0).expand(11, -1),)) == pytest.approx(1)


def test_full_width_diverges_nowhere() -> None:
    model = vit()
    prober, inventory = prober_of(model)
    prober.record(inventory)
    for site in inventory.layers:
        for part, full in site.full.items():
            assert prober.measure(site, site.factors(), {part: full}) < 1e-9


def test_swapped_modules_come_back_after_an_exception() -> None:
    model = vit()
    before = dict(model.named_modules())
    with pytest.raises(KeyError), swapped(model, {"head": nn.Identity(), "blocks.0.attn": nn.Identity()}):  # noqa: PT012
        assert model.head is not before["head"]
        raise KeyError
    assert dict(model.named_modules()) == before


def test_probing_leaves_no_trace() -> None:
    model = vit().train()
    modules, weights = dict(model.named_modules()), {n: t.clone() for n, t in model.state_dict().items()}
    with evaluating(model):
        prober, inventory = prober_of(model)
        prober.record(inventory)
        for site in inventory.layers:
            for part in site.full:
                prober.measure(site, site.factors(), {part: 1})
    assert dict(model.named_modules()) == modules
    assert all(weights[n].equal(t) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in modules.values())
    assert all(m.training for m in modules.values())
    assert all(p.requires_grad for p in model.parameters())


def measurements(model: nn.Module, calibration: comcat.Calibration, patch: pytest.MonkeyPatch, kept: float) -> int:
    """How many single cuts are measured while planning."""
    seen: list[str] = []
    measure = Prober.measure
    with patch.context() as context:
        context.setattr(Prober, "measure", lambda *args: seen.append("one") or measure(*args))
        comcat.plan(model, comcat.Budget(params=kept), calibration, "probe")
    return len(seen)


def test_probes_are_cached_with_the_calibration(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    model = vit(embed_dim=48, num_heads=3, mlp_ratio=2.0)
    calibration = calibrated(model, 24, probe_images=8)
    first = measurements(model, calibration, monkeypatch, 0.7)
    known = {key: value for values in calibration.probes.values() for key, value in values.items()}
    assert len(known) == first > 20
    assert measurements(model, calibration, monkeypatch, 0.8) == 0
    calibration.save(tmp_path / "c.safetensors")
    again = comcat.Calibration.load(tmp_path / "c.safetensors")
    assert measurements(model, again, monkeypatch, 0.75) == 0
    plans = [comcat.plan(model, comcat.Budget(params=0.7), c, "probe") for c in (calibration, again)]
    assert plans[0] == plans[1]


def test_probing_is_not_worse_than_uniform_on_its_own_images() -> None:
    model = vit(embed_dim=48, num_heads=3, mlp_ratio=2.0)
    calibration = calibrated(model, 64, probe_images=64)
    prober = Prober(model, calibration.images, "classes")
    lost = {}
    for method in ("uniform", "probe"):
        plan = comcat.plan(model, comcat.Budget(params=0.7), calibration, method)
        with torch.no_grad():
            lost[method] = prober.divergence((comcat.compress(model, plan, calibration)(calibration.images).float(),))
        if method == "probe":
            assert plan.estimate["divergence"] == pytest.approx(lost["probe"], rel=1e-3)
    assert lost["probe"] < lost["uniform"]


@pytest.mark.parametrize("width", [1, 2, 3, 5, 16, 64])
def test_levels_are_proper_widths(width: int) -> None:
    for layer in find_layers(vit(embed_dim=3 * width)).layers:
        for part, full in layer.full.items():
            found = layer.widths(part, layer.levels[part])
            assert found == sorted(set(found))
            assert all(1 <= at < full for at in found)
            assert found or layer.reach(part) == 1


@pytest.mark.parametrize(
    ("macs", "held", "used"), [(1, 256, 256), (10**12, 256, 32), (10**12, 7, 7), (4 * 10**9, 256, 50)]
)
def test_large_models_are_probed_with_fewer_images(macs: int, held: int, used: int) -> None:
    assert sample_size(macs, held) == used
