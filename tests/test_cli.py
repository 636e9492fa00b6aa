"""The commands from the outside: what they print, what they write, and how they refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import comcat
from comcat.cli import app
from comcat.cli.inputs import parse_count, parse_model_args
from comcat.data import load_dataset, loader
from comcat.models.opening import load_model
from conftest import randomize
from test_data import make_folder, make_parquet, picture

ARGS = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3}
NAME = "vit_tiny_patch16_224"


class Result:
    def __init__(self, arguments: list) -> None:
        result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
        self.code, self.out, self.err = result.exit_code, result.stdout, " ".join(result.stderr.split())
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images in splits, and a checkpoint; shared, so tests must not change them."""
    root = tmp_path_factory.mktemp("cli")
    make_folder(root / "data" / "train", per_class=14)
    make_folder(root / "data" / "val", per_class=4)
    model = randomize(load_model(NAME, model_args=ARGS, pretrained=False))
    save_file(model.state_dict(), root / "dense.safetensors")
    return root


def model_options(place: Path) -> list:
    return ["--checkpoint", place / "dense.safetensors"] + [
        x for k, v in ARGS.items() for x in ("--model-arg", f"{k}={v}")
    ]


def compress(place: Path, out: Path, *options: object, data: Path | None = None) -> Result:
    return Result(["compress", NAME, *model_options(place), "--data", data or place / "data", "--out", out, *options])


