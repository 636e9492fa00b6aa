"""Opening a pipeline's directory: which of its weights, and what is said where there are none."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from comcat import ModelError
from comcat.customize import open_pipeline
from comcat.customize.pipelines import variants
from diffusion import pipeline
from test_cli import Result


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A pipeline of which there is the fp16 variant alone."""
    path = tmp_path_factory.mktemp("half") / "base"
    pipeline("sd1").to(torch.bfloat16).save_pretrained(path, variant="fp16")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "base"
    pipeline("sd1").save_pretrained(path)
    return path


def test_the_only_variant_is_taken_and_said(half):
    assert variants(half) == {"fp16"}
    notes: list[str] = []
    pipe = open_pipeline(str(half), note=notes.append)
    assert pipe.unet.dtype == torch.float32
    assert notes == [f"'{half}' holds the variant fp16 of the weights only, which is taken"]
    with pytest.warns(UserWarning, match="variant fp16 of the weights only"):
        open_pipeline(str(half))
    open_pipeline(str(half), variant="fp16", note=notes.append)
    assert len(notes) == 1


def test_the_command_line_says_so(half, tmp_path):
    result = Result(
        [
            "generate",
            half,
            "--prompt",
            "a",
            "--steps",
            1,
            "--seeds",
            0,
            "--out",
            tmp_path / "o",
            "--height",
            8,
            "--width",
            8,
        ]
    )
    assert result.code == 0
    assert "variant fp16 of the weights only" in result.err


def test_a_variant_of_some_parts(whole, half, tmp_path):
    """As many repositories are: the VAE plain alone, the rest both."""
    path = Path(shutil.copytree(whole, tmp_path / "base"))
    assert variants(path) == {None}
    for part in ("unet", "text_encoder"):
        (file,) = (half / part).glob("*.safetensors")
        shutil.copy(file, path / part)
    notes: list[str] = []
    assert variants(path) == {None, "fp16"}
    open_pipeline(str(path), note=notes.append)
    open_pipeline(str(path), variant="fp16", note=notes.append)
    assert notes == []


def test_a_variant_that_is_not_there(whole):
    with pytest.raises(
        ModelError, match=r"has no variant 'fp16' of its weights \(there is none\); leave --variant out"
    ):
        open_pipeline(str(whole), variant="fp16")


def test_several_variants_are_asked_for(half, tmp_path, capfd):
    path = Path(shutil.copytree(half, tmp_path / "base"))
    for file in path.rglob("*.fp16.safetensors"):
        shutil.copy(file, file.with_name(file.name.replace("fp16", "ema")))
    with pytest.raises(ModelError, match="of variants there is ema, fp16: choose with --variant"):
        open_pipeline(str(path))
    assert capfd.readouterr().err == ""  # one error, and nothing of the libraries' beside it


def test_files_in_parts(tmp_path):
    def made(*names: str) -> Any:
        shutil.rmtree(tmp_path / "unet", ignore_errors=True)
        (tmp_path / "unet").mkdir()
        for name in names:
            (tmp_path / "unet" / name).touch()
        return variants(tmp_path)

    assert made("model-00001-of-00002.safetensors") == {None}
    assert made("diffusion_pytorch_model.fp16-00001-of-00002.safetensors") == {"fp16"}
    assert made("model-00001-of-00002.bf16.safetensors") == {"bf16"}
    assert made("pytorch_model.bin", "config.json") == set()
