"""The page: its handlers with a tiny pipeline, the server around it, and the command that starts it."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import comcat
from comcat.cli import app, console
from comcat.customize import generate, load_adapter, open_pipeline, read_adapter
from comcat.customize.adapter.attached import adapters, add_adapter
from comcat.customize.adapter.masking import as_mask
from comcat.customize.files.adapter_file import save_adapter
from comcat.errors import ComcatError
from comcat.ui import library_tab
from comcat.ui.areas import HALVES, OWN, mask_of
from comcat.ui.command_job import CommandJob
from comcat.ui.compress_tab import AUTOMATIC, CompressTab
from comcat.ui.customize_form import ASKED, FIELDS, losses, samples
from comcat.ui.customize_tab import CustomizeTab
from comcat.ui.library_tab import LibraryTab
from comcat.ui.shared import Shared
from comcat.ui.work import DONE, FAILED, STOPPED
from comcat.ui.workplace import Workplace, library, unfinished
from comcat_demos import digits
from conftest import heed_interrupts
from test_cli import Result
from test_customize_train import write_photos as random_photos
from test_data import make_folder
from test_ui_work import PATIENCE

PROMPT = "a photo of V*"
#: Settings of the page, as its fields hold them: a training of moments.
QUICK = {"rank": 1, "steps": 4, "lr": "0.02", "batch_size": 2, "log_every": 1, "validate_every": 2}
QUICK |= {"validation_images": 2, "validation_steps": 1, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ui") / "base"
    digits.build().save_pretrained(folder)
    return folder


@pytest.fixture
def shared(base, tmp_path):
    """A page with an adapter and a file that is none."""
    pipe = open_pipeline(str(base))
    handle = add_adapter(pipe, rank=2, name="dog", token="V*", scale=0.75)
    generator = torch.Generator().manual_seed(0)
    for parameter in handle.parameters():  # far from the base
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    handle.info = {"prompt": PROMPT, "base": str(base)}
    folder = tmp_path / "adapters"
    folder.mkdir()
    save_adapter(pipe, folder / "dog.safetensors")
    (folder / "broken.safetensors").write_bytes(b"nothing")
    shared = Shared(Workplace(str(base), folder, "cpu"))
    yield shared
    shared.close()
    assert not shared.scratch.exists()


@pytest.fixture
def here(monkeypatch):
    """Commands run in this process, which need not import everything once more."""

    def run(self: CommandJob, arguments: list[str]) -> dict[str, Any]:
        events: list[dict[str, Any]] = []
        monkeypatch.setattr(console, "listeners", [events.append])
        result = CliRunner().invoke(app, arguments)
        found: dict[str, Any] = {}
        for event in events:
            found = self._heed(json.dumps(event, default=str)) or found
        if result.exit_code:
            raise ComcatError(self._words(found["error"]))
        return found

    monkeypatch.setattr(CommandJob, "_run", run)


def over(shared: Shared, kind: str) -> Any:
    """The newest job of a kind, once it has ended."""
    job = shared.line.latest(kind)
    assert job is not None
    for _ in range(100 * PATIENCE):
        if job.over:
            return job
        threading.Event().wait(0.01)
    raise AssertionError(f"{job.title} is {job.state}")


def told(base: object, **own: Any) -> list[Any]:
    """What the fields of the page hold."""
    asked = {"base": str(base), "prompt": PROMPT, "storage": "float16", "allow_upscale": False, "overwrite": False}
    fields = [own.get(field.name, field.shown(field.default)) for field in FIELDS]
    return [*(own.get(name, asked.get(name, "")) for name in ASKED), *fields]


def test_photos_to_adapter(shared, tmp_path, here):
    """As with the mouse: photos, start, loss, samples, the file."""
    tab, place = CustomizeTab(shared), shared.place
    assert "no photos yet" in tab.start("zero", [], *told(place.base, **QUICK))
    folder = random_photos(tmp_path / "photos", (16, 16), (20, 17))
    (folder / "notes.txt").write_text("no image")
    photos, problem = tab.added([str(file) for file in sorted(folder.iterdir())], [])
    assert (len(photos), "notes.txt" in problem, "The other 2 are kept" in problem) == (2, True, True)
    assert tab.start("zero", photos, *told(place.base, **QUICK)) == ""
    assert "already" in tab.start("zero", photos, *told(place.base, **QUICK, overwrite=True))
    job = over(shared, "customize")
    assert job.state == DONE, job.message
    now = tab.look()
    assert [step for step, _ in now["losses"]] == [1, 2, 3, 4]
    assert [text for _, text in now["samples"]] == ["step 4", "step 2"]
    assert now["file"] == str(place.adapter("zero"))
    assert now["command"].startswith("comcat customize ")
    header, _ = read_adapter(place.adapter("zero"))
    assert (header.token["text"], header.training["steps"]) == ("V*", 4)
    assert "already. Choose another name" in tab.start("zero", photos, *told(place.base, **QUICK))
    assert Path(shared.shown(now["file"])).read_bytes() == place.adapter("zero").read_bytes()
    assert unfinished(place.folder) == []


def test_a_stopped_run_goes_on_on_the_command_line_and_back(shared, tmp_path):
    tab, place = CustomizeTab(shared), shared.place
    photos, _ = tab.added([str(f) for f in random_photos(tmp_path / "photos", (16, 16)).iterdir()], [])
    long = told(place.base, **{**QUICK, "steps": 4000, "validate_every": 0})
    assert tab.start("zero", photos, *long) == ""
    job = shared.line.latest("customize")
    for _ in range(100 * PATIENCE):
        if job.over or (job.stage == "train" and job.done > 2):
            break
        threading.Event().wait(0.01)
    assert not job.over, job.message
    tab.stop()
    assert over(shared, "customize").state == STOPPED
    assert re.match(r"the checkpoint of step \d+ is kept, continue with “Resume”", job.message)
    assert tab.look()["runs"] == ["zero"]
    # The same run, by the command that the page shows: other settings are refused, so all is as it was told.
    arguments = [*job.commands[0], "--resume"]
    arguments[arguments.index("--steps") + 1] = "3999"
    refused = Result(arguments)
    assert refused.code == 1
    assert "steps" in refused.err
    assert tab.resume("zero", [], *told("")) == ""  # what the fields hold now does not matter
    job = shared.line.latest("customize")
    assert (job.commands[0].count("--resume"), job.commands[0].count("--overwrite")) == (1, 0)
    tab.stop()
    assert over(shared, "customize").state == STOPPED
    assert unfinished(place.folder) == ["zero"]
    assert "No training is left" in tab.resume(None, [], *told(""))


def test_what_the_library_shows(shared):
    tab = LibraryTab(shared)
    broken, dog = tab.entries()
    assert dog.row()[:1] + dog.row()[2:3] + dog.row()[4:] == ["dog", "2", "V*", PROMPT]
    assert "cannot be used" in broken.row()[1]
    assert tab.look()["names"] == ["dog"]
    assert library(shared.place.folder / "nowhere") == []


def test_side_by_side_at_the_same_seed(shared, base):
    tab = LibraryTab(shared)
    assert tab.draw(str(base), PROMPT, ["dog"], {"dog": {"strength": 0.5}}, 3, 2, "2", "", "", "") == ""
    job = over(shared, "library")
    assert job.state == DONE, job.message
    pictures = tab.pictures()
    assert [p.caption for p in pictures] == ["base · seed 3", "dog 0.5 · seed 3", "base · seed 4", "dog 0.5 · seed 4"]
    pipe = open_pipeline(str(base))
    (expected,) = generate(pipe, [PROMPT], seeds=[3, 4], steps=2)
    assert [_far(a, p.image) for a, p in zip(expected, pictures[::2], strict=True)] == [False, False]
    load_adapter(pipe, shared.place.adapter("dog"), scale=0.5)
    (expected,) = generate(pipe, [PROMPT], seeds=[3, 4], steps=2)
    assert [_far(a, p.image) for a, p in zip(expected, pictures[1::2], strict=True)] == [False, False]
    assert _far(pictures[0].image, pictures[1].image)
    assert adapters(shared.studio._pipe) == {}
    assert "Each holds its settings" in tab.save()
    assert "Each holds its settings" in tab.save()  # beside the others
    files = sorted((shared.place.folder / library_tab.PICTURES).iterdir())
    assert [file.name[:3] for file in files] == ["000"] * 4 + ["001"] * 4
    with Image.open(files[0]) as image:
        said = json.loads(image.text["comcat"])  # type: ignore[attr-defined]
    assert (said["prompt"], said["seed"], said["steps"]) == (PROMPT, 3, 2)
    assert said["adapters"] == [
        {"file": str(shared.place.adapter("dog")), "scale": 0.5, "where": "everywhere", "word": None}
    ]


def test_an_adapter_on_a_part_of_the_picture(shared, base):
    tab = LibraryTab(shared)
    images = {}
    for area, told in {
        "everywhere": {},
        "left half": {"area": "left half"},
        "again": {"area": OWN, "image": str(mask_of("left half", None, shared.scratch, "dog"))},
    }.items():
        assert tab.draw(str(base), PROMPT, ["dog"], {"dog": told}, 0, 1, "1", "", "", "") == ""
        assert over(shared, "library").state == DONE, shared.line.latest("library").message
        images[area] = tab.pictures()[1]
    assert [images[area].caption.split(" · ")[0] for area in ("everywhere", "left half", "again")] == [
        "dog 0.75",
        "dog 0.75, left half",
        "dog 0.75, left-half.png",
    ]
    assert _far(images["everywhere"].image, images["left half"].image)
    assert not _far(images["left half"].image, images["again"].image)
    refused = tab.draw(str(base), PROMPT, ["dog"], {"dog": {"area": OWN}}, 0, 1, "1", "", "", "")
    assert "add the image, or choose another area" in refused


def test_two_adapters_that_learned_the_same_word(shared, base):
    tab = LibraryTab(shared)
    shutil.copyfile(shared.place.adapter("dog"), shared.place.adapter("cat"))
    both, told = ["dog", "cat"], {"dog": {"area": "left half"}, "cat": {"area": "right half"}}
    assert tab.draw(str(base), f"{PROMPT} and W*", both, told, 0, 1, "1", "", "", "") == ""
    assert over(shared, "library").state == FAILED
    told["cat"]["word"] = "W*"
    assert tab.draw(str(base), f"{PROMPT} and W*", both, told, 0, 1, "1", "", "", "") == ""
    assert over(shared, "library").state == DONE, shared.line.latest("library").message
    assert tab.pictures()[1].caption == "dog 0.75, left half + cat 0.75, right half · seed 0"


def test_the_halves(tmp_path):
    masks = {area: as_mask(mask_of(area, None, tmp_path, "dog")) for area in HALVES}
    left, right, upper, lower = masks.values()
    assert bool((left + right == 1).all())
    assert bool((upper + lower == 1).all())
    assert float(left[0, 0] * upper[0, 0] * right[-1, -1] * lower[-1, -1]) == 1
    assert mask_of("everywhere", "x.png", tmp_path, "dog") is None


def _far(a: Image.Image, b: Image.Image) -> bool:
    """Whether two pictures differ by more than a rounding of their pixels."""
    x, y = (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int() for image in (a, b))
    return int((x - y).abs().max()) > 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"base": ""}, "no base model yet"),
        ({"base": "nowhere/at/all"}, "no directory"),
        ({"prompt": "a photo"}, "does not have 'V\\*'"),
        ({"size": "9"}, "cannot draw this"),
    ],
)
def test_drawings_that_cannot_be(shared, base, given, words):
    asked = {"base": str(base), "prompt": PROMPT, "size": "", **given}
    tab = LibraryTab(shared)
    assert tab.draw(asked["base"], asked["prompt"], ["dog"], {}, 0, 1, "1", "", "", asked["size"]) == ""
    job = over(shared, "library")
    assert job.state == FAILED
    assert re.search(words, job.message)
    assert "There are no pictures yet" in tab.save()


def test_fields_that_hold_no_number_and_adapters_that_are_gone(shared, base):
    tab = LibraryTab(shared)
    assert "must be a whole number" in tab.draw(str(base), PROMPT, [], {}, 0, 1, "few", "", "", "")
    assert "no adapter &#x27;cat&#x27; any more" in tab.draw(str(base), PROMPT, ["cat"], {}, 0, 1, "", "", "", "")
    assert "Choose an adapter" in tab.remove(None)
    assert "Choose an adapter" in tab.export(None, str(base), "diffusers")
    assert tab.remove("dog").startswith("Removed")
    assert not shared.place.adapter("dog").exists()


def test_exported_with_its_error(shared, base, here):
    tab = LibraryTab(shared)
    assert tab.exported() == ""
    assert tab.export("dog", str(base), "diffusers") == ""
    job = over(shared, "export")
    assert job.state == DONE, job.message
    assert re.search(r"Relative error of the products: \*\*[\d.e+-]+ %\*\*", tab.exported())
    assert (shared.place.folder / "dog.diffusers-lora.safetensors").is_file()
    assert [entry.name for entry in tab.entries()] == ["broken", "dog"]  # a LoRA is no adapter


def test_compress_refuses(shared, tmp_path, here):
    tab = CompressTab(shared)
    assert tab.report() == ""
    more = ("parameters", AUTOMATIC, False, "", "", False, False)
    assert "no model yet" in tab.start("", "", "small", 50, *more)
    assert "“Calibration images” is &#x27;x&#x27;" in tab.start(
        "m", "", "small", 50, "parameters", AUTOMATIC, False, "x", "", False, False
    )
    assert "No compression was stopped" in tab.resume()
    assert tab.start(str(tmp_path / "nowhere"), "", str(tmp_path / "small"), 50, *more) == ""
    job = over(shared, "compress")
    assert job.state == FAILED
    assert "nowhere" in job.message
    assert not tab.look()["resumable"]  # nothing was gathered
    assert losses(tmp_path) == samples(tmp_path) == []


def test_a_model_and_a_budget_to_a_report(shared, tmp_path, here):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    widths = {"hidden_size": 15, "intermediate_size": 17, "num_attention_heads": 3, "num_hidden_layers": 2}
    config = ViTConfig(image_size=8, patch_size=4, **widths, num_labels=3)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    make_folder(tmp_path / "images", per_class=3)
    tab = CompressTab(shared)
    told = (str(tmp_path / "vit"), str(tmp_path / "images"), str(tmp_path / "small"), 60, "parameters", "uniform")
    assert tab.start(*told, False, "4", "", False, False) == ""
    job = over(shared, "compress")
    assert job.state == DONE, job.message
    now = tab.look()
    assert (now["out"], now["page"]) == (str(tmp_path / "small"), str(tmp_path / "small" / "report.html"))
    assert "--keep 0.6" in now["command"]
    assert tab.report().startswith('<iframe title="Report" sandbox="" srcdoc="&lt;!')
    assert comcat.load_model(str(tmp_path / "small"))
    assert not job.form.calibration.exists()
    assert tab.start(*told, False, "4", "", False, False) == ""  # again, without Replace
    job = over(shared, "compress")
    assert job.state == FAILED
    assert "“Replace”" in job.message


def test_a_busy_port_is_one_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = Result(["ui", "--port", port])
    assert result.code == 1
    assert result.err == (
        f"error: port {port} of 127.0.0.1 is taken, perhaps by another comcat ui; choose another one: --port {port + 1}"
    )


def test_no_such_address():
    result = Result(["ui", "--host", "192.0.2.1"])
    assert result.code == 1
    assert "is no address of this machine" in result.err
    assert "leave --host out" in result.err


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = Result(["ui", "--port", 0])
    assert (result.code, result.err) == (
        1,
        "error: comcat ui needs another package. Install it: pip install 'comcat[ui]'",
    )


def test_the_page_is_served_and_ends_with_ctrl_c(base, tmp_path):
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "comcat", "ui", str(base), "--port", "0", "--folder", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as server:
        try:
            address = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())[0]
            with urllib.request.urlopen(f"{address}/", timeout=PATIENCE) as answer:
                text, policy = answer.read().decode(), answer.headers["content-security-policy"]
            with urllib.request.urlopen(f"{address}/config", timeout=PATIENCE) as answer:
                config = json.load(answer)
        finally:
            server.send_signal(signal.SIGINT)
            _, said = server.communicate(timeout=PATIENCE)
    assert server.returncode == 0, said
    assert said == "note: ending; a training that is on keeps its last checkpoint\n"
    assert "default-src 'self'" in policy
    assert not re.findall(r'(?:src|href)="https?://(?!127\.0\.0\.1)[^"]*\.(?:js|css|woff2?)"', text)
    assert config["analytics_enabled"] is False
    tabs = [part["props"]["label"] for part in config["components"] if part["type"] == "tabitem"]
    assert tabs == ["Customize", "Library", "Compress"]
    fields = [part["props"] for part in config["components"] if part["type"] == "textbox"]
    assert [field["label"] for field in fields if not isinstance(field["value"], str)] == []  # handlers take texts
