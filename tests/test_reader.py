"""The one reader: limits, types, and that nothing a file says is done."""

import json
import os
import pickle
import struct
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save

from comcat import CheckpointError, PlanError
from comcat.storage.reader import (
    DEPTH,
    PLAIN,
    parse_json,
    parse_tensors,
    read_bytes,
    read_json,
    read_tensors,
    read_text,
    read_yaml,
    validated,
)


def _safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_only_regular_files_of_the_stated_size_are_read(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    assert read_bytes(file, limit=5) == b"12345"
    (tmp_path / "link").symlink_to(file)
    assert read_bytes(tmp_path / "link", limit=5) == b"12345"
    with pytest.raises(CheckpointError, match="more than the 4"):
        read_bytes(file, limit=4)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name, said in (("pipe", "no regular file"), ("zero", "no regular file"), (".", "is a directory")):
        with pytest.raises(PlanError, match=said):
            read_bytes(tmp_path / name, limit=5, error=PlanError)
    for name in ("loop", "missing", "a\0b", "x" * 300):
        with pytest.raises(CheckpointError, match="cannot read"):
            read_bytes(tmp_path / name, limit=5)


def test_text_is_utf8_with_or_without_a_mark(tmp_path):
    (tmp_path / "a").write_text("\ufeffé", encoding="utf-8")
    assert read_text(tmp_path / "a") == "é"
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        read_text(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply|not valid JSON"),
        ("[" * (DEPTH + 2) + "]" * (DEPTH + 2), "nested too deeply"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ("9" * 5000, "64 bits"),
        (str(2**63), "64 bits"),
        ("1e999", "finite"),
        ("NaN", "no number"),
        ("-Infinity", "no number"),
        ('"\\ud800"', "no text"),
        ('{"\\udfff": 1}', "no text"),
        ("", "not valid JSON"),
    ],
)
def test_json_beyond_the_limits_is_refused(text, said):
    with pytest.raises(PlanError, match=said):
        parse_json(text, "the plan", PlanError)


def test_json_within_the_limits_is_read(tmp_path):
    document = {"a": [1, -(2**63), 2.5, None, True, "é"], "b": {}}
    (tmp_path / "a.json").write_text(json.dumps(document))
    assert read_json(tmp_path / "a.json") == document


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: " + "[" * 3000, "nested too deeply"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("a: 1\na: 2", "'a' is there twice"),
        ("a: 2020-01-01", "holds a date"),
        ("a: 2020-77-01", "not valid YAML"),
        ("a: !!set {b}", "holds a set"),
        ("a: !!binary aGVsbG8=", "holds a bytes"),
        ("a: !!int ''", "not valid YAML"),
        ("a: !!bool maybe", "not valid YAML"),
        ("a: 0x" + "f" * 4000, "64 bits"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: .inf", "finite"),
        ("1: 2", "a field's name is a text"),
        ("? [a, b]\n: c", "not valid YAML"),
        ("a: &m {x: *m}", "too deeply|not valid YAML"),
        ("a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)), "too many values"),
        ("a: " + "[" * 100_000, "nested too deeply"),
        ("? " * 2000, "nested too deeply"),
        ("- " * 2000, "nested too deeply"),
        ("a0: &a0 {x: 1, y: 2}\n" + "".join(
            f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10)), "too many values"),
        ("a: &a 1\nb: [" + ", ".join(["*a"] * 1001) + "]", "too many values"),
    ],
)  # fmt: skip
def test_yaml_beyond_the_limits_is_refused(tmp_path, text, said):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        read_yaml(tmp_path / "a.yaml")


def test_yaml_with_aliases_and_merges_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text("base: &b {x: 1, y: [2.5]}\nother: {<<: *b, x: 3}\n")
    assert read_yaml(tmp_path / "a.yaml") == {"base": {"x": 1, "y": [2.5]}, "other": {"x": 3, "y": [2.5]}}


@dataclass
class _Layer:
    rank: int
    sizes: tuple[int, ...] = ()
    share: float = 0.5


def test_validation_converts_nothing_and_names_the_field():
    read = validated(dict[str, _Layer], {"a": {"rank": 3, "sizes": [1, 2], "share": 1}}, "it", PlanError)
    assert read == {"a": _Layer(3, (1, 2), 1.0)}
    for bad, said in (
        ({"a": {"rank": "3"}}, r"it is damaged: a\.rank is '3', but should be a valid integer"),
        ({"a": {"rank": True}}, "a.rank is True"),
        ({"a": {}}, "a.rank is missing"),
        ({"a": {"rank": 1, "sizes": [1, "x"]}}, r"a\.sizes\.1 is 'x'"),
        ([], r"its content is \[\]"),
    ):
        with pytest.raises(PlanError, match=said):
            validated(dict[str, _Layer], bad, "it", PlanError)


def test_tensors_come_back_with_their_metadata(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.zeros(0, 5), "c": torch.tensor(7), "d": torch.ones(3).bfloat16()}
    (tmp_path / "a.safetensors").write_bytes(save(tensors, {"k": "v"}))
    metadata, read = read_tensors(tmp_path / "a.safetensors")
    assert metadata == {"k": "v"}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no safetensors"),
        (b"\x80\x04\x95" + b"x" * 20, "is a pickle"),
        (b"PK\x03\x04" + b"x" * 20, "is a pickle"),
        (struct.pack("<Q", 2**63) + b"{}", "no safetensors"),
        (_safetensors(b"[" * 100_000), "no safetensors"),
        (_safetensors(b'{"a":' * 100_000), "deeply|not valid JSON"),
        (_safetensors({"a": ENTRY}, bytes(4)), "damaged"),
        (_safetensors({"a": {**ENTRY, "shape": [2**40]}}, bytes(8)), "does not fit"),
        (_safetensors({"a": {**ENTRY, "shape": [0, 2**61], "data_offsets": [0, 0]}}), "does not fit"),
        (_safetensors({"a": {**ENTRY, "shape": [-2]}}, bytes(8)), "damaged"),
        (_safetensors({"a": {**ENTRY, "shape": [True, 2]}}, bytes(8)), "damaged"),
        (_safetensors({"a": {**ENTRY, "data_offsets": None}}, bytes(8)), "damaged"),
        (_safetensors({"a": {**ENTRY, "dtype": "C64", "shape": [1]}}, bytes(8)), "dtype 'C64'"),
        (_safetensors({"a": {**ENTRY, "dtype": "F8_E4M3", "shape": [8]}}, bytes(8)), "dtype 'F8_E4M3'"),
        (_safetensors({"a": ENTRY, "__metadata__": {"k": 1}}, bytes(8)), "texts by name"),
        (_safetensors(json.dumps({"a": ENTRY, "q": ENTRY}).replace("q", "a").encode(), bytes(8)), "twice"),
    ],
)  # fmt: skip
def test_safetensors_beyond_the_limits_are_refused(content, said):
    with pytest.raises(CheckpointError, match=said):
        parse_tensors(content, "the file")


def test_float8_is_read_where_it_is_asked_for():
    content = _safetensors({"a": {**ENTRY, "dtype": "F8_E4M3", "shape": [8]}}, bytes(8))
    _, tensors = parse_tensors(content, "the file", dtypes={*PLAIN, "F8_E4M3"})
    assert tensors["a"].dtype == torch.float8_e4m3fn


def test_a_pickle_under_another_name_is_not_opened(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for write in (lambda f: pickle.dump(Evil(), f), lambda f: torch.save({"a": Evil()}, f)):
        with open(tmp_path / "a.safetensors", "wb") as file:
            write(file)
        with pytest.raises(CheckpointError, match="is a pickle"):
            read_tensors(tmp_path / "a.safetensors")
    assert not (tmp_path / "executed").exists()
