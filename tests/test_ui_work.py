"""The jobs behind the page: one at a time, in line, stopped and started again. No page, no browser."""

import json
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import typer
from PIL import Image

from comcat.cli import app, console
from comcat.cli.customize_command import settings_of
from comcat.customize.files.numbers import Storage
from comcat.customize.teaching.customize_config import CustomizeConfig
from comcat.customize.teaching.photos import find_photos
from comcat.errors import CheckpointError, ComcatError, DataError
from comcat.report.format import duration
from comcat.ui.compress_form import CompressForm
from comcat.ui.customize_form import FIELDS, STORAGES, CustomizeForm, TrainingJob, page_words
from comcat.ui.given_photos import GivenPhoto, add_photos, photos_of, read_told, with_captions, write_photos
from comcat.ui.setting_fields import number
from comcat.ui.status_card import job_card, now_line, problem_card
from comcat.ui.work import DONE, FAILED, RUNNING, STOPPED, STOPPING, WAITING, Job, Line, Stopped
from comcat.ui.workplace import Workplace
from test_customize_train import write_photos as random_photos

#: Longest wait for another thread, in seconds; none is as long unless something hangs.
PATIENCE = 60


class Held(Job):
    """Runs until it is let go or halted."""

    def __init__(self, kind: str = "customize", error: BaseException | None = None) -> None:
        super().__init__(f"Job of {kind}")
        self.kind = kind  # type: ignore[misc]
        self.begun, self.go, self.error, self.halted = threading.Event(), threading.Event(), error, False

    def run(self) -> None:
        self.begun.set()
        assert self.go.wait(PATIENCE)
        if self.halted:
            raise Stopped("step 3 is kept")
        if self.error:
            raise self.error

    def halt(self) -> None:
        self.halted = True
        self.go.set()


@pytest.fixture
def line():
    line = Line()
    yield line
    line.close()
    assert not line._thread.is_alive()


def ended(line: Line, job: Job) -> str:
    """Its state in the end, once the line has let go of it."""
    line.add(last := Held("last"))
    last.go.set()
    assert last.begun.wait(PATIENCE)
    return job.state


def test_one_at_a_time_in_the_order_in_which_they_came(line):
    first, second = Held("customize"), Held("library")
    line.add(first)
    assert first.begun.wait(PATIENCE)
    line.add(second)
    assert (first.state, second.state, line.waiting()) == (RUNNING, WAITING, [second])
    assert "Running: Job of customize · waiting: Job of library" in now_line(line)
    assert "Before this one: “Job of customize”" in job_card(second, line, "")
    with pytest.raises(ComcatError, match="“Job of library” is waiting already, perhaps from another window"):
        line.add(Held("library"))
    assert not second.begun.is_set()
    first.go.set()
    assert second.begun.wait(PATIENCE)
    assert first.state == DONE
    second.go.set()
    assert ended(line, second) == DONE
    assert line.latest("customize") is first


def test_stopped_while_it_runs_and_while_it_waits(line):
    first, second = Held("customize"), Held("library")
    line.add(first)
    line.add(second)
    assert first.begun.wait(PATIENCE)
    line.stop(second)
    assert (second.state, second.message) == (STOPPED, "It had not begun.")
    line.stop(first)
    line.stop(first)  # twice is once
    assert first.state in (STOPPING, STOPPED)
    assert ended(line, first) == STOPPED
    assert first.message == "step 3 is kept"
    line.stop(first)
    assert first.state == STOPPED
    assert not second.begun.is_set()


def test_the_line_goes_on_whatever_happens(line, capsys):
    for error, words in (
        (DataError("no <photos>"), "no <photos>"),
        (ZeroDivisionError("oh"), "ZeroDivisionError: oh. The terminal"),
        (MemoryError(), "out of memory"),
    ):
        job = Held("customize", error)
        line.add(job)
        job.go.set()
        assert ended(line, job) == FAILED
        assert words in job.message
        assert "<photos>" not in job_card(job, line, "")  # escaped
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_closing_ends_everything():
    line = Line()
    first, second = Held("customize"), Held("library")
    line.add(first)
    line.add(second)
    assert first.begun.wait(PATIENCE)
    line.close()
    assert (first.state, second.state) == (STOPPED, STOPPED)
    with pytest.raises(ComcatError, match="closing"):
        line.add(Held("compress"))


