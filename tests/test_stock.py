"""Stock models: one width per kind, the host's own class, loaded where comcat cannot be imported."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers as tf
from torch import Tensor, nn
from typer.testing import CliRunner

import comcat
from comcat.cli import app
from comcat.errors import BudgetError, CheckpointError, ModelError, PlanError
from conftest import VIT, images, randomize, swin, vit
from test_data import make_folder

pytestmark = pytest.mark.usefixtures("no_source")

SHAPE: dict[str, Any] = {
    "hidden_size": 15,
    "num_attention_heads": 3,
    "intermediate_size": 17,
    "num_hidden_layers": 2,
    "image_size": 14,
    "patch_size": 7,
}


def _random(make: Callable[[], nn.Module]) -> nn.Module:
    return randomize(make()).double().eval()


def hf(**more: Any) -> nn.Module:
    return _random(lambda: tf.ViTForImageClassification(tf.ViTConfig(**SHAPE, num_labels=11, **more)))


def dinov2() -> nn.Module:
    shape = {**SHAPE, "mlp_ratio": 3, "num_labels": 11}
    return _random(lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**shape)))


def beit() -> nn.Module:
    return _random(lambda: tf.BeitForImageClassification(tf.BeitConfig(**SHAPE, num_labels=11)))


def clip() -> nn.Module:
    return _random(lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**SHAPE)))


def stages() -> nn.Module:
    """timm's Swin with heads of width 5, and 17 hidden units, then 34."""
    return swin(num_heads=(2, 4))


HOSTS = {"vit of transformers": hf, "dinov2": dinov2, "beit": beit, "swin of timm": stages}


