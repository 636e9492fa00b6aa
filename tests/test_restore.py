"""compress_ does all or nothing, and restore_ takes it back."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import comcat
from comcat.errors import CalibrationError, ModelError
from comcat.layers.attention_factors import AttentionFactors
from conftest import calibrated, images, swin, vit

pytestmark = pytest.mark.usefixtures("no_source")

PLAN = comcat.Plan(
    {
        "blocks.0.attn": {"qk": 2, "vo": 3},
        "blocks.0.mlp": {"neurons": 7},
        "blocks.1.attn": {"vo": 2},
        "blocks.1.mlp": {"fc1": 4},
        "head": {"rank": 3},
    }
)


def modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def test_restore_puts_the_very_layers_back() -> None:
    model = vit()
    before, x = modules(model), images(vit())
    expected = model(x)
    comcat.compress_(model, PLAN, calibrated(vit()))
    assert not torch.allclose(model(x), expected)
    comcat.restore_(model)
    assert modules(model) == before
    assert not hasattr(model, "comcat")
    assert torch.equal(model(x), expected)
    with pytest.raises(ModelError, match="nothing to restore"):
        comcat.restore_(model)


def test_restore_undoes_one_call_at_a_time() -> None:
    model = vit()
    dense = modules(model)
    comcat.compress_(model, comcat.Plan({"blocks.0.mlp": {"neurons": 9}}))
    once, first = modules(model), model.comcat
    comcat.compress_(model, comcat.Plan({"blocks.0.mlp": {"neurons": 5}, "head": {"rank": 2}}))
    comcat.restore_(model)
    assert modules(model) == once
    assert model.comcat is first
    comcat.restore_(model)
    assert modules(model) == dense


def test_restored_layers_follow_the_model() -> None:
    """Mode, dtype and what was trained elsewhere are those of now; a new classifier stays."""
    model = vit().train()
    comcat.compress_(model, PLAN)
    model.float().eval()
    model.blocks[0].norm1.weight.data.fill_(2)
    model.head = nn.Linear(15, 5)
    comcat.restore_(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(m.training for m in model.modules() if m is not model.head)
    assert (model.blocks[0].norm1.weight == 2).all()
    assert model(images(model)).shape[1] == 5


@pytest.mark.parametrize("how", ["copy", "compress", "pickle", "without"])
def test_only_compress_in_place_keeps_the_originals(how: str) -> None:
    model = vit()
    if how == "compress":
        model = comcat.compress(model, PLAN)
    else:
        comcat.compress_(model, PLAN, keep_original=how != "without")
    if how == "copy":
        model = copy.deepcopy(model)
    if how == "pickle":
        model.comcat = pickle.loads(pickle.dumps(model.comcat))
    assert model.comcat.undo is None
    with pytest.raises(ModelError, match=r"nothing to restore: compress_\(\.\.\., keep_original=True\)"):
        comcat.restore_(model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("at", [1, 3])
def test_a_call_that_fails_changes_nothing(error: type[BaseException], at: int) -> None:
    model = vit()
    before = modules(model)

    def stop(stage: str, done: int, total: int) -> None:
        if done == at:
            raise error("stop")

    with pytest.raises(error):
        comcat.compress_(model, PLAN, progress=stop)
    assert modules(model) == before
    assert not hasattr(model, "comcat")


def test_damaged_statistics_of_a_later_layer_change_nothing() -> None:
    model = vit()
    before, calibration = modules(model), calibrated(vit())
    z = calibration.moments["blocks.1.attn"]["z"]
    z -= 2 * z.diagonal().max() * torch.eye(len(z), dtype=z.dtype)
    with pytest.raises(CalibrationError, match="that no moment has"):
        comcat.compress_(model, PLAN, calibration)
    assert modules(model) == before


def test_a_failing_count_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of another size than promised: the model is not what the plan says, so it is not kept."""
    model = vit()
    before = modules(model)
    build = AttentionFactors.build

    def wider(self: Any, choice: dict[str, int]) -> dict[str, nn.Module]:
        return build(self, {part: width + 1 for part, width in choice.items()})

    monkeypatch.setattr(AttentionFactors, "build", wider)
    with pytest.raises(ModelError, match=r"has [\d,]+ params, its layers add up to [\d,]+: some of 'blocks\.0\.attn'"):
        comcat.compress_(model, PLAN)
    assert modules(model) == before


