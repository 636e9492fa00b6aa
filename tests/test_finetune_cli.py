"""``comcat finetune`` from the outside: what it prints, what it writes, and how it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import comcat
from comcat.models.opening import load_model
from conftest import heed_interrupts, randomize
from test_cli import ARGS, NAME, Result
from test_cli_errors import refused
from test_data import make_folder

# 42 images in batches of 8: 5 steps in an epoch.
QUICK = ["--batch-size", 8, "--log-every", 1, "--checkpoint-every", 2, "--lr", 1e-3, "--workers", 0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images in splits, the dense weights, and a compressed model; shared, so tests must not change them."""
    root = tmp_path_factory.mktemp("finetune")
    make_folder(root / "data" / "train", per_class=14)
    make_folder(root / "data" / "val", per_class=4)
    model = randomize(load_model(NAME, model_args=ARGS, pretrained=False)).eval()
    save_file(model.state_dict(), root / "dense.safetensors")
    plan = comcat.Plan({"blocks.0.attn": {"qk": 3, "vo": 5}, "blocks.1.mlp": {"neurons": 31}})
    comcat.save(comcat.compress(model, plan), root / "small")
    return root


def finetune(place: Path, out: Path, *options: object, data: Path | None = None) -> Result:
    teacher = ["--teacher-checkpoint", place / "dense.safetensors"]
    return Result(["finetune", place / "small", "--data", data or place / "data", "--out", out, *teacher, *options])


def test_a_run_leaves_a_model_and_its_log(place, tmp_path):
    out = tmp_path / "out"
    result = finetune(place, out, *QUICK, "--epochs", 2, "--ema", 0.9, "--feature-blocks", "0,-1", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    names = {path.name for path in out.iterdir()}
    assert names == {"comcat.json", "model.safetensors", "finetune.json", "metrics.jsonl", "tensorboard"}
    assert json.loads((out / "finetune.json").read_text()) == document
    assert (document["train_split"], document["eval_split"]) == ("train", "val")
    assert document["config"]["epochs"] == 2
    assert document["steps"] == 10
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(11))

    evaluated = json.loads(Result(["evaluate", out, "--data", place / "data", "--json"]).out)
    assert evaluated["loss"] == pytest.approx(document["after"]["loss"], rel=1e-5)
    before, after = comcat.load(place / "small").state_dict(), comcat.load(out).state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_table(place, tmp_path):
    result = finetune(place, tmp_path / "out", *QUICK, "--max-steps", 1, "--distillation", "hard")
    assert result.code == 0, result.err
    for text in ("before", "after", "parameters", "top-1", "split val", str(tmp_path / "out")):
        assert text in result.out
    assert "trains on 'train', evaluates on 'val'" in result.err


