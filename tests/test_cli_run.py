"""``comcat run``: every stage of a recipe, and what is refused before the first."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import comcat
from comcat import SearchConfig, TrainingError
from comcat.cli.finetune_command import merge
from comcat.cli.run_command import Recipe
from comcat.layers.base import check_parts
from comcat.models.opening import load_model
from conftest import randomize
from test_cli import ARGS, NAME, Result
from test_cli_errors import refused
from test_cli_search import stop_at
from test_data import make_folder

DREAMBENCH = Path(__file__).parents[1] / "recipes" / "dreambench.yaml"
#: That of DreamBench is for adapters: tests/test_dreambench.py.
RECIPES = sorted(set((Path(__file__).parents[1] / "recipes").glob("*.yaml")) - {DREAMBENCH})
TINY: dict[str, Any] = {
    "model": NAME,
    "model_args": ARGS,
    "budget": {"params": 0.6},
    "compress": {"parts": ["qk", "vo", "ffn"], "calibration_images": 20},
    "search": {"epochs": 1, "candidates": 4, "log_every": 2, "checkpoint_every": 2},
    "finetune": {"max_steps": 2, "log_every": 1, "mixup": 0.8, "hflip": 0.0},
    "batch_size": 8,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in splits and the dense weights; shared, so tests must not change them."""
    root = tmp_path_factory.mktemp("run")
    make_folder(root / "data" / "train", per_class=14)
    make_folder(root / "data" / "val", per_class=4)
    model = randomize(load_model(NAME, model_args=ARGS, pretrained=False))
    save_file(model.state_dict(), root / "dense.safetensors")
    return root


def run(place: Path, out: Path, *options: object, recipe: dict[str, Any] | str | None = None) -> Result:
    file = out.with_suffix(".yaml")
    file.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(TINY if recipe is None else recipe))
    given = ["--data", place / "data", "--checkpoint", place / "dense.safetensors", "--workers", 0]
    return Result(["run", file, "--out", out, *given, *options])


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("finished") / "out"
    return out, run(place, out, "--json")


def test_a_recipe_end_to_end(finished: tuple[Path, Result]) -> None:
    out, result = finished
    assert result.code == 0, result.err
    assert sorted(path.name for path in out.iterdir()) == ["compressed", "finetuned"]
    small, tuned = comcat.load(out / "compressed"), comcat.load(out / "finetuned")
    report = json.loads((out / "compressed" / "report.json").read_text())
    assert report["method"] == "search"
    assert report["calibration"]["images"] == 20
    assert 0.98 < report["compressed"]["params"] / (0.6 * report["dense"]["params"]) <= 1
    assert {path.name for path in (out / "compressed").iterdir()} >= {"search.jsonl", "search.png", "plan.json"}
    assert "head" not in small.comcat.plan.layers
    document = json.loads((out / "finetuned" / "finetune.json").read_text())
    assert document["steps"] == 2
    assert document["config"]["mixup"] == 0.8
    assert document["augmentation"]["hflip"] == 0
    before, after = small.state_dict(), tuned.state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_resumed_after_every_stage(
    place: Path, finished: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed within the search, between the stages and within the fine-tuning, the outcome is the same."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        refused(run(place, out), "interrupted; the checkpoint of step 2 .*continue with --resume$", code=130)
    assert [path.name for path in out.iterdir()] == ["search"]
    refused(run(place, out), "already holds something; continue with --resume or choose another --out")

    original = comcat.training.engine.Run._after_step

    def interrupt(self: Any) -> None:
        original(self)
        if self.task.stage == "train":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comcat.training.engine.Run, "_after_step", interrupt)
        result = run(place, out, "--resume")
    assert result.code == 130, result.err
    assert {path.name for path in out.iterdir()} == {"compressed", "finetuned"}
    shutil.rmtree(out / "finetuned")
    result = run(place, out, "--resume")
    assert result.code == 0, result.err
    assert "before" in result.out
    for stage in ("compressed", "finetuned"):
        first, second = (comcat.load(root / stage).state_dict() for root in (finished[0], out))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_run_is_left_alone(place: Path, finished: tuple[Path, Result]) -> None:
    refused(run(place, finished[0], "--resume"), "finetuned' already holds a model")


def test_resumed_with_another_budget(place: Path, finished: tuple[Path, Result]) -> None:
    refused(
        run(place, finished[0], "--resume", "--keep", "0.7"),
        "compressed' was made for the budget .*, not .*; use that one, or another --out",
    )


def test_another_method_and_budget(place: Path, tmp_path: Path) -> None:
    """Without a section search there is none; the command line's budget goes first."""
    recipe = {name: value for name, value in TINY.items() if name != "search"}
    result = run(place, tmp_path / "out", "--max-params", "9K", "--batch-size", 6, recipe=recipe)
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "out" / "compressed" / "report.json").read_text())
    assert report["method"] == "spectrum"
    assert 8900 < report["compressed"]["params"] <= 9000


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_our_recipes(file: Path) -> None:
    recipe = Recipe.read(file)
    model = load_model(recipe.model, model_args=recipe.model_args, pretrained=False)
    budget = comcat.Budget(**recipe.budget)
    parts = check_parts(recipe.compress["parts"])
    comcat.check_budget(model, budget, parts)
    assert SearchConfig.from_dict(recipe.search).to_dict().items() >= recipe.search.items()
    config, augmentation = merge({}, recipe.finetune)
    assert {**config.to_dict(), **vars(augmentation)}.items() >= recipe.finetune.items()
    assert recipe.batch_size % 2 == 0
    assert f"comcat run recipes/{file.name}" in file.read_text()


