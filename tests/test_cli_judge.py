"""``comcat judge`` as somebody uses it: a table, a JSON document, and one line for what cannot be done."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from comcat_demos import digits
from test_cli import Result
from test_judge import place as place  # a fixture


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    digits.build().save_pretrained(folder)
    return folder


def asked(base: Path, place: Path, out: Path, *more: Any) -> list[Any]:
    return ["judge", base, "--images", place / "photos", "--out", out, *more]


QUICK = ["--prompt", "a photo of {}", "--seeds", "0-1", "--steps", 1, "--device", "cpu"]


def test_judging_and_again(base: Path, place: Path, tmp_path: Path, sockets_blocked: list[Any]) -> None:
    (tmp_path / "rest.txt").write_text("a photo of the digit two\n\nthe digit nine\n")
    adapters = ["--adapter", f"{place / 'one.safetensors'}:0.5", "--adapter", f"{place / 'two.safetensors'},token=W*"]
    more = ["--retention-prompts", tmp_path / "rest.txt", *QUICK, "--class-word", "digit"]
    options = [*adapters, *more, "--dino", place / "dino"]
    shown = Result(asked(base, place, tmp_path / "out", *options))
    assert shown.code == 0, shown.err
    text = " ".join(shown.out.split())
    for part in ("kept DINO", "one:0.5", "3 photos, each to all others", "not measured: CLIP-T, which needs --clip",
                 "class 'digit'; prompts: 1 with the subject, 2 without; 2 seeds each", "base's", "grid"):  # fmt: skip
        assert part in text
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*seed*.png")}
    assert len(before) == 3 * 3 * 2
    again = Result(asked(base, place, tmp_path / "out", *options, "--json"))
    document = json.loads(again.out)
    assert again.code == 0
    assert document["rows"][2]["subject"] == "W* digit"
    assert document["rows"][1]["scores"]["dino"]["low"] <= document["rows"][1]["scores"]["dino"]["mean"]
    assert document["missing"]["CLIP-I"] == "needs --clip"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*seed*.png")} == before
    other = Result(asked(base, place, tmp_path / "out", *options, "--steps", 2))
    assert other.code == 1
    assert "drawn with steps 1, not 2; give --overwrite" in other.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing can be measured without an encoder. Give --dino for concept fidelity"),
        (["--dino", "nowhere/at/all"], "the encoder of --dino 'nowhere/at/all' cannot be used"),
        (
            ["--clip", "DINO"],
            "the encoder of --clip .* cannot be used: .*no model of images and text.*Give openai/clip",
        ),
        (["--dino", "DINO", "--images", "nowhere"], "there is no folder nowhere"),
        (["--dino", "DINO", "--prompt", "a dog"], "must speak of the subject once"),
        (["--dino", "DINO", "--prompts", "nowhere.txt"], "there is no file nowhere.txt. Correct --prompts"),
        (["--dino", "DINO", "--out", "PHOTOS"], "holds something else than a judgement"),
        (["--dino", "DINO", "--adapter", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_refusals(base: Path, place: Path, tmp_path: Path, options: list[Any], message: str) -> None:
    names = {"DINO": place / "dino", "PHOTOS": place / "photos"}
    given = [names.get(option, option) for option in options]
    result = Result(asked(base, place, tmp_path / "out", "--adapter", place / "one.safetensors", *QUICK, *given))
    assert result.code == 1
    assert result.out == ""
    assert re.search(message, result.err), result.err
    assert not (tmp_path / "out").exists()


def test_a_mask(base: Path, place: Path, tmp_path: Path) -> None:
    options = ["--adapter", f"{place / 'one.safetensors'}:0.5@left.png", "--dino", place / "dino"]
    result = Result(asked(base, place, tmp_path / "out", *options))
    assert result.code == 2
    assert "has a mask, and adapters are judged on whole pictures; leave @left.png out" in result.err


def test_a_mistyped_precision(base: Path, place: Path, tmp_path: Path) -> None:
    options = ["--adapter", place / "one.safetensors", "--dino", place / "dino", "--precision", "fp8"]
    result = Result(asked(base, place, tmp_path / "out", *options))
    assert result.code == 2
    assert "'fp8' is not one of no, bf16, fp16" in result.err