def test_cards_say_how_far_it_is(line):
    job = Held()
    assert job_card(None, line, "<idle>") == '<div class="card idle"><div class="fine">&lt;idle&gt;</div></div>'
    job.state = RUNNING
    job.progress("train", 30, 120)
    assert "width:25.0%" in job_card(job, line, "")
    assert "train · 30 of 120" in job_card(job, line, "")
    job.progress("open", 0, None)
    assert "open …" in job_card(job, line, "")
    assert problem_card("") == ""
    assert "The &lt;x&gt; is wrong." in problem_card("the <x> is wrong")
    assert [duration(s) for s in (0, 75, 7260)] == ["0 s", "1 min 15 s", "2 h 1 min"]


def given(command: str, arguments: list[str]) -> dict:
    """What the command line makes of arguments."""
    group = typer.main.get_command(app)
    return group.commands[command].make_context(command, arguments).params  # type: ignore[attr-defined]


OTHER = {
    "rank": 5,
    "layer_ranks": ("attn2=4", "mid_block=1"),
    "targets": ("cross",),
    "token": "<dog>",
    "token_init": "a dog",
    "lr": 1.5e-5,
    "schedule": "linear",
    "snr_gamma": 5.0,
    "resolution": 512,
    "random_crop": True,
    "cache_latents": False,
    "clip_grad": 0.5,
    "validate_every": 0,
    "seed": 7,
}


@pytest.mark.parametrize("settings", [{}, OTHER], ids=["defaults", "others"])
def test_the_page_tells_the_command_what_it_was_told(tmp_path, settings):
    """Settings -> fields of the page -> arguments -> settings."""
    wanted = CustomizeConfig.from_dict(settings)
    shown = {field.name: field.shown(getattr(wanted, field.name)) for field in FIELDS}
    read = {field.name: field.read(shown[field.name]) for field in FIELDS}
    assert CustomizeConfig.from_dict(read) == wanted
    form = CustomizeForm("base", "a photo of V*", "a photo of a dog", "dogs/", "nf4", "1M", True, True, read)
    place = Workplace("base", tmp_path, "cpu", "fp16")
    _, *arguments = form.arguments(place, "my dog", resume=True)
    params = given("customize", arguments)
    assert settings_of(params, None) == wanted
    assert (params["prompt"], params["class_prompt"]) == ("a photo of V*", "a photo of a dog")
    assert (params["class_images"], params["storage"], params["max_bytes"]) == (Path("dogs/"), "nf4", "1M")
    assert (params["images"], params["out"]) == (tmp_path / "my dog.photos", tmp_path / "my dog.safetensors")
    assert params["resume"]
    assert params["overwrite"]
    assert params["allow_upscale"]
    assert (params["device"], params["variant"]) == ("cpu", "fp16")


def test_the_first_choices_are_the_command_s():
    bare = CustomizeForm("base", "").arguments(Workplace("base", Path("folder")), "dog", resume=False)
    assert bare[:6] == ["customize", "base", "--images", "folder/dog.photos", "--out", "folder/dog.safetensors"]
    assert bare[6:] == []
    assert get_args(Storage) == STORAGES
    assert given("customize", bare[1:])["storage"] == CustomizeForm("base", "").storage


def test_the_page_says_options_by_its_own_words():
    assert page_words("choose another --out or give --overwrite") == "choose another “Name” or give “Replace”"
    assert page_words("--token-lr") == "“Token learning rate”"


@pytest.mark.parametrize(("value", "words"), [("many", "must be a whole number"), (1.5, "must be a whole number")])
def test_numbers_that_are_none(value, words):
    with pytest.raises(ComcatError, match=words):
        number(value, "Steps", int)
    assert (number("", "Steps", int), number(" 3 ", "Steps", int), number("0", "Guidance")) == (None, 3, 0.0)
    with pytest.raises(ComcatError, match=words):
        next(field for field in FIELDS if field.name == "resolution").read(value)


@pytest.mark.parametrize("name", ["", "../dog", "a/b", ".hidden", "-x"])
def test_names_of_no_file(tmp_path, name):
    with pytest.raises(ComcatError, match="none for a file"):
        Workplace("", tmp_path).adapter(name)


def test_what_is_no_photo_is_named_and_nothing_is_lost(tmp_path):
    folder = random_photos(tmp_path / "photos", (16, 16), (20, 17))
    there, problems = add_photos([], sorted(folder.iterdir()))
    assert problems == []
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "notes.txt").write_text("no image")
    (bad / "broken.png").write_bytes(b"\x89PNG nope")
    (bad / "empty.jpg").write_bytes(b"")
    Image.new("RGB", (5, 7)).save(bad / "0.png")  # a name that is there already
    photos, problems = add_photos(there, sorted(bad.iterdir()))
    assert photos[:2] == there
    assert [photo.name for photo in photos] == ["0.png", "1.png", "0-2.png"]
    assert problems == [
        "the photo 'broken.png' cannot be read (not an image)",
        "the photo 'empty.jpg' cannot be read (the file is empty)",
        "'notes.txt' is no photo that can be read: such end in .bmp, .jpeg, .jpg, .png, .tif, .tiff, .webp",
    ]
    assert add_photos(photos, sorted(folder.iterdir()))[0] == photos  # the same again