def test_a_metric_and_a_stock_model(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scored by a function of one's own before and after; plain transformers loads what comes of it."""
    import transformers as tf

    shape = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 48, "num_hidden_layers": 2}
    config = tf.ViTConfig(**shape, image_size=8, patch_size=4, num_labels=3)
    randomize(tf.ViTForImageClassification(config)).save_pretrained(tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("run_scores.py").write_text(
        "def share(model, loader):\n    return {'images': sum(len(x) for x, _ in loader)}\n"
    )
    recipe = {
        **{name: TINY[name] for name in ("finetune", "batch_size")},
        "model": str(tmp_path / "dense"),
        "budget": {"params": 0.7},
        "compress": {"calibration_images": 20},
        "metric": "run_scores:share",
        "stock": True,
    }
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    given = ["run", "r.yaml", "--data", place / "data", "--out", "out", "--workers", 0]
    given += ["--mean", 0.5, 0.5, 0.5, "--std", 0.5, 0.5, 0.5]
    result = Result(given)
    assert result.code == 0, result.err
    assert "for its own library, without comcat: out/stock" in result.out
    document = json.loads(Path("out/finetuned/finetune.json").read_text())
    assert (document["before"], document["after"]) == (
        {"outputs": "metric", "metrics": {"images": 12}, "images": 12},
    ) * 2
    assert json.loads(Path("out/stock/report.json").read_text()) == document
    small = {name: tf.ViTForImageClassification.from_pretrained(f"out/{name}") for name in ("compressed", "stock")}
    assert small["stock"].config.intermediate_size < 48
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in small.values()]
    assert shapes[0] == shapes[1]
    tuned = comcat.load("out/finetuned").state_dict()
    assert all(torch.equal(value, tuned[name]) for name, value in small["stock"].state_dict().items())
    shutil.rmtree("out/finetuned")
    Path("r.yaml").write_text(yaml.safe_dump({**recipe, "stock": False}))
    refused(Result([*given, "--resume"]), "compressed' was not made without 'stock: true'; use another --out")


def changed(**sections: Any) -> dict[str, Any]:
    return {**TINY, **sections}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({**TINY, "serach": {}}, "no setting 'serach'; did you mean search"),
        (changed(search={"objectiv": "exact"}), "'search': there is no setting 'objectiv'; did you mean objective"),
        (changed(finetune={"epoch": 3}), "'finetune': there is no setting 'epoch'; did you mean epochs"),
        (changed(finetune={"hflip": 2}), "'finetune': hflip is 2"),
        (changed(compress={"part": ["qk"]}), "no setting 'part'; did you mean parts"),
        (changed(budget={"param": 0.5}), "no setting 'param'; did you mean params"),
        (changed(search={"seed": 3}), "'search' sets a seed; leave it out and give --seed"),
        (changed(search=30), "'search' must hold settings, one a line, such as 'epochs: 30'"),
        (changed(compress={"parts": "qk"}), "parts are 'qk', but must be a list such as"),
        (changed(batch_size="many"), "batch_size is 'many', but must be a number of images"),
        (changed(budget={"params": "11M"}), "a budget is a number, not '11M'"),
        (changed(budget={"params": 0.01}), "out of reach"),
        (changed(metric=3), "metric is 3, but must be a text such as mine:iou"),
        (changed(metric="nowhere:iou"), "there is no module 'nowhere' in the working directory"),
        (changed(stock="yes"), "stock is 'yes', but must be true or false"),
        (changed(stock=True), "one width for all layers, and learned ranks differ; leave 'search' or 'stock' out"),
        ({"model": NAME}, "names no budget; see the folder recipes"),
        ({"search": {}}, "names no model and no budget"),
        ("{", "is not valid YAML"),
        ("- 3", "holds no settings"),
    ],
)
def test_wrong_recipes(place: Path, tmp_path: Path, recipe: Any, message: str) -> None:
    refused(run(place, tmp_path / "out", recipe=recipe), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (["--keep", 0.5, "--max-params", "9K"], "at most one of --keep and --max-params", 2),
        (["--keep", 0], "must lie strictly between 0 and 1", 1),
        (["--device", "cuda:7"], "takes auto or cpu", 2),
        (["--checkpoint", "nowhere"], "no file nowhere. Correct --checkpoint", 1),
        (["--resume"], "there is no run in '.*out' to resume; start without --resume", 1),
        (["--eval-split", "train"], "the search and the evaluation would both use the split 'train'", 1),
    ],
)
def test_wrong_options(place: Path, tmp_path: Path, options: list, message: str, code: int) -> None:
    refused(run(place, tmp_path / "out", *options), message, code=code)
    assert not (tmp_path / "out").exists()


def test_recipe_files(tmp_path: Path) -> None:
    refused(Result(["run", tmp_path / "no.yaml", "--data", tmp_path, "--out", tmp_path / "out"]), "Correct RECIPE")
    (tmp_path / "dir").mkdir()
    with pytest.raises(TrainingError, match="is a directory"):
        Recipe.read(tmp_path / "dir")


def test_a_recipe_with_a_latency_budget(place: Path, tmp_path: Path) -> None:
    recipe = {**TINY, "budget": {"latency": 0.95}, "search": {}}
    recipe["compress"] = {**TINY["compress"], "method": "spectrum", "latency_batch": 2}
    result = run(place, tmp_path / "out", recipe=recipe)
    if result.code:  # whether a tiny model can be that much faster depends on the machine
        assert "smallest reachable" in result.err or "out of reach" in result.err
    else:
        assert json.loads((tmp_path / "out" / "compressed" / "plan.json").read_text())["budget"] == {"latency": 0.95}
    assert comcat.LatencyTable.load(tmp_path / "out" / "latency.json").batch_size == 2
