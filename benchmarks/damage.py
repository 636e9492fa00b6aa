"""Seeded damage to bytes, plain documents and safetensors files, for fuzz.py."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

NASTY: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-300, float("nan"), float("inf"), "", "x", "1",
    "../../x", "/etc/passwd", "hf-hub:evil/model", "os.system", "\ud800", "a\0b", "%s{0}", "[/bold]", "x" * 100_000, [],
    {}, [[]], [None], {"a": 1}, [1, 2, 3], [-1], {"": None}, "vit_huge_patch14_224", 1000, 4096, "(a+)+$",
]  # fmt: skip


def damaged_bytes(content: bytes, r: random.Random) -> bytes:
    """Flips, cuts, insertions, zeros, copies within, or noise."""
    b, n = bytearray(content), len(content)
    if n == 0:
        return r.randbytes(9)
    i, length = r.randrange(n), r.choice([1, 8, 64, 200])
    kind = r.randrange(8)
    if kind == 0:
        b[i] ^= 1 << r.randrange(8)
    elif kind == 1:
        b[i % min(n, 3000)] ^= 1 << r.randrange(8)
    elif kind == 2:
        del b[i:]
    elif kind == 3:
        b[i : i + length] = bytes(min(length, n - i))
    elif kind == 4:
        j = r.randrange(n)
        b[i : i + length] = b[j : j + length]
    elif kind == 5:
        b[i:i] = r.randbytes(length)
    elif kind == 6:
        b = bytearray(r.randbytes(r.choice([0, 1, 7, 8, 9, 100, 5000])))
    else:
        b[i] = r.choice(b'0123456789-.{}[]",:eEnNtf')
    return bytes(b)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*path, key))


def damaged_plain(document: Any, r: random.Random) -> Any:
    """Values replaced, dropped, renamed, or copied to another place."""
    document = copy.deepcopy(document)
    for _ in range(r.choice([1, 1, 1, 2, 3])):
        paths = list(_paths(document))
        if not paths:
            break
        path = r.choice(paths)
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        key, kind = path[-1], r.randrange(6)
        if kind <= 2:
            parent[key] = copy.deepcopy(r.choice(NASTY))
        elif kind == 3:
            del parent[key]
        elif kind == 4 and isinstance(parent, dict):
            parent[r.choice(["x", "", "../x", "__class__", "pretrained", "checkpoint_path"])] = parent.pop(key)
        elif isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
            parent[key] = r.choice([parent[key] + 1, -parent[key], parent[key] * 1000, str(parent[key]), 10**400])
        else:
            parent[key] = [parent[key]]
    return document


def damaged_json(content: bytes, r: random.Random) -> bytes:
    text = json.dumps(damaged_plain(json.loads(content), r))
    extreme = r.randrange(40)
    if extreme == 0:
        text = "[" * 100_000 + text
    elif extreme == 1:
        text = text.replace("1", "9" * 5000, 1)
    elif extreme == 2:
        text = text.replace("1", "1e999", 1)
    elif extreme == 3:
        text = text.replace("{", '{"a": 1, "a": 2, ', 1)
    return text.encode("utf-8", "surrogatepass")


def damaged_safetensors(content: bytes, r: random.Random) -> bytes:
    """Header entries that lie, other dtypes and shapes, metadata of all kinds, or pickles' first bytes."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name, kind = r.choice(names), r.randrange(10)
    entry = header[name]
    if kind == 0:
        return struct.pack("<Q", r.choice([0, 1, 2**20, 2**32, 2**63, len(content)])) + content[8:]
    if kind == 1:
        return r.choice([b"\x80\x04\x95", b"PK\x03\x04"]) + content[4:8] + b"c" + content[9:]
    if kind == 2:
        entry["shape"] = r.choice([[2**40], [-1], [0], [], [1] * 100, ["a"], None, entry["shape"][::-1], [2**63]])
    elif kind == 3:
        entry["dtype"] = r.choice(["F16", "BF16", "F64", "I8", "BOOL", "F8_E4M3", "C64", "X", None, 5, "I32"])
    elif kind == 4:
        entry["data_offsets"] = r.choice(
            [[0, 2**60], [-4, 4], [8, 4], None, [0], header[r.choice(names)]["data_offsets"]]
        )
    elif kind == 5:
        header[r.choice(["x", "../x", "", "a::b", f"{name}.lora_A.weight"])] = header.pop(name)
    elif kind == 6:  # dropped whole, its bytes too
        begin, end = entry["data_offsets"]
        data = data[:begin] + data[end:]
        del header[name]
        for other in names:
            if other in header and header[other]["data_offsets"][0] >= end:
                header[other]["data_offsets"] = [n - end + begin for n in header[other]["data_offsets"]]
    elif kind == 7:
        begin, end = entry["data_offsets"]
        data = (
            data[:begin] + (r.choice([b"\xff", b"\x00\x00\xc0\x7f", b"\0"]) * (end - begin))[: end - begin] + data[end:]
        )
    else:
        metadata = header.get("__metadata__") or {}
        for key, text in metadata.items():
            with suppress(ValueError):
                metadata[key] = damaged_json(json.dumps(json.loads(text)).encode(), r).decode("utf-8", "surrogatepass")
        if not metadata or kind == 8:
            header["__metadata__"] = r.choice([None, [], {}, {"comcat": 5}, {"comcat": "[" * 100_000}])
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


#: YAML beyond JSON: tags, aliases that multiply or lead back, and what its types make of a text.
_YAML = (
    "!!python/object/apply:os.system ['true']", "a: !!python/name:os.system\n", "a: &m {x: *m}\n", "a: " + "[" * 3000,
    "a: &n0 [x]\n" + "".join(f"a{i}: &n{i} [{','.join([f'*n{i - 1}'] * 9)}]\n" for i in range(1, 9)),
    "&a a: &b [1]\n", "1: 2\n", "? [a, b]\n: c\n", "lr: 2020-01-01\n", "budget: !!set {params}\n", "lr: {<<: 5}\n",
    "lr: 0x" + "f" * 4000 + "\n", "lr: 190:20:30\n", "model: !!binary aGVsbG8=\n", "lr: 1\nlr: 2\n", "lr: .inf\n",
    "lr: " + "9" * 400 + "\n", "? " * 2000, "- " * 2000, "a: *nothing\n", "%YAML 9.9\n---\na: 1\n", "a: 1\n---\na: 2\n",
    "<<: [{a: 1}, {b: 2}]\n", "a: !!float 'x'\n", "a: !!int ''\n", "a: !!timestamp x\n", "a: !!omap [1]\n",
)  # fmt: skip


def damaged_yaml(content: bytes, r: random.Random) -> bytes:
    """YAML that JSON cannot say, alone or after the document's fields."""
    extra = r.choice(_YAML)
    return (content[:-1] + b", b: " + extra.encode() + b"}") if r.random() < 0.3 else extra.encode()
