"""``comcat customize``, ``generate`` and ``adapter`` as somebody uses them one after the other."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comcat.cli.generate_command import parse_adapter, parse_seeds, slug
from comcat.customize import load_adapter
from comcat.customize.teaching.trainer import AdapterTrainer
from comcat_demos import contest_demo, digits, scene_contest
from comcat_demos.scenes_judge import score_scenes
from conftest import heed_interrupts
from test_cli import Result
from test_customize_train import write_photos

PROMPT = "a photo of V*"
QUICK = ["--rank", 1, "--steps", 3, "--lr", 0.02, "--batch-size", 2, "--log-every", 1, "--buckets", 1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A saved pipeline, photos and a LoRA-free adapter; shared, so tests must not change them."""
    root = tmp_path_factory.mktemp("customize")
    digits.build().save_pretrained(root / "base")
    write_photos(root / "photos", (16, 16), (20, 17), (31, 16))
    return root


def customize(place: Path, images: Path, out: Path, *options: object) -> Result:
    return Result(["customize", place / "base", "--images", images, "--out", out, *options])


@pytest.fixture(scope="module")
def dog(place):
    """The adapter, and the JSON document of its training."""
    out = place / "dog.safetensors"
    more = ["--class-prompt", "a photo of a digit", "--num-class-images", 3, "--validation-steps", 1]
    more += ["--validate-every", 3, "--validation-images", 2, "--text-encoder-rank", 1, "--device", "cpu"]
    result = customize(place, place / "photos", out, "--prompt", PROMPT, "--json", *QUICK, *more)
    assert result.code == 0, result.err
    assert result.err == ""
    return out, json.loads(result.out)


@pytest.fixture(scope="module")
def cat(place):
    """Another adapter, with captions beside its photos and settings from a file."""
    folder = write_photos(place / "cats", (16, 16), (17, 16))
    (folder / "0.txt").write_text("a photo of <cat>\n")
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "<cat> in a photo"}\n')
    (place / "cat.yaml").write_text("rank: 2\nlayer_ranks: [attn2=1]\nsteps: 9\nlr: 0.01\ntargets: [mid_block]\n")
    out = place / "pets" / "keys.safetensors"
    options = ["--steps", 2, "--storage", "int8", "--run-dir", place / "cat-run", "--keep-checkpoints"]
    result = customize(place, folder, out, "--config", place / "cat.yaml", *options)
    assert result.code == 0, result.err
    return out, result


def test_customize(place, dog):
    out, document = dog
    assert document["out"] == str(out)
    assert document["token"] == "V*"
    assert document["training"]["class_images"] == 3
    assert document["config"]["rank"] == 1
    assert document["bytes"] == out.stat().st_size
    run = Path(document["run"])
    assert sorted(path.name for path in run.iterdir()) == [
        ".comcat-run.json",
        "class-images",
        "metrics.jsonl",
        "samples",
        "tensorboard",
    ]
    with Image.open(run / "samples" / "step-000003.png") as sheet:
        assert sheet.size == (2 * 16 + 2, 16)


def test_settings_from_a_file_and_captions_from_theirs(place, cat):
    out, result = cat
    assert "your turn" in result.out.lower()
    line = f"comcat generate {place / 'base'} --adapter {out} --prompt 'a photo of <cat>' --out images"
    assert line in " ".join(result.out.split())
    assert (place / "cat-run" / "checkpoints" / "step-00000002").is_dir()
    info = json.loads(Result(["adapter", "info", out, "--json"]).out)
    assert info["name"] == "keys_"  # torch's modules have a method of the name
    assert info["storage"] == "int8"
    assert info["training"]["steps"] == 2
    layers = info["components"]["unet"]["layers"]
    assert {name[-5:]: entry["rank"] for name, entry in layers.items()} == {"attn1": 2, "attn2": 1}


def test_info(place, dog):
    out, document = dog
    result = Result(["adapter", "info", out])
    assert result.code == 0
    text = " ".join(result.out.split())
    for expected in ("dog ", "stored as float16", "token V* (1 vector)", f"prompt {PROMPT}", "strength 1", "steps 3"):
        assert expected in text
    assert "unet 14 attention layers of UNet2DConditionModel, rank 1" in text
    assert "text_encoder 2 attention layers of CLIPTextModel, rank 1" in text
    info = json.loads(Result(["adapter", "info", out, "--json"]).out)
    assert info["parameters"] == document["parameters"]
    assert info["base"] == {"name": str(place / "base"), "class": "StableDiffusionPipeline"}