def test_photos_and_captions_reach_the_training(tmp_path):
    folder = random_photos(tmp_path / "photos", (16, 16), (20, 17), (9, 8))
    (folder / "1.txt").write_text("a photo of <cat>\n")
    photos = photos_of(folder)
    assert [photo.caption for photo in photos] == ["", "a photo of <cat>", ""]
    photos = with_captions(photos, [["0.png", " V*  on grass "], ["1.png", "a photo of <cat>"], ["", "new row"]])
    assert [photo.name for photo in photos] == ["0.png", "1.png"]
    told = {"base": "b", "settings": {"steps": 3}}
    out = tmp_path / "dog.photos"
    for _ in range(2):  # the second in the place of the first
        write_photos(out, photos, told)
    heard: list[str] = []
    assert [p.caption for p in find_photos(out, "P", note=heard.append)] == ["V* on grass", "a photo of <cat>"]
    assert heard == []
    assert read_told(out) == told
    assert read_told(folder) is None
    with pytest.raises(DataError, match="no photos yet"):
        write_photos(out, [], told)
    with pytest.raises(CheckpointError, match="not overwritten"):
        write_photos(folder, photos, told)
    with pytest.raises(DataError, match=r"'x.png' cannot be read any more"):
        write_photos(out, [GivenPhoto(str(tmp_path / "gone.png"), "x.png")], told)
    assert [p.caption for p in photos_of(out)] == ["V* on grass", "a photo of <cat>"]


def test_what_compress_is_told():
    form = CompressForm(" vit ", "data", "small", 0.7, "multiply-adds (MACs)", "probe", True, 32, 64, True, True)
    params = given("compress", form.arguments(["--device", "cpu"])[1:])
    expected = {"model": "vit", "out": Path("small"), "keep_macs": 0.7, "keep": None, "method": "probe"}
    expected |= {"calibration_images": 32, "eval_images": 64, "skip_bad_images": True, "overwrite": True}
    expected |= {"no_eval": False, "calibration_file": form.calibration, "data": "data", "device": "cpu"}
    assert {key: params[key] for key in expected} == expected
    bare = given("compress", CompressForm("vit", "", "small", 0.5).arguments([])[1:])
    assert bare["data_free"]
    assert bare["no_eval"]
    assert bare["keep"] == 0.5
    assert re.fullmatch(r"small\.calibration-[0-9a-f]{8}\.safetensors", str(form.calibration))
    other = [replace(form, images="others"), replace(form, model="deit"), replace(form, calibration_images=33)]
    assert len({form.calibration, *(one.calibration for one in other)}) == 4  # never taken for each other's
    assert replace(form, share=0.5).calibration == form.calibration
    with pytest.raises(ComcatError, match="no model yet"):
        CompressForm("", "data", "small", 0.5).check()
    with pytest.raises(ComcatError, match="spectrum or uniform"):
        CompressForm("vit", "", "small", 0.5, method="probe").check()


def test_commands_tell_who_listens(monkeypatch):
    heard: list[dict] = []
    monkeypatch.setattr(console, "listeners", [heard.append])
    screen = console.Screen(json_output=True)
    screen.progress("train", 1, 2)
    screen.note("a note")
    screen.warn("careful")
    screen.stage("evaluate")("x", 0, None)
    expected = [{"stage": "train", "done": 1, "total": 2}, {"note": "a note"}, {"note": "warning: careful"}]
    assert heard == [*expected, {"stage": "evaluate", "done": 0, "total": None}]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["customize", "base", "--no-such"], 2, "No such option"),
        (["--version"], 0, None),
    ],
)
def test_a_command_in_a_process_of_its_own(arguments, code, words):
    found = subprocess.run([sys.executable, "-m", "comcat.ui.child", *arguments], capture_output=True, text=True)
    assert found.returncode == code
    events = [json.loads(text) for text in found.stdout.splitlines()]
    assert words is None or words in events[-1]["result"]["error"]


def test_a_process_that_dies(line, tmp_path, monkeypatch):
    job = TrainingJob(Workplace("", tmp_path), "dog", ["customize"])
    monkeypatch.setattr(sys, "executable", "/bin/false")
    line.add(job)
    assert ended(line, job) == FAILED
    assert "comcat customize ended unexpectedly (exit code 1)" in job.message
    assert job.typed == "comcat customize"
