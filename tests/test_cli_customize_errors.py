"""Bad input to ``comcat customize``: one clear line, the right exit code, and nothing left behind."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from comcat.customize import add_adapter, export_lora, save_adapter
from comcat_demos import digits
from test_cli import Result
from test_cli_errors import refused
from test_customize_train import write_photos

PROMPT = "a photo of V*"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A saved pipeline, photos, and adapters of it; shared, so tests must not change them."""
    root = tmp_path_factory.mktemp("customize")
    pipe = digits.build()
    pipe.save_pretrained(root / "base")
    write_photos(root / "photos", (16, 16), (20, 17))
    handle = add_adapter(pipe, rank=1, token="V*", name="dog")
    handle.info["prompt"] = PROMPT
    save_adapter(pipe, root / "dog.safetensors")
    handle.requires_grad_(False)
    for parameter in handle.parameters():
        parameter.add_(0.1)
    save_adapter(pipe, root / "taught.safetensors")
    export_lora(pipe, root / "lora.safetensors")
    return root


def customize(place: Path, out: Path, *options: object, **changes: Any) -> Result:
    given = {"images": place / "photos", "prompt": PROMPT, **changes}
    named = [x for key, value in given.items() if value is not None for x in (f"--{key}", value)]
    base = [place / "base"] if "--base" not in options else []
    return Result(["customize", *base, *named, "--out", out, "--steps", 1, *[o for o in options if o != "--base"]])