def generate(place: Path, *options: object) -> Result:
    return Result(["generate", place / "base", "--steps", 1, *options])


def test_generate(place, dog, cat, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffa V* and a <cat>\n\n  <cat> on V*  \n", encoding="utf-8")
    adapters = ["--adapter", f"{dog[0]}:0.5", "--adapter", cat[0]]
    files = {}
    for name, more in {
        "a": ["--seeds", "0-1,5"],
        "b": ["--seeds", "5", "--batch-size", 1],
        "c": ["--seeds", "5", "--adapter", f"{dog[0]}:0.25"],
    }.items():
        chosen = adapters if name != "c" else adapters[2:]
        out = tmp_path / name
        result = generate(place, *chosen, "--prompts", prompts, *more, "--out", out, "--json", "--guidance", 2)
        assert result.code == 0, result.err
        assert result.err == ""
        document = json.loads(result.out)
        assert json.loads((out / "images.json").read_text()) == document
        files[name] = {(i["prompt"], i["seed"]): (out / i["file"]).read_bytes() for i in document["images"]}
        with Image.open(out / "grid.png") as sheet:
            assert sheet.height == 2 * 16 + 2
    assert [a["scale"] for a in document["adapters"]] == [1.0, 0.25]
    assert list(files["a"])[:3] == [("a V* and a <cat>", 0), ("a V* and a <cat>", 1), ("a V* and a <cat>", 5)]
    last = ("<cat> on V*", 5)
    with Image.open(tmp_path / "a" / "001-cat-on-v-seed5.png") as image:
        assert image.size == (16, 16)
    assert files["b"].keys() == {("a V* and a <cat>", 5), last}
    assert files["a"][last] != files["c"][last]
    assert len(set(files["a"].values())) == 6


def test_generate_without_adapter_and_token(place, dog, tmp_path):
    plain = generate(place, "--prompt", "a photo", "--out", tmp_path / "plain", "--seeds", 3)
    zero = ["--adapter", f"{dog[0]}:0", "--without-token"]
    none = generate(place, "--prompt", "a photo", "--out", tmp_path / "zero", "--seeds", 3, *zero)
    assert plain.code == none.code == 0, none.err
    first, second = (tmp_path / name / "000-a-photo-seed3.png" for name in ("plain", "zero"))
    assert first.read_bytes() == second.read_bytes()


def test_generate_with_masks(place, dog, cat, tmp_path):
    """Every adapter on its half: another picture than everywhere, and the same where a mask is white."""
    (left := Image.new("L", (20, 20))).paste(255, (0, 0, 10, 20))
    left.save(tmp_path / "left.png")
    Image.new("L", (5, 5), 255).save(tmp_path / "white.png")
    ways = {"apart": ["left", "white"], "white": ["white", "white"], "bare": [None, None]}
    drawn = {}
    for name, masks in ways.items():
        files = [f"{file}:0.9" for file in (dog[0], cat[0])]
        given = [f"{f}@{tmp_path / m}.png" if m else f for f, m in zip(files, masks, strict=True)]
        options = ["--adapter", given[0], "--adapter", given[1], "--prompt", "V* and <cat>", "--seeds", 3]
        result = generate(place, *options, "--out", tmp_path / name, "--json")
        assert result.code == 0, result.err
        document = json.loads(result.out)
        assert [a["mask"] for a in document["adapters"]] == [m and f"{tmp_path / m}.png" for m in masks]
        with Image.open(tmp_path / name / document["images"][0]["file"]) as image:
            drawn[name] = image.tobytes()
    close = max(abs(a - b) for a, b in zip(drawn["white"], drawn["bare"], strict=True))
    assert close <= 1
    assert drawn["apart"] != drawn["bare"]


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_convert_to_a_lora_and_back(place, dog, tmp_path, layout):
    lora = tmp_path / "lora.safetensors"
    base = ["--base", place / "base"]
    options = ["--to", layout, *base, "--data-free"]
    result = Result(["adapter", "convert", dog[0], lora, *options, "--json"])
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["bytes"] == lora.stat().st_size
    assert 0 < document["relative_error"] < 1.5
    assert document["output_error"] > 0
    assert len(document["layers"]) == 2 * 16
    assert load_file(tmp_path / "lora.embedding.safetensors")["V*"].shape == (1, 64)
    assert all("lora" in key for key in load_file(lora))

    back = tmp_path / "back.safetensors"
    result = Result(["adapter", "convert", lora, back, "--to", "comcat", "--rank", 8, *base])
    assert result.code == 0, result.err
    assert "Error from a LoRA" in result.out
    handle = load_adapter(digits.build(), back)
    assert {layer.rank for layer in handle.layers.values()} == {8}


def test_convert_with_an_alpha(place, tmp_path):
    """Of a LoRA that does not say it: alpha / rank is what its effects are multiplied by."""
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    rows, columns = digits.build().unet.get_submodule(name).weight.shape
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (2, columns), "B": (rows, 2)}
    lora = {f"unet.{name}.lora_{k}.weight": torch.randn(s, generator=generator) for k, s in shapes.items()}
    save_file(lora, tmp_path / "lora.safetensors")
    effects = {}
    for alpha in (None, 5):
        more = [] if alpha is None else ["--lora-alpha", alpha]
        out = tmp_path / f"{alpha}.safetensors"
        more += ["--to", "comcat", "--rank", 4, "--base", place / "base", "--json"]
        result = Result(["adapter", "convert", tmp_path / "lora.safetensors", out, *more])
        assert result.code == 0, result.err
        effects[alpha] = max(layer["effect"] for layer in json.loads(result.out)["layers"])
    assert effects[5] == pytest.approx(effects[None] * 5 / 2, rel=1e-3)


