"""Photos for customization: captions, decoding, buckets, crops, and every refusal."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from comcat.customize.teaching.photos import find_photos
from comcat.errors import DataError

PROMPT = "a photo of sks dog"


def pixels(height: int = 11, width: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, height: int = 11, width: int = 7, seed: int = 0, **options) -> np.ndarray:
    values = pixels(height, width, seed)
    Image.fromarray(values).save(path, **options)
    return values


def write_metadata(folder: Path, *lines: object) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def refusal(folder: Path, prompt: str | None = PROMPT, **options) -> str:
    with pytest.raises(DataError) as e:
        find_photos(folder, prompt, **options)
    return str(e.value)


# ---- the folder


def test_photos_are_sorted_and_upright_sizes_known(tmp_path):
    for i, name in enumerate(["b.JPG", "a.png", "c.webp", "e.TIF", "d.jpeg", "f.bmp"]):
        save(tmp_path / name, 5 + i, 13)
    (tmp_path / ".hidden.png").write_bytes(b"no image")
    (tmp_path / "sub.png").mkdir()
    save(tmp_path / "sub.png" / "deeper.png")
    notes: list[str] = []
    photos = find_photos(tmp_path, PROMPT, note=notes.append)
    assert [p.path.name for p in photos] == ["a.png", "b.JPG", "c.webp", "d.jpeg", "e.TIF", "f.bmp"]
    assert [p.size for p in photos] == [(6, 13), (5, 13), (7, 13), (9, 13), (8, 13), (10, 13)]
    assert {p.caption for p in photos} == {PROMPT}
    assert [note for note in notes if "'sub.png'" not in note] == []


def test_ignored_files_are_noted(tmp_path):
    save(tmp_path / "a.png")
    for name in ("x.heic", "readme.txt", "metadata.csv", "a.txt"):
        (tmp_path / name).write_text("words")
    notes: list[str] = []
    find_photos(tmp_path, PROMPT, note=notes.append)
    assert len(notes) == 1
    assert "'metadata.csv', 'readme.txt', 'x.heic'" in notes[0]
    assert "a.txt" not in notes[0]
    find_photos(tmp_path, PROMPT)  # nobody has to listen


def test_what_is_no_file_is_noted(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "1_dog").mkdir()
    os.mkfifo(tmp_path / "b.png")
    notes: list[str] = []
    find_photos(tmp_path, PROMPT, note=notes.append)
    assert len(notes) == 1
    assert "'1_dog', 'b.png'" in notes[0]


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.tiff"])
def test_of_several_images_the_first_is_used(tmp_path, name):
    frames = [Image.new("RGB", (11, 7), color) for color in ("red", "blue", "green")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    notes: list[str] = []
    assert len(find_photos(tmp_path, PROMPT, note=notes.append)) == 1
    assert notes == [f"of '{name}', which holds 3 images, the first one is used"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "a.png")
    assert len(find_photos(Path("~"), PROMPT)) == 1


def test_missing_folder(tmp_path):
    assert f"there is no folder {tmp_path / 'gone'}" in refusal(tmp_path / "gone")


def test_file_for_folder(tmp_path):
    save(tmp_path / "a.png")
    assert "is a file. Give the folder" in refusal(tmp_path / "a.png")


def test_empty_folder(tmp_path):
    assert "is empty" in refusal(tmp_path)
    (tmp_path / ".DS_Store").touch()
    assert "is empty" in refusal(tmp_path)


def test_folder_without_images_says_what_it_holds(tmp_path):
    for name in ("a.heic", "b.heic", "c.mov", "d.mov"):
        (tmp_path / name).touch()
    (tmp_path / "dogs").mkdir()
    message = refusal(tmp_path)
    assert "'a.heic', 'b.heic', 'c.mov' and 2 more" in message
    assert ".jpg" in message


def test_folder_of_folders_says_so(tmp_path):
    (tmp_path / "dogs").mkdir()
    save(tmp_path / "dogs" / "a.png")
    assert "it holds 'dogs'" in refusal(tmp_path)


def test_unreadable_folder(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root
    assert f"permission denied). Check its permissions: ls -ld {tmp_path}" in refusal(tmp_path)


def test_unlistable_folder(tmp_path, monkeypatch):
    def refuse(self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert "Input/output error" in refusal(tmp_path)


# ---- captions


def test_captions_from_sidecars(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.c.png")
    (tmp_path / "a.txt").write_text("\ufeff a dog\r\n  on \t grass é\n", encoding="utf-8")
    (tmp_path / "b.c.txt").write_text("a cat")
    assert [p.caption for p in find_photos(tmp_path, None)] == ["a dog on grass é", "a cat"]
    assert [p.caption for p in find_photos(tmp_path, PROMPT)] == ["a dog on grass é", "a cat"]


def test_captions_from_metadata(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        save(tmp_path / name)
    write_metadata(
        tmp_path,
        {"file_name": "b.png", "caption": "second\u2028b"},
        "",
        {"file_name": "./a.png", "text": " first ", "prompt": "not this"},
        {"file_name": "c.png", "prompt": "third", "more": 1},
        "",
    )
    photos = find_photos(tmp_path, PROMPT)
    assert [p.caption for p in photos] == ["first", "second b", "third", PROMPT]


def test_prompt_fills_in_where_there_is_no_caption(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path / name)
    (tmp_path / "b.txt").write_text("own")
    write_metadata(tmp_path, {"file_name": "c.png", "text": "listed"})
    assert [p.caption for p in find_photos(tmp_path, PROMPT)] == [PROMPT, "own", "listed"]


def test_no_caption(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png", "e.png"):
        save(tmp_path / name)
    (tmp_path / "c.txt").write_text("own")
    message = refusal(tmp_path, None)
    assert "no caption for 'a.png', 'b.png', 'd.png' and 1 more" in message
    assert "--prompt" in message
    assert "a.txt" in message
    assert "metadata.jsonl" in message


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_empty_prompt(tmp_path, prompt):
    save(tmp_path / "a.png")
    assert "the prompt is empty" in refusal(tmp_path, prompt)


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_empty_sidecar(tmp_path, text):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(text)
    assert "'a.txt' is empty" in refusal(tmp_path)


def test_two_captions(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "one"})
    assert "'a.png' has two captions, in 'a.txt' and metadata.jsonl" in refusal(tmp_path)


def test_sidecar_in_another_encoding(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    message = refusal(tmp_path)
    assert "a.txt cannot be read (not UTF-8 text)" in message


def test_unreadable_sidecar(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a dog")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("comcat.storage.reader.os.open", refuse)
    assert "a.txt cannot be read (Permission denied)" in refusal(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "null",
        "3",
        '"a.png"',
        {"text": "a dog"},
        {"file_name": None, "text": "a dog"},
        {"file_name": ["a.png"], "text": "a dog"},
        {"file_name": "a.png"},
        {"file_name": "a.png", "text": None},
        {"file_name": "a.png", "text": 3},
        {"file_name": "a.png", "text": ["a", "dog"]},
    ],
)
def test_malformed_metadata(tmp_path, line):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    write_metadata(tmp_path, {"file_name": "b.png", "text": "a cat"}, "", line)
    message = refusal(tmp_path)
    assert f"line 3 of {tmp_path / 'metadata.jsonl'} is malformed" in message
    assert '"file_name"' in message


def test_empty_caption_in_metadata(tmp_path):
    save(tmp_path / "a.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": " "})
    assert "line 1 of" in (message := refusal(tmp_path))
    assert "empty caption" in message


@pytest.mark.parametrize("name", ["gone.png", "sub/a.png", "A.png", "", "/a.png", "notes.md"])
def test_metadata_names_no_photo(tmp_path, name):
    save(tmp_path / "a.png")
    (tmp_path / "notes.md").touch()
    write_metadata(tmp_path, {"file_name": "a.png", "text": "a dog"}, {"file_name": name, "text": "a dog"})
    message = refusal(tmp_path)
    assert "line 2 of" in message
    assert f"names {name!r}, which is no photo" in message


def test_metadata_names_a_photo_twice(tmp_path):
    save(tmp_path / "a.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "a dog"}, {"file_name": "./a.png", "text": "a cat"})
    assert "line 2 of" in (message := refusal(tmp_path))
    assert "for the second time" in message


# ---- corrupt photos


def truncated(path: Path, keep: float = 0.6, **options) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels(61, 53)).save(buffer, format=path.suffix[1:].replace("jpg", "jpeg"), **options)
    data = buffer.getvalue()
    path.write_bytes(data[: int(keep * len(data))])


def test_truncated_jpeg(tmp_path):
    truncated(tmp_path / "x.jpg")
    save(tmp_path / "y.jpg")
    assert refusal(tmp_path) == (
        "the photo 'x.jpg' cannot be read (image file is truncated). "
        "Repair or remove it, or leave such photos out: --skip-bad-images"
    )


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("keep", [0.05, 0.6, 0.9])
def test_truncated_in_other_formats(tmp_path, suffix, keep):
    truncated(tmp_path / f"x.{suffix}", keep)
    assert f"the photo 'x.{suffix}' cannot be read (" in refusal(tmp_path)


def test_bad_photos_are_left_out_and_noted(tmp_path):
    truncated(tmp_path / "a.jpg")
    (tmp_path / "b.png").write_bytes(b"words")
    (tmp_path / "c.png").touch()
    (tmp_path / "d.png").symlink_to(tmp_path / "gone.png")
    save(tmp_path / "e.png")
    notes: list[str] = []
    photos = find_photos(tmp_path, PROMPT, skip_bad=True, note=notes.append)
    assert [p.path.name for p in photos] == ["e.png"]
    assert notes == [
        "left out: the photo 'a.jpg' cannot be read (image file is truncated)",
        "left out: the photo 'b.png' cannot be read (not an image)",
        "left out: the photo 'c.png' cannot be read (the file is empty)",
        "left out: the photo 'd.png' cannot be read (No such file or directory)",
    ]


def test_no_photo_is_left(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"words")
    assert "none of the photos in" in (message := refusal(tmp_path, skip_bad=True))
    assert "'a.png', 'b.png'" in message


def test_decompression_bomb(tmp_path, monkeypatch):
    save(tmp_path / "a.png", 11, 13)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 71)
    assert "too many pixels to be decoded safely; make it smaller" in refusal(tmp_path)
    assert "none of the photos" in refusal(tmp_path, skip_bad=True)


def test_merely_large_photos_are_read_without_a_warning(tmp_path, monkeypatch):
    save(tmp_path / "a.png", 11, 13)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert find_photos(tmp_path, PROMPT)[0].size == (11, 13)


def test_lack_of_memory_is_no_fault_of_the_photo(tmp_path, monkeypatch):
    def refuse(*_):
        raise MemoryError

    save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(MemoryError):
        find_photos(tmp_path, PROMPT, skip_bad=True)