def _output(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found


@pytest.mark.filterwarnings("ignore:attention stays dense")  # DINOv2 in versions of transformers without head_dim
@pytest.mark.parametrize("name", HOSTS)
def test_one_width_per_kind_within_the_budget(name: str) -> None:
    model = HOSTS[name]()
    calibration = comcat.calibrate(model, [images(model, 7)], fisher=True)
    before = sum(p.numel() for p in model.parameters())
    for method in ("uniform", "spectrum"):
        plan = comcat.plan(model, comcat.Budget(params=0.8), calibration, method, stock=True)
        stock = comcat.export_stock(model, plan, calibration)
        attention = [choice for layer, choice in plan.layers.items() if "qk" in choice]
        assert attention or name == "dinov2"
        assert all(choice == {"qk": choice["qk"], "vo": choice["qk"]} for choice in attention)
        assert len({choice["qk"] for choice in attention}) <= 1
        built = sum(p.numel() for p in stock.model.parameters())
        assert 0.65 * before < built <= 0.8 * before  # whole ratios of the FFN are coarse
        assert built == plan.estimate["params"] == stock.report.params_after
        assert type(stock.model) is type(model)
        assert not any(type(module).__module__.startswith("comcat") for module in stock.model.modules())


@pytest.mark.filterwarnings("ignore:attention stays dense")  # DINOv2 in versions of transformers without head_dim
@pytest.mark.parametrize("name", HOSTS)
def test_it_computes_what_the_compressed_model_does(name: str) -> None:
    model = HOSTS[name]()
    calibration = comcat.calibrate(model, [images(model, 7)])
    plan = comcat.plan(model, comcat.Budget(params=0.8), calibration, "spectrum", stock=True)
    x = images(model, 5, seed=3)
    with torch.no_grad():
        wanted = _output(comcat.compress(model, plan, calibration), x)
        got = _output(comcat.export_stock(model, plan, calibration).model, x)
    assert (wanted - got).abs().max() < 1e-12 * wanted.abs().max()


def test_full_width_is_the_dense_model() -> None:
    model = hf()
    x = images(model, 5, seed=3)
    stock = comcat.export_stock(model, comcat.Plan({}))
    assert stock.settings == {}
    with torch.no_grad():
        assert (_output(model, x) - _output(stock.model, x)).abs().max() < 1e-12


def test_stages_get_the_same_share_of_hidden_units() -> None:
    model = stages()
    plan = comcat.plan(model, comcat.Budget(params=0.8), None, stock=True)
    hidden = [choice["neurons"] for choice in plan.layers.values() if "neurons" in choice]
    assert hidden[0] == hidden[1] == hidden[2] / 2


BLOCKED = """
import json, sys
sys.modules["comcat"] = None
import torch
from safetensors.torch import load_file, save_file
{load}
x = load_file("x.safetensors")["x"]
with torch.no_grad():
    out = model.double().eval()(x)
save_file({{"out": out if isinstance(out, torch.Tensor) else out.logits}}, "out.safetensors")
"""
LOADS = {
    "vit of transformers": "import transformers; model = "
    "transformers.AutoModelForImageClassification.from_pretrained('small', dtype=torch.float64)",
    "swin of timm": "import timm; model = timm.create_model('local-dir:small', pretrained=True)",
}


@pytest.mark.parametrize("name", LOADS)
def test_its_library_loads_it_where_comcat_cannot_be_imported(name: str, tmp_path: Path) -> None:
    model = HOSTS[name]()
    plan = comcat.plan(model, comcat.Budget(params=0.8), None, stock=True)
    stock = comcat.export_stock(model, plan)
    stock.save(tmp_path / "small")
    x = images(model, 5, seed=3)
    safetensors.torch.save_file({"x": x}, tmp_path / "x.safetensors")
    code = BLOCKED.format(load=LOADS[name])
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    got = safetensors.torch.load_file(tmp_path / "out.safetensors")["out"]
    with torch.no_grad():
        wanted = _output(stock.model, x)
    # timm builds in float32 before it is widened
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    assert report["settings"] == stock.settings
    assert comcat.Plan.load(tmp_path / "small" / "plan.json") == plan
    with pytest.raises(CheckpointError, match="already holds something"):
        stock.save(tmp_path / "small")
    stock.save(tmp_path / "small", overwrite=True)


def test_the_processor_goes_along(tmp_path: Path) -> None:
    stock = comcat.export_stock(hf(), comcat.Plan({}))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    stock.save(tmp_path / "small", processor=tmp_path)
    assert (tmp_path / "small" / "preprocessor_config.json").read_text() == '{"image_mean": [0.5, 0.5, 0.5]}'
    with pytest.raises(ModelError, match=r"is no preprocessor_config\.json"):
        stock.save(tmp_path / "other", processor=tmp_path / "nowhere")


@pytest.mark.parametrize("make", [vit, clip])
def test_what_the_constructor_cannot_narrow_stays_dense_and_is_named(make: Callable[[], nn.Module]) -> None:
    model = make()
    with pytest.warns(UserWarning, match="attention stays dense: none of the .* sets the width of its heads"):
        plan = comcat.plan(model, comcat.Budget(params=0.9), None, stock=True)
    assert {part for choice in plan.layers.values() for part in choice} == {"neurons"}
    small = comcat.export_stock(model, plan).model
    assert sum(p.numel() for p in small.parameters()) == plan.estimate["params"]


def test_a_budget_out_of_reach_says_what_stays_dense() -> None:
    with pytest.raises(BudgetError, match=r"out of reach.*attention stays dense"):
        comcat.plan(vit(), comcat.Budget(params=0.5), None, stock=True)
    with pytest.raises(BudgetError, match=r"out of reach.*attention stays dense"):
        comcat.check_budget(vit(), comcat.Budget(params=0.5), stock=True)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"vit.layers.0.mlp": {"neurons": 7}}, "the widths of the ffn layers differ"),
        ({f"vit.layers.{i}.mlp": {"neurons": 7 + i} for i in range(2)}, "the widths of the ffn layers differ"),
        (
            {f"vit.layers.{i}.attention": {"qk": 2, "vo": 3} for i in range(2)},
            "the widths of the attention layers differ",
        ),
        ({f"vit.layers.{i}.mlp": {"fc1": 3} for i in range(2)}, "the widths of the ffn layers differ"),
        ({"classifier": {"rank": 3}}, "keeps its head dense"),
    ],
)
def test_plans_of_several_widths_are_refused(layers: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        comcat.export_stock(hf(), comcat.Plan(layers))


def test_other_refusals() -> None:
    with pytest.raises(PlanError, match="select both of qk and vo"):
        comcat.plan(hf(), comcat.Budget(params=0.9), None, parts=("qk", "ffn"), stock=True)
    with pytest.raises(PlanError, match="has no narrower stock form"):
        comcat.plan(vit(), comcat.Budget(params=0.9), None, parts=("qk", "vo"), stock=True)
    changed: Any = hf()
    changed.config.intermediate_size = 13
    with pytest.raises(ModelError, match="is not what the settings of its configuration build"):
        comcat.plan(changed, comcat.Budget(params=0.9), None, stock=True)
    foreign = nn.Sequential(nn.Conv2d(3, 15, 7, 7), nn.Flatten(2))
    foreign.add_module("blocks", vit().blocks)
    with pytest.raises(ModelError, match="is no class of transformers or timm"):
        comcat.export_stock(foreign, comcat.Plan({}))


def test_another_function_of_the_same_shapes_is_refused() -> None:
    """The class computes with a setting that shapes do not show, and nothing is written."""
    model: Any = stages()
    model.layers[0].blocks[0].mlp.act = nn.SiLU()
    plan = comcat.plan(model, comcat.Budget(params=0.8), None, stock=True)
    with pytest.raises(ModelError, match="differs from the compressed model"):
        comcat.export_stock(model, plan)


def test_the_command_writes_what_timm_loads(tmp_path: Path) -> None:
    import timm

    make_folder(tmp_path / "data" / "train", per_class=14)
    make_folder(tmp_path / "data" / "val", per_class=2)
    shape = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 4]}
    shape |= {"window_size": 2, "num_classes": 3}
    model = randomize(timm.create_model("swin_tiny_patch4_window7_224", **shape))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "dense.safetensors")
    arguments = ["compress", "swin_tiny_patch4_window7_224", "--checkpoint", tmp_path / "dense.safetensors"]
    arguments += [x for key, value in shape.items() for x in ("--model-arg", f"{key}={json.dumps(value)}")]
    arguments += ["--data", tmp_path / "data", "--out", tmp_path / "small", "--keep", 0.6, "--stock"]
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.stderr
    assert "pretrained=True" in result.stdout
    small = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True)
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    assert sum(p.numel() for p in small.parameters()) == report["report"]["params_after"]
    again = CliRunner().invoke(app, [*map(str, arguments), "--overwrite", "--no-eval"])
    assert again.exit_code == 0, again.stderr