def test_convert_weighed_by_inputs(place, dog, tmp_path):
    lora = tmp_path / "lora.safetensors"
    more = ["--base", place / "base", "--lora-rank", 2, "--scale", 0.5, "--prompt", "a V* photo"]
    result = Result(["adapter", "convert", dog[0], lora, "--to", "diffusers", *more])
    assert result.code == 0, result.err
    assert "all layers" in result.out
    assert "token's vectors" in result.out
    assert {min(t.shape) for t in load_file(lora).values()} <= {1, 2}


def test_convert_to_another_storage(dog, tmp_path):
    out = tmp_path / "small.safetensors"
    result = Result(["adapter", "convert", dog[0], out, "--to", "comcat", "--storage", "int8", "--scale", 0.25])
    assert result.code == 0, result.err
    assert "the same adapter, stored as int8" in result.out
    info = json.loads(Result(["adapter", "info", out, "--json"]).out)
    assert (info["storage"], info["scale"], info["token"]["text"]) == ("int8", 0.25, "V*")
    with safe_open(out, "pt") as file:
        assert any(file.get_slice(key).get_dtype() == "I8" for key in file.keys())  # noqa: SIM118


def test_merge_report(place, dog):
    result = Result(["adapter", "merge-report", dog[0], "--base", place / "base"])
    assert result.code == 0, result.err
    for expected in ("QK effect", "VO error", "mid_block", "all layers", "the denoiser's output"):
        assert expected in " ".join(result.out.split())
    document = json.loads(Result(["adapter", "merge-report", dog[0], "--base", place / "base", "--json"]).out)
    assert document["dropped"] == ["the vectors of the token 'V*', which go into a file of their own"]
    assert {"component", "layer", "part", "relative", "effect", "kept"} == set(document["layers"][0])


COMMANDS = (["customize"], ["generate"], ["adapter"], ["adapter", "info"], ["adapter", "convert"], ["adapter"])


@pytest.mark.parametrize("command", [*COMMANDS, ["adapter", "merge-report"], ["demo"], ["demo", "customize"]])
def test_help(command):
    result = Result([*command, "--help"])
    assert result.code == 0
    assert "Usage" in result.out
    assert result.err == ""


def test_demos_still_have_their_options(tmp_path):
    (tmp_path / "file").write_text("precious")
    for command in (["demo"], ["demo", "customize"]):
        result = Result([*command, "--out", tmp_path, "--json"])
        assert result.code == 1
        assert "holds" in json.loads(result.out)["error"]