def nothing_in(folder: Path, *but: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(but)


PHOTOS = {
    "missing": "there is no folder .*photos. Give the folder that holds the photos",
    "empty": "the folder .*photos is empty. Put the photos into it",
    "no photos": r"no photos in .*photos: it holds 'a.pdf', and photos end in .bmp, .jpeg",
    "a file": "photos is a file. Give the folder that holds it",
    "corrupt": r"the photo '1.png' cannot be read \(.*\). Repair or remove it, or .* --skip-bad-images",
    "cut short": r"the photo '1.png' cannot be read \(.*\). Repair or remove it, or .* --skip-bad-images",
    "no bytes": r"the photo '1.png' cannot be read \(the file is empty\)",
    "all corrupt": "the photo '0.png' cannot be read",
    "small": r"photos smaller than the resolution 16 needs \(1 of 2\): '1.png' is 9 x 16, .* --allow-upscale",
    "bad metadata": 'line 1 of .*metadata.jsonl is malformed. Write it like {"file_name"',
    "empty caption": "the caption file '0.txt' is empty. Write the caption into it, or remove it",
    "other caption": r"the caption of '0.txt'|the caption of '0.png', 'a dog', does not have 'V\*', the word to be",
}


@pytest.mark.parametrize("case", PHOTOS)
def test_photos(place, tmp_path, case):
    folder = tmp_path / "photos"
    if case not in ("missing", "a file"):
        shutil.copytree(place / "photos", folder)
    content = (place / "photos" / "1.png").read_bytes()
    if case == "a file":
        folder.write_bytes(content)
    elif case in ("empty", "no photos"):
        for path in folder.iterdir():
            path.unlink()
        if case == "no photos":
            (folder / "a.pdf").write_bytes(b"")
    elif case == "all corrupt":
        for path in folder.iterdir():
            path.write_bytes(b"no picture")
    elif case == "small":
        Image.new("RGB", (9, 16)).save(folder / "1.png")
    elif case == "bad metadata":
        (folder / "metadata.jsonl").write_text('{"file": "0.png"}')
    elif case in ("empty caption", "other caption"):
        (folder / "0.txt").write_text("" if case == "empty caption" else "a dog")
    elif case != "missing":
        bad = {"corrupt": b"no picture", "cut short": content[: len(content) // 2], "no bytes": b""}
        (folder / "1.png").write_bytes(bad[case])
    refused(customize(place, tmp_path / "dog.safetensors", images=folder), "^error: ", PHOTOS[case])
    nothing_in(tmp_path, *(["photos"] if case != "missing" else []))


CUSTOMIZE = {
    "no caption": ({"prompt": None}, [], "no caption for '0.png', '1.png'. Give --prompt 'a photo of"),
    "empty prompt": ({"prompt": " "}, [], "the prompt is empty. Say what the photos show"),
    "no token": ({"prompt": "a dog"}, ["--token", "V*"], r"the caption of '0.png', 'a dog', does not have 'V\*'"),
    "two tokens": ({"prompt": "a V* W*"}, [], r"several new words, V\* and W\*; say which to learn with --token"),
    "known token": ({"prompt": "a photo"}, ["--token", "photo"], "the tokenizer knows 'photo' already; choose another"),
    "token of spaces": ({"prompt": "a V W"}, ["--token", "V W"], "a token must be one word without spaces, not 'V W'"),
    "long start": ({}, ["--token-init", "three four"], r"'three four' is 2 tokens and 'V\*' has 1 vectors"),
    "class with token": ({}, ["--class-prompt", PROMPT], r"the class prompt 'a photo of V\*' has 'V\*'"),
    "class folder": ({}, ["--class-images", "nowhere"], "there is no folder nowhere"),
    "target": ({}, ["--target", "attn7"], r"no attention layer of the unet is named by .*attn7"),
    "layer rank": ({}, ["--layer-rank", "attn2"], "'attn2' is no rank of layers; write it like attn2=4"),
    "rank of nothing": ({}, ["--layer-rank", "attn7=2"], "no attention layer of the unet is named by 'attn7'"),
    "rank 0": ({}, ["--rank", 0], "rank is 0, but must be at least 1|rank.*0.*1"),
    "rank too large": ({}, ["--rank", 9], "rank 9 is above the head width 8 of '.*'; use at most 8"),
    "resolution": ({}, ["--resolution", 18], "the resolution 18 is not a multiple of 4, as it must be. Use 16 or 20"),
    "large resolution": ({}, ["--resolution", 32], r"smaller than the resolution 32 .*--resolution 16"),
    "nan lr": ({}, ["--lr", "nan"], "lr"),
    "huge lr": ({}, ["--lr", "-1"], "lr is -1.0"),
    "schedule": ({}, ["--schedule", "magic"], "schedule is 'magic'; choose one of constant, linear, cosine"),
    "crop": ({}, ["--random-crop"], "set cache_latents to false"),
    "fp16": ({}, ["--precision", "fp16", "--device", "cpu"], "precision fp16 needs a GPU; use bf16 or no"),
    "precision": ({}, ["--precision", "int4"], "precision is 'int4'; choose one of no, bf16, fp16"),
    "optimizer": ({}, ["--optimizer", "adamw8bit"], "pip install bitsandbytes, or take adamw"),
    "resume": ({}, ["--resume"], "there is no checkpoint in '.*dog.run' to resume from; start without --resume"),
}


@pytest.mark.parametrize("case", CUSTOMIZE)
def test_customize(place, tmp_path, case):
    changes, options, message = CUSTOMIZE[case]
    if case == "optimizer":
        pytest.importorskip("accelerate")
        if __import__("importlib").util.find_spec("bitsandbytes"):
            pytest.skip("bitsandbytes is there")
    refused(customize(place, tmp_path / "dog.safetensors", *options, **changes), "^error: ", message)
    nothing_in(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--storage", "int4"], "'int4' is not one of float32, float16, bfloat16, int8"),
        (["--device", "cuda:7"], "takes auto or cpu; choose GPUs with CUDA_VISIBLE_DEVICES"),
        (["--rank", "two"], "Invalid value for '--rank'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--magic"], "No such option"),
    ],
)
def test_usage(place, tmp_path, options, message):
    result = customize(place, tmp_path / "dog.safetensors", *options)
    assert result.code == 2 or (options[0] == "--config" and result.code == 1)
    assert message in result.err
    nothing_in(tmp_path)


def test_settings_file(place, tmp_path):
    path = tmp_path / "a.yaml"
    for content, message in {
        "rnk: 2": "there is no setting 'rnk'; did you mean rank",
        "rank: two": "rank is 'two', but must be a",
        "- rank": "a.yaml",
        "rank: [": "a.yaml",
    }.items():
        path.write_text(content)
        refused(customize(place, tmp_path / "dog.safetensors", "--config", path), "^error: ", message)
    nothing_in(tmp_path, "a.yaml")


def test_outputs(place, tmp_path):
    (tmp_path / "there.safetensors").write_text("precious")
    (tmp_path / "folder.safetensors").mkdir()
    for name, options, message in (
        ("there.safetensors", [], "exists already; choose another name or give --overwrite"),
        ("dog.bin", [], r"'.*dog.bin' does not end in .safetensors, the only format that is written"),
        ("folder.safetensors", ["--overwrite"], "is a directory; choose another name"),
        ("there.safetensors/dog.safetensors", [], "cannot be written: '.*there.safetensors' is a file; choose another"),
    ):
        refused(customize(place, tmp_path / name, *options), message)
    refused(customize(place, Path("/proc/nowhere/dog.safetensors")), "/proc/nowhere")
    assert (tmp_path / "there.safetensors").read_text() == "precious"
    nothing_in(tmp_path, "there.safetensors", "folder.safetensors")


BASES = {
    "missing": "there is no directory '.*base'; give a pipeline's directory or a name on the Hub, user/name",
    "not on the hub": "the pipeline 'nobody/nothing-of-this-name' cannot be opened: ",
    "no index": "'.*base' is no pipeline: it has no model_index.json. Give a directory in diffusers' layout",
    "pickled": "the pipeline '.*base' cannot be opened: .*safetensors",
    "single file": "'.*base' is a single file; give a directory in diffusers' layout or a name on the Hub",
    "broken index": "the pipeline '.*base' cannot be opened: ",
    "cut short": "the pipeline '.*base' cannot be opened: ",
}


@pytest.mark.parametrize("case", BASES)
def test_bases(place, tmp_path, case):
    base: Any = tmp_path / "base"
    if case in ("no index", "pickled", "broken index", "cut short"):
        shutil.copytree(place / "base", base)
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    if case == "not on the hub":
        base = "nobody/nothing-of-this-name"
    elif case == "no index":
        (base / "model_index.json").unlink()
    elif case == "broken index":
        (base / "model_index.json").write_text("{")
    elif case == "single file":
        base.write_bytes(b"")
    elif case == "pickled":
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
    elif case == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    out = tmp_path / "out.safetensors"
    refused(customize(place, out, "--base", base), "^error: ", BASES[case])
    refused(Result(["generate", base, "--prompt", "x", "--out", tmp_path / "images"]), "^error: ", BASES[case])
    assert not out.exists()
    assert not (tmp_path / "images").exists()


def test_a_conversion_needs_another_file(place, tmp_path):
    own = tmp_path / "dog.safetensors"
    shutil.copy(place / "dog.safetensors", own)
    (tmp_path / "link.safetensors").symlink_to(own)
    before = own.read_bytes()
    for out in (own, tmp_path / "link.safetensors"):
        result = Result(["adapter", "convert", own, out, "--to", "comcat", "--overwrite"])
        assert result.code == 2
        assert "is FILE itself" in result.err
    assert own.read_bytes() == before


@pytest.mark.parametrize("more", [["--rank", 2], ["--lora-alpha", 2], ["--partial"]])
@pytest.mark.parametrize("to", ["comcat", "kohya"])
def test_what_is_for_loras_alone(place, tmp_path, more, to):
    result = Result(["adapter", "convert", place / "dog.safetensors", tmp_path / "x.safetensors", "--to", to, *more])
    assert result.code == 2
    assert "--lora-alpha" in result.err
    nothing_in(tmp_path)


# Masks

MASKS = {
    "missing": "there is no mask '.*missing.png'; give an image, white where the adapter acts",
    "no image": r"the mask '.*no image.png' cannot be read \(not an image\). Give a PNG or JPEG",
    "black": "the mask '.*black.png' is black everywhere, so that the adapter would act nowhere. Paint white",
    "colours": "the mask '.*colours.png' has colours; paint it white where the adapter acts",
    "wide": r"the mask of 'dog' is 20 x 10 pixels \(width x height\), and the picture 16 x 16: .* aspect ratio",
}


@pytest.mark.parametrize("case", MASKS)
def test_masks(place: Path, tmp_path: Path, case: str) -> None:
    path = tmp_path / f"{case}.png"
    if case == "no image":
        path.write_text("no image")
    elif case != "missing":
        given = {"black": ("L", (8, 8), 0), "colours": ("RGB", (8, 8), "red"), "wide": ("L", (20, 10), 255)}
        Image.new(*given[case]).save(path)
    out = tmp_path / "images"
    adapter = f"{place / 'taught.safetensors'}@{path}"
    options = ["--adapter", adapter, "--prompt", PROMPT, "--steps", 1, "--seeds", 0, "--out", out]
    # The shape of the picture is known when it is drawn; everything else before the base is opened.
    base = place / ("base" if case == "wide" else "nowhere")
    refused(Result(["generate", base, *options]), "^error: ", MASKS[case])
    assert not out.exists()
