"""Many subjects, taught and judged alike: what is shared, what is not made twice, means, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from comcat import DataError, TrainingError
from comcat.customize.judging import subject_benchmark
from comcat.customize.judging.prompt_lists import dreambench
from comcat.customize.judging.subject_benchmark import SubjectRecipe, find_subjects
from comcat.customize.teaching.photos import find_photos
from comcat_demos import digits
from test_cli import Result
from test_customize_train import write_photos
from test_judge import place as place  # a fixture

ROOT = Path(__file__).parents[1]
#: Two of a class, and one of another; a folder that is no subject.
FOLDERS = {"dog": "dog", "dog2": "dog", "teapot": "teapot", "notes": None}
TINY = {
    "rank": 1, "steps": 2, "num_class_images": 2, "validation_steps": 1, "buckets": 1.0, "lr": 0.05,
    "token_init": "digit",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dreambooth")
    for name in FOLDERS:
        write_photos(root / name, (16, 16), (20, 17))
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    digits.build().save_pretrained(folder)
    return folder


def write_recipe(folder: Path, base: Path, place: Path, **changes: Any) -> Path:
    values = {
        "base": str(base),
        "dino": str(place / "dino"),
        "seeds": [0, 1],
        "steps": 1,
        "prompts": ["a photo of {}", "the {}"],
        "retention_prompts": ["a photo of the digit two"],
        "customize": TINY,
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def run(recipe: Path, data: Path, out: Path, *more: Any) -> Result:
    return Result(["run", recipe, "--data", data, "--out", out, "--device", "cpu", *more])


def test_the_recipe_of_the_package() -> None:
    values = yaml.safe_load((ROOT / "recipes" / "dreambench.yaml").read_text())
    recipe = SubjectRecipe.of(values, "the recipe")
    assert recipe.subjects == dreambench()["subjects"]
    assert recipe.config.token == "V*"
    assert len(recipe.seeds) == 4


def test_a_benchmark_and_its_continuation(
    data: Path, base: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted within the second subject; what was taught is not taught again, and nothing is drawn twice."""
    recipe, out = write_recipe(tmp_path, base, place), tmp_path / "out"
    taught: list[str] = []
    original = subject_benchmark.train

    def counted(pipe: Any, images: Path, *args: Any, **kwargs: Any) -> Any:
        taught.append(images.name)
        if taught == ["dog", "dog2"]:
            raise KeyboardInterrupt
        return original(pipe, images, *args, **kwargs)

    monkeypatch.setattr(subject_benchmark, "train", counted)
    stopped = run(recipe, data, out)
    assert stopped.code == 130
    assert "1 of 3 subjects are done, and a part of dog2; continue with --resume" in stopped.err
    again = run(recipe, data, out)
    assert again.code == 1
    assert "already holds something; continue with --resume" in again.err
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png") if path.name != "grid.png"}
    result = run(recipe, data, out, "--resume", "--json")
    assert result.code == 0, result.err
    assert taught == ["dog", "dog2", "dog2", "teapot"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    document = json.loads(result.out)
    assert document["subjects"] == 3
    assert document["subjects_of_the_benchmark"] == 30
    assert list(document["by_subject"]) == ["dog", "dog2", "teapot"]
    rows = [judged["rows"] for judged in document["by_subject"].values()]
    for row, name in enumerate(("base", "adapter")):
        for key in ("dino", "diversity"):
            mean = sum(each[row]["scores"][key]["mean"] for each in rows) / 3
            assert document["mean"][name][key]["mean"] == pytest.approx(mean)
    assert [each[1]["subject"] for each in rows] == ["V* dog", "V* dog", "V* teapot"]
    assert document["missing"]["CLIP-T"] == "needs --clip"
    assert set(document["train_seconds"]) == {"dog", "dog2", "teapot"}
    # The base drew for two classes, and its pictures without the subject once; dog2 learned beside dog's class images.
    assert len(list((out / "base").glob("*.png"))) == (2 * 2 + 1) * 2
    class_images = [path.parent.parent.name for path in out.glob("*/adapter.run/class-images")]
    assert sorted(class_images) == ["dog", "teapot"]
    assert len(find_photos(out / "dog" / "adapter.run" / "class-images", None)) == 2
    shown = run(recipe, data, out, "--resume")
    text = " ".join(shown.out.split())
    for part in ("3 of 30 subjects", "mean", "photos", "not measured: CLIP-T, which needs --clip"):
        assert part in text
    assert "no subjects of the recipe, and left out: notes" in shown.err
    other = run(write_recipe(tmp_path, base, place, customize={**TINY, "rank": 2}), data, out, "--resume")
    assert other.code == 1
    assert "were taught with customize" in other.err


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"subjects": {}}, DataError, "names no subjects"),
        ({"subjects": {"../x": "dog"}}, DataError, "the name of a folder"),
        ({"caption": "a photo"}, DataError, r"caption is 'a photo', but must hold \{\} once"),
        ({"token": "W*"}, DataError, r"'V\* \{\}' does not have its token 'W\*'"),
        ({"customize": {"rnk": 2}}, TrainingError, "no setting 'rnk'; did you mean rank"),
        ({"customize": {"seed": 2}}, TrainingError, "sets a seed"),
        ({"dyno": "x"}, TrainingError, "no setting 'dyno'; did you mean dino"),
        ({"seeds": "all"}, TrainingError, "seeds"),
        ({"storage": "int3"}, TrainingError, "storage"),
    ],
)
def test_recipes_that_cannot_be(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SubjectRecipe.of({"base": "x", **changes}, "the recipe")


def test_data_without_subjects(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has folders of none of the subjects \(backpack"):
        find_subjects(SubjectRecipe("x"), tmp_path, print)
    with pytest.raises(DataError, match="there is no folder"):
        find_subjects(SubjectRecipe("x"), tmp_path / "x", print)


def test_options_of_other_recipes(data: Path, base: Path, place: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base, place)
    for more in (["--keep", 0.5], ["--eval-split", "val"], ["--skip-bad-images"]):
        result = run(recipe, data, tmp_path / "out", *more)
        assert result.code == 2
        assert "belongs to recipes that compress a model" in result.err
    assert not (tmp_path / "out").exists()


def test_encoders_are_asked_for_first(data: Path, base: Path, place: Path, tmp_path: Path) -> None:
    result = run(write_recipe(tmp_path, base, place, dino=None), data, tmp_path / "out")
    assert result.code == 1
    assert "nothing can be measured without an encoder" in result.err
    assert not (tmp_path / "out").exists()