@pytest.mark.slow
def test_demo(tmp_path, monkeypatch):
    methods = [scene_contest.METHODS[i] for i in (0, 2, 4, 7)]
    few = {"rounds": 1, "other_scenes": 4}
    monkeypatch.setattr(contest_demo, "METHODS", methods)
    monkeypatch.setattr(scene_contest, "score_scenes", lambda *args, **kwargs: score_scenes(*args, **{**kwargs, **few}))
    options = ["--base-steps", 2, "--steps", 2, "--digit", 3, "--cache", tmp_path / "cache", "--json"]
    result = Result(["demo", "customize", "--out", tmp_path / "out", *options])
    assert result.code == 0, result.err
    document = json.loads(result.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [(m["digit"], m["name"]) for m in document["methods"]] == [(3, m.name) for m in methods]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"base", "three", "report.json", "report.png"}
    files = {path.name for path in (tmp_path / "out" / "three").iterdir()}
    assert {"photos", "class-images", "concept.safetensors", "concept-int8.safetensors"} < files
    result = Result(["demo", "customize", "--out", tmp_path / "out", *options])
    assert "already holds something" in result.err


def test_a_demo_without_a_digit_for_the_base_is_refused(tmp_path):
    every = [part for digit in range(10) for part in ("--digit", digit)]
    result = Result(["demo", "customize", "--out", tmp_path / "out", *every])
    assert result.code == 1
    assert "leave out fewer than all ten" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("step", "kept"), [(1, "no checkpoint yet"), (4, "the checkpoint of step 4 is kept, .*--res")])