def test_the_command_says_what_cannot_be(tmp_path: Path) -> None:
    model = vit(dtype=torch.float32)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "dense.safetensors")
    arguments = ["compress", "vit_tiny_patch16_224", "--checkpoint", str(tmp_path / "dense.safetensors"), "--stock"]
    arguments += [x for key, value in VIT.items() for x in ("--model-arg", f"{key}={json.dumps(value)}")]
    arguments += ["--out", str(tmp_path / "small")]
    runner = CliRunner()
    result = runner.invoke(app, [*arguments, "--keep", "0.5", "--data", str(tmp_path), "--method", "search"])
    assert result.exit_code == 2
    assert "differ from layer to layer" in result.stderr
    result = runner.invoke(app, [*arguments, "--keep", "0.5", "--data-free"])
    assert result.exit_code == 1
    assert "attention stays dense" in result.stderr
    result = runner.invoke(app, [*arguments, "--keep", "0.9", "--data-free"])
    assert result.exit_code == 0, result.stderr
    assert "attention stays dense" in result.stderr


def test_the_command_on_a_directory_of_transformers(tmp_path: Path) -> None:
    model: Any = hf().float()
    model.save_pretrained(tmp_path / "dense")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 14, "width": 14}}
    (tmp_path / "dense" / "preprocessor_config.json").write_text(json.dumps(processor))
    small = tmp_path / "small"
    arguments = ["compress", str(tmp_path / "dense"), "--stock", "--data-free", "--keep", "0.8", "--out", str(small)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.stderr
    assert "transformers.ViTForImageClassification.from_pretrained" in result.stdout
    names = {path.name for path in small.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "plan.json", "report.json"} <= names
    loaded = tf.AutoModelForImageClassification.from_pretrained(small)
    report = json.loads((small / "report.json").read_text())["report"]
    assert sum(p.numel() for p in loaded.parameters()) == report["params_after"] <= 0.8 * report["params_before"]
