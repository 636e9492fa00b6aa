"""The network is asked only for what the user names: on local files, no command looks up a name or opens a connection.

A hostile or merely careless file must not choose an address; libraries that count their uses must not be called so.
"""

from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file

import comcat
from comcat.customize.pipelines import open_pipeline
from comcat.models.opening import load_model
from comcat_demos import digits
from conftest import randomize
from test_cli import ARGS, NAME, Result
from test_cli_errors import refused
from test_customize_train import write_photos
from test_data import make_folder, make_parquet

pytestmark = pytest.mark.usefixtures("sockets_blocked")
CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a parquet folder, the dense weights and a compressed model."""
    root = tmp_path_factory.mktemp("offline")
    for split in ("train", "val"):
        make_folder(root / "data" / split, per_class=3)
    make_parquet(root / "table", {"train": 9, "test": 6})
    model = randomize(load_model(NAME, model_args=ARGS, pretrained=False)).eval()
    save_file(model.state_dict(), root / "dense.safetensors")
    comcat.save(comcat.compress(model, comcat.Plan({"blocks.0.attn": {"qk": 3, "vo": 5}})), root / "small")
    return root


def done(*arguments: object) -> None:
    result = Result([*arguments])
    assert result.code == 0, result.err


@pytest.mark.parametrize("data", ["data", "table"])
def test_compress_evaluate_and_inspect(place: Path, tmp_path: Path, data: str) -> None:
    weights = ["--checkpoint", place / "dense.safetensors", *(f"--model-arg={k}={v}" for k, v in ARGS.items())]
    images = ["--data", place / data, "--workers", 0, *CPU]
    done("compress", NAME, *weights, *images, "--keep", 0.6, "--out", tmp_path / "out", "--calibration-images", 6)
    done("evaluate", tmp_path / "out", *images)
    done("inspect", tmp_path / "out", "--out", tmp_path / "curves.png")


def test_finetune(place: Path, tmp_path: Path) -> None:
    options = ["--data", place / "data", "--workers", 0, *CPU, "--max-steps", 1, "--batch-size", 3, "--no-eval"]
    arguments = ["finetune", place / "small", *options]
    done(*arguments, "--out", tmp_path / "a", "--teacher-checkpoint", place / "dense.safetensors")
    done(*arguments, "--out", tmp_path / "b", "--teacher", place / "small")
    done(*arguments, "--out", tmp_path / "c", "--distillation", "none")
    refused(Result([*arguments, "--out", tmp_path / "d"]), f"the teacher is not named.*made from {NAME}")


def test_run(place: Path, tmp_path: Path) -> None:
    recipe = {
        "budget": {"params": 0.6},
        "finetune": {"max_steps": 1},
        "batch_size": 3,
        "compress": {"calibration_images": 6},
    }
    options = ["--data", place / "data", "--workers", 0, *CPU, "--eval-images", 3]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**recipe, "model": NAME, "model_args": ARGS}))
    weights = ["--checkpoint", place / "dense.safetensors"]
    done("run", tmp_path / "a.yaml", "--out", tmp_path / "a", *options, *weights)
    comcat.save(load_model(NAME, place / "dense.safetensors", ARGS), tmp_path / "dense")
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({**recipe, "model": str(tmp_path / "dense")}))
    done("run", tmp_path / "b.yaml", "--out", tmp_path / "b", *options)


def test_customize_and_generate(tmp_path: Path) -> None:
    digits.build().save_pretrained(tmp_path / "base")
    photos = ["--images", write_photos(tmp_path / "photos", (16, 16), (16, 16)), "--prompt", "a photo of V*"]
    out = tmp_path / "dog.safetensors"
    done("customize", tmp_path / "base", *photos, "--out", out, "--rank", 1, "--steps", 1, "--buckets", 1, *CPU)
    draw = ["--prompt", "a photo of V*", "--out", tmp_path / "images", "--steps", 1, *CPU]
    done("generate", tmp_path / "base", "--adapter", out, *draw)
    done("adapter", "info", out)


def test_an_incomplete_pipeline_is_not_completed_from_elsewhere(tmp_path: Path) -> None:
    digits.build().save_pretrained(tmp_path / "base")
    for file in (tmp_path / "base" / "vae").iterdir():
        file.unlink()
    with pytest.raises(comcat.ModelError, match="cannot be opened"):
        open_pipeline(str(tmp_path / "base"))
