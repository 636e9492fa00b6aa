"""Bad input to ``comcat generate`` and ``comcat adapter``: one clear line, and nothing left behind."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffusion
from comcat.customize import add_adapter, save_adapter
from test_cli import Result
from test_cli_customize_errors import PROMPT, nothing_in, place  # noqa: F401 - a fixture
from test_cli_errors import refused

# The fixture is used by name.
# ruff: noqa: F811


def edit(source: Path, path: Path, change: Any) -> Path:
    """A copy of an adapter file with other tensors or metadata."""
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(source)
    document = json.loads(metadata["comcat"])
    change(tensors, document)
    save_file(tensors, path, {"comcat": json.dumps(document)})
    return path


def first(tensors: dict) -> str:
    return next(name for name in sorted(tensors) if name.endswith("weight"))


def misshape(tensors: dict, _: dict) -> None:
    tensors[first(tensors)] = torch.zeros(3, 5)


FILES = {
    "missing tensor": (lambda t, d: t.pop(first(t)), r"does not fit the model: 1 tensors missing \(unet\."),
    "extra tensor": (
        lambda t, d: t.update(more=torch.zeros(1)),
        r"does not fit the model: 1 tensors too many \(more\)",
    ),
    "misshapen": (misshape, r"1 tensors of another shape \(unet\..* is \(3, 5\), not \("),
    "nan": (lambda t, d: t[first(t)].fill_(float("nan")), r"holds NaN or infinite values in unet\."),
    "newer": (lambda t, d: d.update(format=99), r"has format 99 .*; upgrade comcat"),
    "no ranks": (lambda t, d: d.pop("components"), "the metadata of '.*' is damaged"),
}


@pytest.mark.parametrize("case", FILES)
def test_adapter_files(place, tmp_path, case):
    change, message = FILES[case]
    path = edit(place / "dog.safetensors", tmp_path / "bad.safetensors", change)
    arguments = ["generate", place / "base", "--adapter", path, "--prompt", PROMPT, "--out", tmp_path / "images"]
    refused(Result(arguments), "^error: ", message)
    nothing_in(tmp_path, "bad.safetensors")


def test_other_files(place, tmp_path):
    path = tmp_path / "bad.safetensors"
    arguments = ["generate", place / "base", "--adapter", path, "--prompt", PROMPT, "--out", tmp_path / "images"]
    convert = ["adapter", "convert", path, tmp_path / "out.safetensors", "--to", "comcat"]
    for content, message in {
        b"": "is damaged or no safetensors file",
        b"no adapter at all": "is damaged or no safetensors file",
        (place / "dog.safetensors").read_bytes()[:-9]: "is damaged or no safetensors file",
        pickle.dumps({"a": 1}): "is a pickle, which could run any code when read; it is never unpickled",
    }.items():
        path.write_bytes(content)
        for command in (arguments, convert, ["adapter", "info", path]):
            refused(Result(command), "^error: ", message)
    torch.save({"a": torch.zeros(1)}, path)
    refused(Result(arguments), "^error: .* is a pickle")
    shutil.copy(place / "lora.safetensors", path)
    refused(Result(arguments), "is a LoRA, not an adapter of comcat; turn it into one: comcat adapter convert")
    path.unlink()
    for command in (arguments, convert, ["adapter", "info", path]):
        refused(Result(command), "cannot read '.*bad.safetensors': No such file or directory")
    nothing_in(tmp_path)


def test_an_adapter_of_another_base(place, tmp_path):
    other = diffusion.pipeline("sdxl")
    add_adapter(other, rank=1)
    path = save_adapter(other, tmp_path / "other.safetensors")
    arguments = ["--prompt", "x", "--out", tmp_path / "images"]
    message = r"does not fit this unet: \d+ of its \d+ layers .*It was made for UNet2DConditionModel of"
    refused(Result(["generate", place / "base", "--adapter", path, *arguments]), "^error: ", message)
    refused(Result(["adapter", "merge-report", path, "--base", place / "base", "--data-free"]), "^error: ", message)
    flow = diffusion.pipeline("sd3")
    add_adapter(flow, rank=1)
    path = save_adapter(flow, tmp_path / "other.safetensors")
    refused(
        Result(["generate", place / "base", "--adapter", path, *arguments]),
        "is for another kind of model: it has products for the denoiser 'transformer'",
    )
    nothing_in(tmp_path, "other.safetensors")


GENERATE = {
    "no prompt": (["--prompts", "nowhere.txt"], 1, "the prompts in 'nowhere.txt' cannot be read: No such file"),
    "none at all": ([], 1, "there is no prompt; give --prompt or --prompts"),
    "empty": (["--prompt", " "], 1, "a prompt is empty; say what to draw"),
    "without token": (
        ["--prompt", "a photo"],
        1,
        r"'a photo' does not have 'V\*', the .*taught with 'a photo of V\*'\)",
    ),
    "inside a word": (["--prompt", "V*s"], 1, r"the prompt 'V\*s' does not have 'V\*'.*or pass --without-token"),
    "seeds": (["--prompt", PROMPT, "--seeds", "3-1"], 2, "'3-1' is no seed; write them like 0-3,7"),
    "large seed": (["--prompt", PROMPT, "--seeds", str(2**63)], 2, "is no seed; write them like 0-3,7"),
    "negative seed": (["--prompt", PROMPT, "--seeds", "-1"], 2, "'-1' is no seed"),
    "precision": (["--prompt", PROMPT, "--precision", "int4"], 2, "'int4' is not one of no, bf16, fp16"),
    "device": (["--prompt", PROMPT, "--device", "abacus"], 1, "there is no device 'abacus' on this machine"),
    "height": (["--prompt", PROMPT, "--height", 16], 1, "give both height and width, or neither"),
    "size": (["--prompt", PROMPT, "--height", 9, "--width", 16], 1, "Pipeline cannot draw this: .*divisible by 8"),
    "steps": (["--prompt", PROMPT, "--steps", 0], 2, "Invalid value for '--steps'"),
    "strength": (["--prompt", PROMPT, "--adapter", "DOG:nan"], 1, "a strength must be a finite number, not nan"),
    "no strength": (["--prompt", PROMPT, "--adapter", "DOG:much"], 2, "Invalid value for --adapter: .:much. of"),
    "twice": (["--prompt", PROMPT, "--adapter", "DOG"], 1, r"has learned 'V\*' already"),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generate(place, tmp_path, case):
    options, code, message = GENERATE[case]
    file = str(place / "dog.safetensors")
    options = [str(option).replace("DOG", file) for option in options]
    arguments = ["generate", place / "base", "--adapter", file, "--out", tmp_path / "images"]
    refused(Result([*arguments, *options]), message, code=code)
    nothing_in(tmp_path)


def test_outputs_of_generate(place, tmp_path):
    arguments = ["generate", place / "base", "--prompt", "x", "--seeds", 1, "--out"]
    (tmp_path / "file").write_text("precious")
    refused(Result([*arguments, tmp_path / "file"]), "'.*file' is a file; choose a directory with --out")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "grid.png").write_text("precious")
    refused(Result([*arguments, tmp_path / "images"]), "grid.png' exists already; choose another --out or give --overw")
    nothing_in(tmp_path / "images", "grid.png")


CONVERT = {
    "no base": ("dog", ["--to", "kohya"], 2, "this needs the base model's weights"),
    "format": ("dog", ["--to", "onnx"], 2, "'onnx' is not diffusers, kohya or comcat"),
    "storage": ("dog", ["--to", "comcat", "--storage", "int4"], 2, "'int4' is not one of float32, float16"),
    "no rank": ("lora", ["--to", "comcat", "--base", "BASE"], 2, "say which rank the adapter's products are to have"),
    "rank": ("lora", ["--to", "comcat", "--base", "BASE", "--rank", 9], 1, "rank 9 is above the head width 8"),
    "a LoRA": ("lora", ["--to", "kohya", "--base", "BASE"], 1, "is a LoRA, not an adapter of comcat"),
    "lora rank": ("dog", ["--to", "kohya", "--base", "BASE", "--lora-rank", 0], 2, "Invalid value for '--lora-rank'"),
    "scale": ("dog", ["--to", "comcat", "--scale", "inf"], 1, "a strength must be a finite number, not inf"),
}


@pytest.mark.parametrize("case", CONVERT)
def test_convert(place, tmp_path, case):
    name, options, code, message = CONVERT[case]
    options = [place / "base" if option == "BASE" else option for option in options]
    arguments = ["adapter", "convert", place / f"{name}.safetensors", tmp_path / "out.safetensors"]
    refused(Result([*arguments, *options]), message, code=code)
    nothing_in(tmp_path)


def test_outputs_of_convert(place, tmp_path):
    out = tmp_path / "out.safetensors"
    out.with_suffix(".embedding.safetensors").write_text("precious")
    arguments = ["adapter", "convert", place / "dog.safetensors", out, "--to", "kohya", "--base", place / "base"]
    refused(Result(arguments), "out.embedding.safetensors' exists already; choose another name or give --overwrite")
    nothing_in(tmp_path, "out.embedding.safetensors")


SHRINK = {
    "no base": (["--max-bytes", "1M"], 2, "this needs the base model's weights"),
    "no size": (["--max-bytes", "much"], 2, "'much' is no size such as 1M, 500k or 2MiB"),
    "half a unit": (["--max-bytes", "5iB"], 2, "'5iB' is no size"),
    "too small": (["--max-bytes", "1k", "--base", "BASE"], 1, r"1,000 bytes are too few .* takes [\d,]+"),
    "storage": (["--max-bytes", "1M", "--storage", "int3"], 2, "'int3' is not one of float32, float16, .*nf4"),
}


@pytest.mark.parametrize("case", SHRINK)
def test_shrink(place, tmp_path, case):
    options, code, message = SHRINK[case]
    options = [place / "base" if option == "BASE" else option for option in options]
    result = Result(["adapter", "shrink", place / "dog.safetensors", tmp_path / "out.safetensors", *options])
    refused(result, message, code=code)
    nothing_in(tmp_path)
