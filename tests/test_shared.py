"""A layer under several names counts once and is replaced everywhere; weights that two layers share are left alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import comcat
from comcat.errors import CheckpointError, ModelError
from comcat.hosts import find_layers
from comcat.nn.low_rank_attention import LowRankAttention
from conftest import calibrated, images, vit

WIDE = {"embed_dim": 48, "num_heads": 3, "depth": 3, "mlp_ratio": 2.0}


def attention_twice() -> nn.Module:
    model = vit(**WIDE)
    model.blocks[2].attn = model.blocks[0].attn
    return model


def mlp_twice() -> nn.Module:
    model = vit(**WIDE)
    model.blocks[1].mlp = model.blocks[0].mlp
    return model


def one_block() -> nn.Module:
    """ALBERT: every block is the same."""
    model = vit(**WIDE)
    model.blocks = nn.Sequential(*[model.blocks[0]] * 3)
    return model


def second_name() -> nn.Module:
    model = vit(**WIDE)
    model.last = model.blocks[2]
    model.classifier = model.head
    return model


def tied_linear() -> nn.Module:
    model = vit(**WIDE)
    model.blocks[1].mlp.fc1 = model.blocks[0].mlp.fc1
    return model


def tied_weight() -> nn.Module:
    model = vit(**WIDE)
    model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
    return model


def tied_classifier() -> nn.Module:
    model = vit(**WIDE)
    model.prototypes = nn.ParameterList([model.head.weight])
    return model


TWICE = {"attention": attention_twice, "mlp": mlp_twice, "every block": one_block, "second name": second_name}
TIED = {"linear": tied_linear, "weight": tied_weight, "classifier": tied_classifier}


@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("make", [*TWICE.values(), *TIED.values()], ids=[*TWICE, *TIED])
def test_half_is_half(make: Callable[[], nn.Module], statistics: bool, unit: str, no_source: None) -> None:
    model = make()
    calibration = calibrated(model, 64, probe_images=0) if statistics else None
    plan = comcat.plan(model, comcat.Budget(**{unit: 0.6}), calibration, "spectrum")
    small = comcat.compress(model, plan, calibration)
    dense, built = comcat.profile(model), comcat.profile(small)
    assert 0.59 < getattr(built, unit) / getattr(dense, unit) <= 0.6
    assert (built.params, built.macs) == (plan.estimate["params"], plan.estimate["macs"])
    assert built.params == sum({id(p): p.numel() for p in small.parameters()}.values())
    assert small(images(model)).isfinite().all()


@pytest.mark.parametrize("make", [*TWICE.values(), *TIED.values()], ids=[*TWICE, *TIED])
def test_full_rank_is_exact(make: Callable[[], nn.Module], no_source: None) -> None:
    model = make()
    full = comcat.compress(model, comcat.full_rank_plan(model), calibrated(model, 32))
    torch.testing.assert_close(full(images(model)), model(images(model)), rtol=1e-7, atol=1e-7)


def test_all_names_are_replaced_and_restored(no_source: None) -> None:
    model = attention_twice()
    attention = model.blocks[0].attn
    comcat.compress_(model, comcat.Plan({"blocks.0.attn": {"qk": 3}}))
    assert isinstance(model.blocks[0].attn, LowRankAttention)
    assert model.blocks[2].attn is model.blocks[0].attn
    comcat.restore_(model)
    assert model.blocks[0].attn is model.blocks[2].attn is attention


def test_probing_replaces_all_names(no_source: None) -> None:
    model = attention_twice()
    calibration = calibrated(model, 32, probe_images=8)
    plan = comcat.plan(model, comcat.Budget(params=0.6), calibration, "probe")
    assert comcat.profile(comcat.compress(model, plan, calibration)).params == plan.estimate["params"]
    assert model.blocks[0].attn is model.blocks[2].attn


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (tied_linear, "blocks.0.mlp", r"'blocks\.0\.mlp\.fc1' and 'blocks\.1\.mlp\.fc1' are one layer"),
        (tied_weight, "blocks.1.attn", r"its weights are also those of 'blocks\.0\.attn\.qkv'"),
        (tied_classifier, "head", "its weights are also those of 'prototypes'"),
    ],
)
def test_tied_layers_stay_dense_and_are_named(make: Callable[[], nn.Module], name: str, reason: str) -> None:
    model = make()
    assert name not in [site.name for site in find_layers(model).layers]
    with pytest.raises(comcat.PlanError, match=rf"'{name}' \(\w+\) cannot be reduced: .*{reason}"):
        comcat.compress(model, comcat.Plan({name: {}}))


def test_a_model_of_tied_layers_only_says_so() -> None:
    model = vit(depth=1, num_classes=0)
    model.other = nn.ParameterList([model.blocks[0].attn.qkv.weight, model.blocks[0].mlp.fc1.weight])
    with pytest.raises(ModelError, match=r"Left dense: Attention .its weights are also those of 'other'"):
        find_layers(model)


@pytest.mark.parametrize("make", [attention_twice, tied_weight])
def test_saving_says_what_cannot_be_rebuilt(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make()
    small = comcat.compress(model, comcat.Plan({"blocks.1.mlp": {"neurons": 20}}))
    with pytest.raises(CheckpointError, match=r"share.*'blocks\.[012]\.attn"):
        comcat.save(small, tmp_path / "m")
    assert not (tmp_path / "m").exists()
