"""A plan is data: JSON that can be written by hand, and names what does not fit the model."""

import json
from typing import Any

import pytest

import comcat
from comcat.errors import CheckpointError, PlanError
from conftest import calibrated, vit

pytestmark = pytest.mark.usefixtures("no_source")


def test_plans_survive_json(tmp_path: Any) -> None:
    host = vit()
    for plan in (
        comcat.plan(host, comcat.Budget(macs=0.6), calibrated(host, 32)),
        comcat.full_rank_plan(host),
        comcat.Plan({}),
    ):
        assert comcat.Plan.from_json(plan.to_json()) == plan
        assert comcat.Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan
        plan.save(tmp_path / "plan.json")
        assert comcat.Plan.load(tmp_path / "plan.json") == plan
        lines = plan.to_json().splitlines()
        for name in plan.layers:
            assert sum(f'"{name}"' in line for line in lines) == 1


def test_a_hand_written_plan_is_enough() -> None:
    text = '{"comcat_plan": 1, "layers": {"blocks.0.attn": {"qk": 2}, "head": {"rank": 3}}}'
    small = comcat.compress(vit(), comcat.Plan.from_json(text))
    assert (small.blocks[0].attn.qk_rank, small.blocks[0].attn.vo_rank, small.head.rank) == (2, 5, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a plan"),
        ("{}", "not a plan"),
        ('{"comcat_plan": 1}', "not a plan"),
        ('{"comcat_plan": 1, "layers": []}', "not a plan"),
        ('{"comcat_plan": 2, "layers": {}}', "has format 2, this comcat reads 1; upgrade"),
        ('{"comcat_plan": 1, "layers": {}, "rank": 3, "budge": 1}', "unknown fields budge, rank"),
        ('{"comcat_plan": 1, "layers": {"head": 3}}', "layer 'head': the widths must be an object"),
    ],
)
def test_bad_plan_files_are_refused(text: str, message: str, tmp_path: Any) -> None:
    with pytest.raises(PlanError, match=message):
        comcat.Plan.from_json(text)
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=message):
        comcat.Plan.load(tmp_path / "plan.json")


def test_unreadable_plan_files_are_refused(tmp_path: Any) -> None:
    with pytest.raises(PlanError, match="cannot read plan"):
        comcat.Plan.load(tmp_path / "missing.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(PlanError, match="cannot read plan"):
        comcat.Plan.load(tmp_path / "binary")
    with pytest.raises(CheckpointError, match="cannot write"):
        comcat.Plan({}).save(tmp_path / "binary" / "plan.json")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"blocks.7.attn": {"qk": 2}}, r"'blocks\.7\.attn' is not in this model; its layers are blocks\.0\.attn"),
        ({"blocks.0.attn": {"qk": 6}}, r"'blocks\.0\.attn': qk is 6, but must be an integer from 1 to 5"),
        ({"blocks.0.attn": {"qk": 0}}, r"qk is 0, but must be an integer from 1 to 5"),
        ({"blocks.0.attn": {"vo": 2.0}}, r"vo is 2\.0, but must be an integer"),
        ({"blocks.0.attn": {"vo": True}}, r"vo is True, but must be an integer"),
        ({"blocks.0.attn": {"vo": "all"}}, r"vo is 'all', but must be an integer"),
        ({"blocks.0.attn": {"rank": 3}}, r"'blocks\.0\.attn': unknown part 'rank'; possible are qk, vo"),
        ({"blocks.1.mlp": {"neurons": 18}}, r"'blocks\.1\.mlp': neurons is 18, but must be .* from 1 to 17"),
        ({"blocks.1.mlp": {"neurons": 3, "fc1": 4}}, r"'blocks\.1\.mlp': fc1 is 4, but must be .* from 1 to 3"),
        ({"head": {"fc1": 2}}, "'head': unknown part 'fc1'; possible are rank"),
        ({"head": {"rank": 12}}, "'head': rank is 12, but must be an integer from 1 to 11"),
    ],
)
def test_plans_that_do_not_fit_name_the_module(layers: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        comcat.compress(vit(), comcat.Plan(layers))


@pytest.mark.parametrize(
    ("args", "layer", "message"),
    [
        ({"qk_norm": True}, {"blocks.0.attn": {"qk": 2}}, r"'qk' cannot be reduced \(query-key normalization"),
        ({"scale_attn_norm": True}, {"blocks.0.attn": {"vo": 2}}, r"'vo' cannot be reduced \(normalization"),
        ({"scale_mlp_norm": True}, {"blocks.0.mlp": {"neurons": 2}}, r"'neurons' cannot be reduced \(normaliz"),
    ],
)
def test_parts_that_cannot_be_reduced_say_why(args: dict[str, Any], layer: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        comcat.compress(vit(**args), comcat.Plan(layer))


@pytest.mark.parametrize("ffn", ["low-rank", "neurons"])
def test_full_rank_plan_names_every_width(ffn: str) -> None:
    plan = comcat.full_rank_plan(vit(), ffn)
    assert plan.layers["blocks.1.attn"] == {"qk": 5, "vo": 5}
    assert plan.layers["blocks.1.mlp"] == ({"neurons": 17} if ffn == "neurons" else {"fc1": 15, "fc2": 15})
    assert plan.layers["head"] == {"rank": 11}
    with pytest.raises(PlanError, match="must be 'low-rank' or 'neurons'"):
        comcat.full_rank_plan(vit(), "dense")