def test_settings_from_a_file(place, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("epochs: 1\nlr: 1e-3\nmixup: 0.8\nauto_augment: rand-m5-inc1\nbetas: [0.8, 0.99]\n")
    result = finetune(place, tmp_path / "out", "--config", file, *QUICK, "--epochs", 0.5, "--hflip", 0, "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["config"]["epochs"] == 0.5  # the option goes first
    assert (document["config"]["mixup"], document["config"]["betas"]) == (0.8, [0.8, 0.99])
    assert document["augmentation"]["auto_augment"] == "rand-m5-inc1"
    assert document["augmentation"]["hflip"] == 0


def test_interrupted_and_resumed(place, tmp_path, monkeypatch):
    options = [*QUICK, "--epochs", 2, "--random-erasing", 0.5, "--keep-checkpoints"]
    assert finetune(place, tmp_path / "whole", *options).code == 0
    original = comcat.training.engine.Run._after_step

    def interrupt(self):
        original(self)
        if self.step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comcat.training.engine.Run, "_after_step", interrupt)
        result = finetune(place, tmp_path / "out", *options)
    refused(result, "interrupted; the checkpoint of step 6 is in '.*out'; continue with --resume$", code=130)
    assert not (tmp_path / "out" / "comcat.json").exists()
    refused(finetune(place, tmp_path / "out", *options), "already holds a run; continue it with --resume")
    refused(finetune(place, tmp_path / "out", *options, "--resume", "--epochs", 3), "epochs was 2.0 and is now 3.0")

    newest = tmp_path / "out" / "checkpoints" / "step-00000006" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    result = finetune(place, tmp_path / "out", *options, "--resume")
    assert result.code == 0, result.err
    assert "warning: the checkpoint of step 6 is damaged and passed over" in result.err
    whole, again = (comcat.load(tmp_path / name).state_dict() for name in ("whole", "out"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] != []
    assert not list((tmp_path / "out").glob(".*"))


def test_a_metric_of_ones_own(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    body = "def first(model, loader):\n    return sum(float((model(x).argmax(1) == 0).sum()) for x, _ in loader)\n"
    Path("tune_scores.py").write_text(body + "def none(model, loader):\n    pass\n")
    options = [*QUICK, "--max-steps", 2, "--metric"]
    result = finetune(place, tmp_path / "out", *options, "tune_scores:first")
    assert result.code == 0, result.err
    assert "first" in result.out
    document = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert document["after"]["metrics"].keys() == {"first"}
    again = Result(["evaluate", "out", "--data", place / "data", "--metric", "tune_scores:first", "--json"])
    assert json.loads(again.out)["metrics"] == document["after"]["metrics"]
    for name, message in (
        ("tune_scores:none", "the metric 'none' returned NoneType, which is no number"),
        ("tune_scores:second", "'tune_scores' has no function 'second'"),
        ("nowhere:first", "there is no module 'nowhere'"),
    ):
        refused(finetune(place, tmp_path / "other", *options, name), message)
    refused(finetune(place, tmp_path / "no", *options, "x:y", "--no-eval"), "goes without --no-eval", code=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", 0], "lr must be above 0"),
        (["--lr", "nan"], "lr is nan, but must be a number"),
        (["--betas", 0.9, 1], "betas is 1.0, but must be below 1"),
        (["--distillation", "magic"], "distillation is 'magic'; choose one of soft, hard, none"),
        (["--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
        (["--feature-blocks", "2"], "block 2, but the teacher has 2: 0 to 1"),
        (["--mixup", 0.8, "--batch-size", 7], "even number of images, not 7"),
        (["--batch-size", 43], "42 images, fewer than one batch. Use --batch-size 42"),
        (["--hflip", 2], "hflip is 2.*a number from 0 to 1"),
        (["--scale", 0.9, 0.2], "scale is .*the smaller one first"),
        (["--auto-augment", "magic"], "does not know the augmentation 'magic'"),
        (["--train-split", "val"], "training and evaluation would both use the split 'val'"),
        (["--config", "nowhere.yaml"], "no file nowhere.yaml. Correct --config"),
        (["--teacher-checkpoint", "nowhere"], "no file nowhere. Correct --teacher-checkpoint"),
        (["--resume"], "no checkpoint in .*start without --resume"),
    ],
)
def test_wrong_values(place, tmp_path, options, message):
    refused(finetune(place, tmp_path / "out", *QUICK, *options), message)
    assert not (tmp_path / "out" / "comcat.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "no setting 'epoch'; did you mean epochs"),
        ("epochs: many", "epochs is 'many', but must be a number"),
        ("accumulate: 1.5", "accumulate is 1.5, but must be a whole number"),
        ("- 3", "holds no settings"),
        ("{", "is not valid YAML"),
    ],
)
def test_wrong_files(place, tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    refused(finetune(place, tmp_path / "out", "--config", tmp_path / "run.yaml"), message)


def test_wrong_models(place, tmp_path):
    options = ["--data", place / "data", "--out", tmp_path / "out", *QUICK]
    refused(Result(["finetune", place / "data", *options]), "is not a model saved by comcat")
    refused(
        Result(["finetune", place / "small", *options]), "the teacher is not named.*--teacher-checkpoint.*--teacher DIR"
    )
    # The dense model has three classes, timm's weights a thousand.
    other = ["--teacher", NAME, "--teacher-arg", "num_classes=3"]
    refused(Result(["finetune", place / "small", *options, *other]), "no pretrained weights .* --teacher-checkpoint")
    other = randomize(load_model(NAME, model_args={**ARGS, "num_classes": 5}, pretrained=False)).eval()
    comcat.save(other, tmp_path / "five")
    refused(Result(["finetune", place / "small", *options, "--teacher", tmp_path / "five"]), "5 classes and the .* 3")
    other = randomize(load_model(NAME, model_args={**ARGS, "img_size": 16}, pretrained=False)).eval()
    comcat.save(other, tmp_path / "big")
    refused(Result(["finetune", place / "small", *options, "--teacher", tmp_path / "big"]), "3 x 16 x 16 and the")


def test_data_without_splits_or_labels(place, tmp_path):
    plain = make_folder(tmp_path / "plain", per_class=6)
    refused(finetune(place, tmp_path / "out", *QUICK, data=plain), "has no splits. Give .*or --no-eval")
    result = finetune(place, tmp_path / "out", *QUICK, "--no-eval", "--max-steps", 1, data=plain)
    assert result.code == 0, result.err
    assert "not evaluated" in result.out
    refused(finetune(place, tmp_path / "out", *QUICK, "--no-eval", data=plain), "already holds a model")
    refused(finetune(place, tmp_path / "o", *QUICK, data=plain / "class0"), "no labels to train on")


def test_corrupt_images(place, tmp_path):
    data = make_folder(tmp_path / "data" / "train", per_class=12).parent
    make_folder(data / "val", per_class=2)
    (data / "train" / "class1" / "3.png").write_bytes(b"no picture")
    options = [*QUICK, "--epochs", 1, "--workers", 1]
    refused(finetune(place, tmp_path / "no", *options, data=data), r"class1/3.png cannot be .*--skip-bad-images")
    result = finetune(place, tmp_path / "out", *options, "--skip-bad-images", "--json", data=data)
    assert result.code == 0, result.err
    assert [name[-12:] for name in json.loads(result.out)["skipped_images"]] == ["class1/3.png"]
    assert "1 images could not be read" in result.err


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_real_ctrl_c(place, tmp_path):
    """A real signal, sent while the program trains."""
    teacher = ["--teacher-checkpoint", place / "dense.safetensors", "--epochs", 100000, *QUICK]
    arguments = ["finetune", place / "small", "--data", place / "data", "--out", tmp_path / "out", *teacher]
    process = subprocess.Popen(
        [sys.executable, "-m", "comcat", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    while not list((tmp_path / "out" / "checkpoints").glob("step-*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "interrupted; the checkpoint of step" in error
    assert "continue with --resume" in error
    assert "Traceback" not in error
