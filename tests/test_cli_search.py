"""``comcat compress --method search`` from the outside."""

import json
from pathlib import Path

import pytest
import torch

import comcat
from comcat.training.engine import Run
from test_cli import Result, compress, place  # noqa: F401 - a fixture
from test_cli_errors import refused
from test_data import make_folder

# ruff: noqa: F811 - the fixture is used by name

# 42 images in batches of 8: 5 steps in an epoch.
QUICK = ["--keep", 0.6, "--method", "search", "--search-batch", 8, "--workers", 0]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when so many batches are done."""
    original = Run._after_step

    def interrupt(self: Run) -> None:
        original(self)
        if self.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_after_step", interrupt)


def test_a_search_end_to_end(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = compress(place, out, *QUICK, "--search-epochs", 1, "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["method"] == "search"
    assert 0.98 < document["compressed"]["params"] / (0.6 * document["dense"]["params"]) <= 1
    names = {path.name for path in out.iterdir()}
    assert names == {
        "comcat.json", "model.safetensors", "plan.json", "report.json", "report.png", "search.jsonl", "search.png"
    }  # fmt: skip
    assert [json.loads(line)["step"] for line in (out / "search.jsonl").read_text().splitlines()] == [0, 5]
    assert (out / "search.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # the working folder is gone
    assert comcat.load(out).comcat.plan == comcat.Plan.load(out / "plan.json")


def test_interrupted_and_resumed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "search.yaml"
    file.write_text("checkpoint_every: 2\nlog_every: 1\nobjective: exact\nlr: 5e-2\nepochs: 9\n")
    options = [*QUICK, "--search-config", file, "--search-steps", 6, "--no-eval"]
    whole = compress(place, tmp_path / "whole", *options)
    assert whole.code == 0, whole.err
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        result = compress(place, tmp_path / "out", *options, "--calibration", place / "search-stats")
    refused(result, "interrupted; the checkpoint of step 4 is in '.*out.search'; continue with --resume$", code=130)
    assert not (tmp_path / "out").exists()
    refused(compress(place, tmp_path / "out", *options), "already holds a run; continue it with --resume")
    refused(compress(place, tmp_path / "out", *options, "--resume", "--seed", 3), "seed was 0 and is now 3")
    refused(
        compress(place, tmp_path / "out", *options, "--resume", "--search-steps", 9), "max_steps was 6 and is now 9"
    )

    result = compress(place, tmp_path / "out", *options, "--resume")
    assert result.code == 0, result.err
    assert "ranks by search" in result.out
    for name in ("plan.json", "search.jsonl"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()
    first, second = (comcat.load(tmp_path / name).state_dict() for name in ("whole", "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "search.yaml", "whole"]


@pytest.mark.parametrize(
    "options",
    [
        ["--search-epochs", 1],
        ["--search-steps", 5],
        ["--search-split", "train"],
        ["--search-config", "x"],
        ["--resume"],
    ],
)
def test_search_options_belong_to_the_search(place: Path, tmp_path: Path, options: list) -> None:
    result = compress(place, tmp_path / "out", "--keep", 0.5, *options)
    refused(result, "--method search.*the --search options and --resume belong to it", code=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--search-split", "val"], "the search and the evaluation would both use the split 'val'.*or --no-eval"),
        (["--search-split", "val", "--no-eval"], "the split 'val', which is for evaluation.*Give the training split"),
        (["--search-split", "tes"], "tes"),
        (["--search-batch", 43], "42 images, fewer than one batch. Use --batch-size 42"),
        (["--search-epochs", 0], "epochs must be above 0"),
        (["--search-config", "nowhere.yaml"], "no file nowhere.yaml. Correct --search-config"),
        (["--resume"], "no checkpoint in '.*out.search' to resume from; start without --resume"),
        (["--parts", "qk,ov"], "unknown part"),
    ],
)
def test_wrong_values(place: Path, tmp_path: Path, options: list, message: str) -> None:
    refused(compress(place, tmp_path / "out", *QUICK, *options), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objectiv: exact", "no setting 'objectiv'; did you mean objective"),
        ("temperature: 5", "temperature is 5, but must be a list of numbers"),
        ("- 3", "holds no settings"),
        ("{", "is not valid YAML"),
    ],
)
def test_wrong_files(place: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "search.yaml").write_text(text)
    refused(compress(place, tmp_path / "out", *QUICK, "--search-config", tmp_path / "search.yaml"), message)


def test_data_without_labels(place: Path, tmp_path: Path) -> None:
    plain = make_folder(tmp_path / "plain", classes=1, per_class=33)
    options = [*QUICK, "--search-steps", 2, "--no-eval"]
    refused(compress(place, tmp_path / "out", *options, data=plain / "class0"), "no labels to train on")
    result = Result(["compress", "vit_tiny_patch16_224", "--out", tmp_path / "out", *options, "--data-free"])
    refused(result, "--data-free.*goes without.*search", code=2)


def test_data_without_splits(place: Path, tmp_path: Path) -> None:
    """The images to learn from would be those to evaluate on."""
    plain = make_folder(tmp_path / "plain", per_class=12)
    message = "would both use .*plain, which has no splits; .*or --no-eval"
    refused(compress(place, tmp_path / "out", *QUICK, "--search-steps", 2, data=plain), message)
    result = compress(place, tmp_path / "out", *QUICK, "--search-steps", 2, "--no-eval", data=plain)
    assert result.code == 0, result.err