def test_a_plan_that_promises_something_else_is_reported() -> None:
    model = vit()
    made = comcat.plan(model, comcat.Budget(params=0.6))
    made.layers["blocks.0.attn"] = {"qk": 1}
    with pytest.warns(UserWarning, match=r"the plan expected [\d,]+ params, the compressed model has [\d,]+: the"):
        small = comcat.compress(model, made)
    assert len(small.comcat.report.notes) == 2
    assert comcat.Report.from_dict(small.comcat.report.to_dict()) == small.comcat.report


def test_the_report_names_the_largest_ridge() -> None:
    model = vit()
    calibration = calibrated(model)
    assert [layer.ridge for layer in comcat.compress(model, PLAN, calibration).comcat.report.layers] == [1e-10] * 5
    q = calibration.moments["blocks.0.attn"]["q"]
    values, vectors = torch.linalg.eigh(q[1])
    q[1] -= (values[0] + 1e-3 * values.mean()) * vectors[:, :1] @ vectors[:, :1].mT
    ridges = {layer.name: layer.ridge for layer in comcat.compress(model, PLAN, calibration).comcat.report.layers}
    assert ridges["blocks.0.attn"] > 1e-4
    assert ridges["blocks.1.attn"] == 1e-10
    assert comcat.compress(model, PLAN).comcat.report.layers[0].ridge is None


# -- twice ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [{"neurons": 5}, {"fc1": 3, "fc2": 2}, {"fc1": 3}, {"neurons": 6, "fc2": 2}])
@pytest.mark.parametrize("statistics", [True, False])
def test_an_ffn_can_be_reduced_twice(second: dict[str, int], statistics: bool) -> None:
    model = vit()
    first = comcat.Plan({"blocks.0.mlp": {"neurons": 9}, "head": {"rank": 3}})
    one = comcat.compress(model, first, calibrated(model) if statistics else None)
    two = comcat.compress(one, comcat.Plan({"blocks.0.mlp": second}), calibrated(one) if statistics else None)
    whole = two.comcat.plan
    assert whole.layers == {"blocks.0.mlp": {"neurons": 9, **second}, "head": {"rank": 3}}
    again = comcat.compress(model, whole)  # what a saved model is rebuilt from
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in two.state_dict().items()}
    if statistics:  # in one go, from the statistics of the dense model
        assert comcat.compress(model, whole, calibrated(model))(images(model)).isfinite().all()


def test_ranks_within_fewer_neurons_are_exact_at_full_rank() -> None:
    model = vit()
    calibration = calibrated(model)
    narrow = comcat.compress(model, comcat.Plan({"blocks.0.mlp": {"neurons": 9}}), calibration)
    both = comcat.compress(model, comcat.Plan({"blocks.0.mlp": {"neurons": 9, "fc1": 9, "fc2": 9}}), calibration)
    torch.testing.assert_close(both(images(model)), narrow(images(model)), rtol=1e-9, atol=1e-9)


def test_a_classifier_put_in_anew_is_dense_in_the_merged_plan() -> None:
    small = comcat.compress(vit(), PLAN)
    small.head = nn.Linear(15, 5, dtype=torch.float64)
    two = comcat.compress(small, comcat.Plan({"blocks.0.mlp": {"neurons": 5}}))
    assert "head" not in two.comcat.plan.layers
    assert two.comcat.plan.layers["blocks.0.mlp"] == {"neurons": 5}


def test_low_rank_layers_are_refused_with_advice() -> None:
    small = comcat.compress(vit(), PLAN)
    for name in ("blocks.0.attn", "blocks.1.mlp", "head"):
        with pytest.raises(
            comcat.PlanError, match=rf"'{name}' .* cannot be reduced: .*already low-rank; .* dense model"
        ):
            comcat.compress(small, comcat.Plan({name: PLAN.layers[name]}))
    with pytest.raises(ModelError, match=r"every layer of this SwinTransformer .* already low-rank"):
        comcat.plan(comcat.compress(swin(), comcat.full_rank_plan(swin())), comcat.Budget(params=0.5))