@pytest.fixture(scope="module")
def saved(place):
    """A model compressed by the default method, with its JSON document."""
    result = compress(
        place, place / "small", "--keep", 0.5, "--json", "--calibration", place / "stats", "--mean", 0.4, 0.5, 0.6
    )
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_compress_writes_a_complete_directory(place, saved):
    assert sorted(p.name for p in (place / "small").iterdir()) == [
        "comcat.json",
        "model.safetensors",
        "plan.json",
        "report.json",
        "report.png",
    ]
    assert json.loads((place / "small" / "report.json").read_text()) == saved
    assert (place / "small" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert 0.98 < saved["compressed"]["params"] / (0.5 * saved["dense"]["params"]) <= 1
    assert saved["compressed"]["bytes"] < saved["dense"]["bytes"]
    assert saved["method"] == "spectrum"
    assert saved["calibration"] == {"images": 42, "fisher": True}
    assert saved["dense"]["evaluation"]["images"] == 12
    assert not list(place.glob(".*tmp"))


def test_saved_model_evaluates_the_same(place, saved):
    result = Result(["evaluate", place / "small", "--data", place / "data", "--json"])
    document = json.loads(result.out)
    for key in ("top1", "top5"):
        assert document[key] == saved["compressed"]["evaluation"][key]
    # The normalization that was given when compressing is part of the saved model.
    assert document["loss"] == pytest.approx(saved["compressed"]["evaluation"]["loss"], rel=1e-4)
    assert document["split"] == "val"


def test_tables(place, saved, tmp_path):
    out = tmp_path / "out"
    result = compress(place, out, "--keep", 0.6, "--calibration", place / "stats", "--method", "spectrum")
    assert result.code == 0, result.err
    for text in ("blocks.0.attn", "QK", "parameters", "MACs", "top-1", "images/s", str(out)):
        assert text in result.out
    assert "calibration read from" in result.err


def test_what_stays_dense_is_named(place, tmp_path):
    options = ["--model-arg", "qk_norm=True", "--data-free", "--keep", 0.7, "--out", tmp_path / "out"]
    model = randomize(load_model(NAME, model_args={**ARGS, "qk_norm": True}, pretrained=False))
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    shape = model_options(place)[2:]
    result = Result(["compress", NAME, "--checkpoint", tmp_path / "dense.safetensors", *shape, *options])
    assert result.code == 0, result.err
    assert "Left dense" in result.out
    assert "blocks.1.attn" in result.out


def test_a_model_without_a_classifier(place, tmp_path):
    args = {**ARGS, "num_classes": 0}
    model = randomize(load_model(NAME, model_args=args, pretrained=False))
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    options = ["--checkpoint", tmp_path / "dense.safetensors", "--data", place / "data"]
    options += [x for k, v in args.items() for x in ("--model-arg", f"{k}={v}")]
    result = Result(["compress", NAME, *options, "--keep", 0.6, "--out", tmp_path / "small"])
    assert result.code == 0, result.err
    assert "same neighbour" in result.out
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    assert report["calibration"]["fisher"]  # of a squared error on the features
    assert report["dense"]["evaluation"]["metrics"]["neighbours"] == 100
    comcat.save(comcat.compress(model, comcat.full_rank_plan(model)), tmp_path / "same")
    result = Result(["evaluate", tmp_path / "small", "--data", place / "data", "--reference", tmp_path / "same"])
    assert result.code == 0, result.err
    assert "features against" in result.out
    refused = Result(["evaluate", tmp_path / "small", "--data", place / "data"])
    assert "no classifier to evaluate" in refused.err
    assert "--reference MODEL" in refused.err


def test_a_metric_of_ones_own(place, tmp_path, monkeypatch):
    (tmp_path / "cli_scores.py").write_text(
        "def spread(model, loader):\n    return max(float(model(x).std()) for x, _ in loader)\n"
        "def broken(model, loader):\n    return None\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    result = compress(place, tmp_path / "small", "--keep", 0.5, "--metric", "cli_scores:spread")
    assert result.code == 0, result.err
    assert "spread" in result.out
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    assert report["compressed"]["evaluation"]["metrics"]["spread"] > 0
    again = Result(["evaluate", "small", "--data", place / "data", "--metric", "cli_scores:spread", "--json"])
    assert json.loads(again.out)["metrics"] == pytest.approx(report["compressed"]["evaluation"]["metrics"], rel=1e-4)
    assert "spread" in Result(["evaluate", "small", "--data", place / "data", "--metric", "cli_scores:spread"]).out
    refused = Result(["evaluate", "small", "--data", place / "data", "--metric", "cli_scores:broken"])
    assert refused.code == 1
    assert "error: the metric 'broken' returned NoneType, which is no number" in refused.err


def test_evaluate_table_and_reference(place, saved):
    small = place / "small"
    result = Result(["evaluate", small, "--data", place / "data", "--split", "train", "--reference", small])
    assert result.code == 0
    assert "42 images" in result.out
    assert "100.00 % of images" in result.out


def test_plan_can_be_edited_and_applied(place, saved, tmp_path):
    plan = json.loads((place / "small" / "plan.json").read_text())
    plan["layers"] = {"blocks.1.attn": {"qk": 2, "vo": 3}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.warns(
        UserWarning, match=r"the plan expected .* params, the compressed model has .*: the plan was edited"
    ):
        result = compress(
            place, tmp_path / "out", "--plan", tmp_path / "plan.json", "--json", "--calibration", place / "stats"
        )
    report = json.loads(result.out)["report"]
    layers = report["layers"]
    assert [note.partition(" expected")[0] for note in report["notes"]] == ["the plan", "the plan"]
    assert [(layer["name"], layer["ranks"]) for layer in layers] == [("blocks.1.attn", {"qk": 2, "vo": 3})]


def test_data_free(place, tmp_path):
    out = tmp_path / "out"
    options = ["--data-free", "--keep-macs", 0.6, "--parts", "qk,vo,ffn", "--out", out, "--json"]
    result = Result(["compress", NAME, *model_options(place), *options])
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["calibration"] is None
    assert document["compressed"]["evaluation"] is None
    assert comcat.load(out).training is False


def test_seed_decides(place, tmp_path):
    tensors = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = ["--max-params", "9k", "--method", "uniform", "--calibration-images", 32, "--no-eval"]
        assert compress(place, tmp_path / name, *options, "--seed", seed).code == 0
        tensors.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])
    assert any(not torch.equal(tensors[0][k], tensors[2][k]) for k in tensors[0])


def test_parquet_and_one_split_only(place, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = make_parquet(tmp_path / "data", {"train": 40})
    result = compress(place, tmp_path / "out", "--keep", 0.5, "--method", "uniform", data=data)
    assert result.code == 0, result.err
    assert "calibration and evaluation share their images" in result.err


@pytest.mark.parametrize("calibrated", [False, True])
def test_inspect(place, tmp_path, calibrated):
    out = tmp_path / "spectra.png"
    data = ["--data", place / "data"] if calibrated else []
    arguments = ["inspect", NAME, *model_options(place), *data, "--out", out]
    result = Result([*arguments, "--json"])
    assert result.code == 0, result.err
    found = {(s["layer"], s["part"]) for s in json.loads(result.out)["spectra"]}
    assert {("blocks.0.attn", "qk"), ("blocks.1.mlp", "fc1"), ("head", "head")} <= found
    assert ("blocks.1.mlp", "neurons") in found or not calibrated
    assert out.read_bytes().startswith(b"\x89PNG")
    refused = Result(arguments)
    assert refused.code == 1
    assert "already exists. Use --overwrite" in refused.err
    assert "break-even" in Result([*arguments, "--overwrite"]).out


def test_help_and_version():
    assert "compress" in Result(["--help"]).out
    assert Result(["--version"]).out == f"comcat {comcat.__version__}\n"
    for command in ("compress", "evaluate", "inspect", "demo"):
        assert "--json" in Result([command, "--help"]).out


def test_module_entry_point(place):
    run = subprocess.run(
        [sys.executable, "-m", "comcat", "evaluate", "no_such_model", "--data", place / "data", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 1
    assert run.stderr.startswith("error: ")
    assert "Traceback" not in run.stderr
    assert "no_such_model" in json.loads(run.stdout)["error"]


def test_parsers():
    import typer

    assert [parse_count(t, "") for t in ("11M", "2.3G", "1,000", "7k", "5")] == [11e6, 2.3e9, 1000, 7000, 5]
    assert parse_model_args(["a=1", "b=(2, 3)", "c=gelu", "d=None"]) == {"a": 1, "b": (2, 3), "c": "gelu", "d": None}
    for bad in ("", "M", "1.2.3", "x", "-5"):
        with pytest.raises(typer.BadParameter):
            parse_count(bad, "--max-params")
    with pytest.raises(typer.BadParameter):
        parse_model_args(["img_size"])


def test_preprocessing_reaches_the_images(place):
    data = load_dataset(
        str(place / "data"), data_config={"input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    )
    images, _ = next(iter(loader(data)))
    expected = torch.tensor(list(picture(0).tobytes())).view(8, 8, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(images[0], expected)
