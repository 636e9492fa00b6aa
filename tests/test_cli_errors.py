"""Bad input through the command line: one clear line that names the fix, and nothing half-written."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import comcat
from comcat.models.opening import load_model
from conftest import heed_interrupts, randomize
from test_cli import ARGS, NAME, Result, compress, model_options, place  # noqa: F401 - a fixture
from test_data import make_folder

# The fixture is used by name.
# ruff: noqa: F811


def refused(result: Result, *patterns: str, code: int = 1) -> None:
    assert result.code == code, (result.code, result.err)
    assert result.out == ""
    assert "Traceback" not in result.err
    for pattern in patterns:
        assert re.search(pattern, result.err), result.err


@pytest.mark.parametrize("command", ["compress", "evaluate", "inspect"])
def test_missing_data(place, tmp_path, command):
    more = {"compress": ["--out", tmp_path / "out", "--keep", 0.5], "inspect": ["--out", tmp_path / "x.png"]}
    arguments = [command, NAME, *model_options(place), "--data", tmp_path / "nowhere", *more.get(command, [])]
    refused(Result(arguments), "^error: no data at .*nowhere: there is no such folder. Give a folder")
    assert not list(tmp_path.iterdir())


def test_empty_class(place, tmp_path):
    data = make_folder(tmp_path / "data", per_class=12)
    (data / "class0b").mkdir()
    refused(compress(place, tmp_path / "out", "--keep", 0.5, data=data), "class0b.*Add its images or remove")


def test_corrupt_image(place, tmp_path):
    data = make_folder(tmp_path / "data", per_class=12)
    (data / "class1" / "3.png").write_bytes(b"no picture")
    options = ["--keep", 0.5, "--method", "uniform"]
    refused(compress(place, tmp_path / "out", *options, data=data), r"class1/3.png cannot be .*--skip-bad-images")
    assert not (tmp_path / "out").exists()
    result = compress(place, tmp_path / "out", *options, "--skip-bad-images", "--json", data=data)
    assert result.code == 0, result.err
    assert [name[-12:] for name in json.loads(result.out)["skipped_images"]] == ["class1/3.png"]
    assert "1 images could not be read" in result.err
    few = [*options, "--skip-bad-images", "--calibration-images", 36, "--overwrite"]
    refused(compress(place, tmp_path / "out", *few, data=data), "only 35 of the 36 calibration images can be read")


def test_too_few_images(place, tmp_path):
    out = tmp_path / "out"
    result = compress(place, out, "--keep", 0.5, "--calibration-images", 100)
    refused(result, r"asks for 100 images and .*'train', has 42. Use --calibration-images 42")
    refused(compress(place, out, "--keep", 0.5, "--split", "val"), "has 12 images.*fewer than 32.*--data-free")


def test_unknown_split(place):
    result = Result(["evaluate", NAME, *model_options(place), "--data", place / "data", "--split", "extra"])
    refused(result, "no split 'extra'. It has: train, val")


def test_labels_beyond_the_model(place, tmp_path):
    data = make_folder(tmp_path / "data", classes=4, per_class=2)
    refused(Result(["evaluate", NAME, *model_options(place), "--data", data]), "label 3 of .*which has 3 outputs")


def test_fewer_classes_than_outputs(place, tmp_path):
    data = make_folder(tmp_path / "data", classes=2, per_class=2)
    result = Result(["evaluate", NAME, *model_options(place), "--data", data])
    assert result.code == 0
    assert "2 classes and the model 3 outputs" in result.err
    assert "--class-map" in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", 1.5], "between 0 and 1"),
        (["--keep", 0], "between 0 and 1"),
        (["--keep", 0.01], "out of reach: the smallest"),
        (["--max-params", "90M"], "not below what the dense model costs"),
        (["--keep", 0.5, "--parts", "qk,xx"], "xx"),
        (["--keep", 0.5, "--method", "magic"], "magic.*uniform, spectrum, probe"),
        (["--keep", 0.5, "--device", "cuda:77"], "no device 'cuda:77'"),
        (["--keep", 0.5, "--std", 0, 1, 1], "--std"),
        (["--keep", 0.5, "--interpolation", "magic"], "no interpolation 'magic'"),
        (["--keep", 0.5, "--class-map", "nowhere.txt"], "no class map file nowhere.txt"),
        (["--plan", "nowhere.json"], "no file nowhere.json. Correct --plan"),
    ],
)
def test_wrong_values(place, tmp_path, options, message):
    refused(compress(place, tmp_path / "out", *options), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "exactly one of --keep"),
        (["--keep", 0.5, "--max-params", "1M"], "exactly one of --keep"),
        (["--keep", "half"], "Invalid value for '--keep'"),
        (["--max-params", "many"], "not a number such as 11M"),
        (["--keep", 0.5, "--data-free", "--fisher"], "without --calibration"),
        (["--keep", 0.5, "--model-arg", "img_size"], "NAME=VALUE"),
        (["--keep", 0.5, "--plan", "x.json"], "leave the budget out"),
    ],
)
def test_wrong_usage(place, tmp_path, options, message):
    result = compress(place, tmp_path / "out", *options)
    assert result.code == 2
    assert message in result.err.replace("│ ", "")


def test_no_data_at_all(place, tmp_path):
    result = Result(["compress", NAME, *model_options(place), "--keep", 0.5, "--out", tmp_path / "out"])
    assert result.code == 2
    assert "--data-free" in result.err


def test_output_directory_in_use(place, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    refused(compress(place, out, "--keep", 0.5), "already holds something")
    refused(compress(place, out, "--keep", 0.5, "--overwrite"), "not a comcat model")
    assert (out / "precious.txt").read_text() == "keep me"


def test_checkpoint_that_does_not_fit(place, tmp_path):
    options = ["--data", place / "data", "--checkpoint", place / "dense.safetensors"]
    refused(Result(["evaluate", NAME, *options]), "does not fit the model.*--model-arg")
    options[-1] = tmp_path / "nowhere.safetensors"
    refused(Result(["evaluate", NAME, *options]), "no file .*nowhere.safetensors. Correct --checkpoint")


def test_nan_weights(place, tmp_path):
    tensors = load_file(place / "dense.safetensors")
    tensors["blocks.1.mlp.fc1.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    shape = model_options(place)[2:]
    checkpoint = ["--checkpoint", tmp_path / "nan.safetensors", "--data", place / "data"]
    result = Result(["compress", NAME, *shape, *checkpoint, "--keep", 0.5, "--out", tmp_path / "out"])
    refused(result, "blocks.1.mlp")
    refused(Result(["evaluate", NAME, *shape, *checkpoint]), "NaN")


@pytest.fixture
def small(place, tmp_path):
    model = load_model(NAME, model_args=ARGS, pretrained=False)
    plan = comcat.Plan({"blocks.0.attn": {"qk": 3, "vo": 5}, "blocks.1.mlp": {"fc1": 7, "fc2": 11}})
    comcat.save(comcat.compress(model, plan), tmp_path / "small")
    return tmp_path / "small"


def _edit(small, change):
    config = json.loads((small / "comcat.json").read_text())
    change(config)
    (small / "comcat.json").write_text(json.dumps(config))


def _truncate(small):
    file = small / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _tamper(small):
    content = bytearray((small / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (small / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "truncated"),
        (_tamper, "checksum"),
        (lambda s: _edit(s, lambda c: c.update(comcat_format=99)), "upgrade comcat"),
        (lambda s: _edit(s, lambda c: c.update(extra=1)), "unknown fields extra"),
        (lambda s: _edit(s, lambda c: c["plan"]["layers"]["blocks.0.attn"].update(qk=1)), "contradict"),
        (lambda s: (s / "model.safetensors").unlink(), "cannot read"),
    ],
)
def test_damaged_model(place, small, damage, message):
    damage(small)
    refused(Result(["evaluate", small, "--data", place / "data"]), message)


def test_plan_and_calibration_of_another_model(place, tmp_path):
    other = randomize(load_model(NAME, model_args={**ARGS, "embed_dim": 48}, pretrained=False))
    stats = comcat.calibrate(other, [torch.randn(32, 3, 8, 8)])
    stats.save(tmp_path / "stats")
    comcat.Plan({"blocks.7.attn": {"qk": 2}}).save(tmp_path / "plan.json")
    out = tmp_path / "out"
    refused(compress(place, out, "--plan", tmp_path / "plan.json"), "blocks.7.attn")
    refused(compress(place, out, "--keep", 0.5, "--calibration", tmp_path / "stats"), "made for another model")
    (tmp_path / "stats").write_bytes(b"garbage")
    refused(compress(place, out, "--keep", 0.5, "--calibration", tmp_path / "stats"), "damaged or no safetensors")
    assert not out.exists()


def test_calibration_with_other_settings(place, tmp_path):
    options = ["--keep", 0.5, "--method", "uniform", "--no-eval", "--calibration", tmp_path / "stats"]
    assert compress(place, tmp_path / "a", *options, "--no-fisher").code == 0
    refused(compress(place, tmp_path / "b", *options, "--calibration-images", 40), "of 42 images, not 40")
    refused(compress(place, tmp_path / "b", *options, "--fisher"), "made with --no-fisher")


def test_errors_as_json(place, tmp_path):
    result = compress(place, tmp_path / "out", "--keep", 1.5, "--json")
    assert result.code == 1
    assert "between 0 and 1" in json.loads(result.out)["error"]


def test_full_disk(place, tmp_path, monkeypatch):
    """The disk fills up at the very end, after the model itself was written."""
    import comcat.report.figures as figures

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figures, "draw_kept", full)
    out = tmp_path / "out"
    refused(compress(place, out, "--keep", 0.5, "--method", "uniform"), "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["calibrate", "compress", "save"])
def test_ctrl_c(place, tmp_path, monkeypatch, moment):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(comcat, moment, interrupt)
    result = compress(place, tmp_path / "out", "--keep", 0.5, "--method", "uniform")
    refused(result, "interrupted; nothing was written$", code=130)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_keeps_the_calibration(place, tmp_path, monkeypatch):
    monkeypatch.setattr(comcat, "plan", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    stats = tmp_path / "stats"
    result = compress(place, tmp_path / "out", "--keep", 0.5, "--calibration", stats)
    refused(result, "interrupted; no model was written, the calibration is in", code=130)
    assert list(tmp_path.iterdir()) == [stats]


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_real_ctrl_c(place, tmp_path):
    """A real signal, sent while the program is at work."""
    arguments = ["compress", NAME, *model_options(place), "--data", place / "data", "--keep", "0.5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "comcat", *map(str, arguments), "--out", tmp_path / "out", "--batch-size", "1"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    assert process.stderr is not None
    assert "note: the images already are 8x8" in process.stderr.readline()
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "interrupted; nothing was written" in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())