def test_interrupted(place, tmp_path, monkeypatch, step, kept):
    def stop(self: AdapterTrainer, index: int, original: Any = AdapterTrainer.step) -> float:
        if index == step:
            raise KeyboardInterrupt
        return original(self, index)

    out = tmp_path / "dog.safetensors"
    more = ["--prompt", PROMPT, *QUICK, "--steps", 5, "--checkpoint-every", 2]
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "step", stop)
        result = customize(place, place / "photos", out, *more)
    assert result.code == 130
    assert re.fullmatch(f"interrupted; {kept}.*", result.err)
    assert not out.exists()
    resume = ["--resume"] if step == 4 else []
    assert customize(place, place / "photos", out, *more, *resume).code == 0
    assert customize(place, place / "photos", tmp_path / "b.safetensors", *more).code == 0
    assert load_file(out).keys() == load_file(tmp_path / "b.safetensors").keys()
    assert all(torch.equal(t, load_file(tmp_path / "b.safetensors")[name]) for name, t in load_file(out).items())


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
def test_interrupted_by_a_signal(place, tmp_path):
    """Ctrl-C: one line on how to go on, and the checkpoint is there; nothing but our own lines on the terminal."""
    out = tmp_path / "dog.safetensors"
    arguments = ["customize", place / "base", "--images", place / "photos", "--prompt", PROMPT, "--out", out]
    more = [*QUICK, "--steps", 100000, "--checkpoint-every", 2, "--schedule", "constant"]
    process = subprocess.Popen(
        [sys.executable, "-m", "comcat", *map(str, arguments + more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    end = time.monotonic() + 120
    while not list((tmp_path / "dog.run").glob("checkpoints/step-*")) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out_text, err = process.communicate(timeout=60)
    assert process.returncode == 130
    *stages, last = err.splitlines()  # a slow machine reports the stages that took long
    assert all(
        re.fullmatch(r"[\w ]+: (done in [\dhmins ]+|\d+( of \d+)?(, about .* left)?)", stage) for stage in stages
    ), err
    assert re.fullmatch(r"interrupted; the checkpoint of step \d+ is kept, continue with --resume", last), err
    assert out_text == ""
    assert not out.exists()


def test_parsing(tmp_path):
    assert parse_seeds("0-3,7") == [0, 1, 2, 3, 7]
    assert parse_seeds(" 5 , 1-1,5") == [5, 1]
    dog = Path("dog.safetensors")
    assert parse_adapter("dog.safetensors") == (dog, None, None, None)
    assert parse_adapter("dog.safetensors:-0.5") == (dog, -0.5, None, None)
    (tmp_path / "a:1").write_text("")
    assert parse_adapter(str(tmp_path / "a:1")) == (tmp_path / "a:1", None, None, None)
    assert parse_adapter("dog.safetensors:0.8,token=V2*") == (dog, 0.8, "V2*", None)
    assert parse_adapter("dog.safetensors,token=<d:1>") == (dog, None, "<d:1>", None)
    assert parse_adapter("dog.safetensors,token=V2*:0.8") == (dog, 0.8, "V2*", None)
    assert parse_adapter(r"C:\dog.safetensors:0.8") == (Path(r"C:\dog.safetensors"), 0.8, None, None)
    (tmp_path / "a,token=b.safetensors").write_text("")
    found = parse_adapter(str(tmp_path / "a,token=b.safetensors:2"))
    assert found == (tmp_path / "a,token=b.safetensors", 2, None, None)
    assert parse_adapter("a" * 999 + ":1") == (Path("a" * 999), 1, None, None)
    left = Path("left.png")
    for text in (
        "dog.safetensors:0.8@left.png,token=V*",
        "dog.safetensors@left.png:0.8,token=V*",
        "dog.safetensors,token=V*:0.8@left.png",
    ):
        assert parse_adapter(text) == (dog, 0.8, "V*", left)
    assert parse_adapter("dog.safetensors@left.png") == (dog, None, None, left)
    assert parse_adapter("dog.safetensors,token=V@*@left.png") == (dog, None, "V@*", left)
    assert parse_adapter("dog.safetensors,token=V@*") == (dog, None, "V@*", None)
    (tmp_path / "me@home").mkdir()
    (tmp_path / "me@home" / "left@2x.png").write_text("")
    (tmp_path / "dog@home").write_text("")
    place, image = tmp_path / "dog@home", tmp_path / "me@home" / "left@2x.png"
    assert parse_adapter(f"{place}@{image}") == (place, None, None, image)
    assert parse_adapter("me@home/dog.safetensors:1") == (Path("me@home/dog.safetensors"), 1, None, None)
    for text in (
        "x.safetensors:abc",
        "x.safetensors:",
        "x.safetensors:0,8",
        "x.safetensors:1,token=",
        "x.safetensors,1",
        "x.safetensors@",
        "x.safetensors@left",
    ):
        with pytest.raises(typer.BadParameter, match=r"write FILE, FILE:0\.8, FILE@MASK or FILE:0\.8@MASK,token="):
            parse_adapter(text)
    with pytest.raises(typer.BadParameter, match="more than 10,000 seeds"):
        parse_seeds("0-9223372036854775806")
    assert slug("A photo of <V*>, äh!") == "a-photo-of-v-h"
    assert slug("***") == "prompt"


def test_a_budget_of_bytes(place, dog, tmp_path):
    """Training under one, and an adapter that is there; the sizes are those of the files."""
    out = tmp_path / "small.safetensors"
    more = ["--max-bytes", "14kB", "--storage", "nf4", "--json"]
    result = customize(place, place / "photos", out, "--prompt", PROMPT, *QUICK, "--rank", 3, *more)
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["bytes"] == out.stat().st_size <= 14_000
    assert document["training"]["max_bytes"] == 14_000

    shrunk = tmp_path / "shrunk.safetensors"
    options = ["--max-bytes", "12KiB", "--storage", "nf4", "--base", place / "base", "--images", 1]
    result = Result(["adapter", "shrink", dog[0], shrunk, *options, "--json"])
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["bytes"] == shrunk.stat().st_size <= 12 * 1024
    assert 0 < document["components"] < document["of"]
    assert document["output_error"] > 0
    assert "stored as nf4" in Result(["adapter", "info", shrunk]).out


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_another_storage_says_what_it_changes(place, dog, tmp_path, storage):
    out = tmp_path / "x.safetensors"
    options = ["--to", "comcat", "--storage", storage]
    document = json.loads(Result(["adapter", "convert", dog[0], out, *options, "--json"]).out)
    assert document["output_error"] is None
    limit = {"int8": 0.02, "nf4": 0.2}[storage]
    assert 0 < document["products_error"] < limit
    result = Result(["adapter", "convert", dog[0], out, *options, "--overwrite", "--base", place / "base"])
    assert result.code == 0, result.err
    assert "of what the adapter changes" in result.out
