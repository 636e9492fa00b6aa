"""Kinds of files of customization for fuzz.py: adapters, LoRA, checkpoints and photos, on a tiny Stable Diffusion."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from comcat import customize
from damage import damaged_bytes, damaged_json, damaged_safetensors
from fuzz_files import JSON, SAFETENSORS, Kind, rewrite
from fuzz_runs import damage_checkpoint, png

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

LEARN = {"steps": 2, "checkpoint_every": 1, "rank": 1, "resolution": 8, "buckets": 1, "validate_every": 0}
#: What a LoRA's configuration may ask for; and regular expressions that take forever.
PEFT = {"r": 2, "lora_alpha": 4, "alpha_pattern": {"attn1": 2}, "rank_pattern": {}, "use_rslora": False}
SLOW = ["(a+)+$", "(((((a*)*)*)*)*)*b", "(.*)*x", "[", "(?P<x", "*", "a" * 10_000, r"(\w+\.?)+\d$", "^" + "(.*)" * 25]


@lru_cache(maxsize=1)
def pipe() -> Any:
    import diffusion

    return diffusion.pipeline("sd1")


def clean() -> None:
    for name in list(customize.adapters(pipe())):
        customize.remove_adapter(pipe(), name)


def make_adapter(folder: Path) -> None:
    import diffusion

    diffusion.fill(customize.add_adapter(pipe(), rank=1, token="V*", name="dog", text_encoder_rank=1))
    try:
        for storage in ("float32", "int8", "nf4"):
            customize.save_adapter(pipe(), folder / f"{storage}.safetensors", storage=storage)
    finally:
        clean()


def damage_adapter(folder: Path, r: random.Random) -> None:
    """Most without their checksum, as older versions wrote them."""
    file = r.choice(sorted(folder.glob("*.safetensors")))
    for other in folder.iterdir():
        if other != file:
            other.unlink()
    if r.random() < 0.8:
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header["__metadata__"].pop("comcat_sha256")
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    rewrite(file.name, damaged_bytes, *[damaged_safetensors] * 3)(folder, r)


def read_adapter(folder: Path) -> None:
    """Shown, converted and loaded, as the command line does."""
    from comcat.cli.adapter_command import _lines
    from comcat.customize.files.restoring import restore_adapter

    for file in sorted(folder.glob("*.safetensors")):
        header, _ = customize.read_adapter(file)
        _lines(header, "")
        restore_adapter(file, folder / "again", "int8")
        try:
            customize.load_adapter(pipe(), file)
            customize.save_adapter(pipe(), folder / "saved")
        finally:
            clean()


def make_lora(layout: str) -> Any:
    def make(folder: Path) -> None:
        import diffusion

        diffusion.fill(customize.add_adapter(pipe(), rank=1, name="dog"))
        try:
            customize.export_lora(pipe(), folder / "l.safetensors", layout=layout)  # type: ignore[arg-type]
        finally:
            clean()

    return make


def make_peft(folder: Path) -> None:
    """As PEFT saves it: the diffusers names under another prefix, the strength in a file beside it."""
    from safetensors.torch import load_file, save_file

    make_lora("diffusers")(folder)
    tensors = load_file(folder / "l.safetensors")
    renamed = {re.sub("^unet", "base_model.model", name): tensor for name, tensor in tensors.items()}
    save_file({n: t for n, t in renamed.items() if n.startswith("base_model")}, folder / "l.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **PEFT, "alpha_pattern": {}}))


def damage_lora(folder: Path, r: random.Random) -> None:
    file, beside = folder / "l.safetensors", folder / "adapter_config.json"
    if r.random() < 0.6:
        rewrite("l.safetensors", *SAFETENSORS)(folder, r)
        return
    patterns = {"alpha_pattern": {r.choice(SLOW): 3}, "rank_pattern": {r.choice(SLOW): 1}}
    if beside.exists():
        if r.random() < 0.4:
            beside.write_text(json.dumps({**json.loads(beside.read_text()), **patterns}))
        rewrite(beside.name, *JSON)(folder, r)
        return
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    wanted = {f"unet.{key}": value for key, value in {**PEFT, **(patterns if r.random() < 0.4 else {})}.items()}
    text = damaged_json(json.dumps(wanted).encode(), r).decode("utf-8", "surrogatepass")
    header["__metadata__"] = {"lora_adapter_metadata": text}
    encoded = json.dumps(header).encode("utf-8", "surrogatepass")
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


def read_lora(folder: Path) -> None:
    try:
        handle, conversion = customize.import_lora(pipe(), folder / "l.safetensors", rank=2, partial=True)
        json.dumps(conversion.to_dict())
        assert all(tensor.isfinite().all() for tensor in handle.state_dict().values())
        customize.save_adapter(pipe(), folder / "saved", name=handle.name)
    finally:
        clean()


def make_photos(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(i, 16))
    lines = [{"file_name": f"{i}.png", "text": f"a photo of V* {i}"} for i in range(2)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "2.txt").write_text("V* again")


def damage_captions(folder: Path, r: random.Random) -> None:
    file, kind = folder / "metadata.jsonl", r.randrange(8)
    if kind == 0:
        rewrite("2.txt", damaged_bytes)(folder, r)
    elif kind == 1:
        rewrite("metadata.jsonl", damaged_bytes)(folder, r)
    elif kind == 2:
        victim = folder / r.choice(["2.txt", "metadata.jsonl", "0.png"])
        victim.unlink()
        r.choice([lambda: victim.mkdir(), lambda: os.mkfifo(victim), lambda: victim.symlink_to(victim.name)])()
    else:
        lines = file.read_bytes().splitlines()
        lines[0] = damaged_json(lines[0], r)
        file.write_bytes(b"\n".join(lines))


def read_photos(folder: Path) -> None:
    from comcat.customize.teaching.photos import Bucket, find_photos, load_photo

    for photo in find_photos(folder, None, note=lambda text: None):
        load_photo(photo, Bucket(8, 8))


def learn(folder: Path, resume: bool = True) -> None:
    config = customize.CustomizeConfig(**LEARN)
    options: dict[str, Any] = {"out": folder / "run", "resume": resume, "cpu": True, "allow_upscale": True}
    try:
        customize.train(pipe(), folder / "photos", None, config, **options)
    finally:
        clean()


def make_learned(folder: Path) -> None:
    make_photos(folder / "photos")
    learn(folder, resume=False)


ADAPTERS: dict[str, Kind] = {
    "adapter": Kind(make_adapter, damage_adapter, read_adapter),
    "lora-diffusers": Kind(make_lora("diffusers"), damage_lora, read_lora),
    "lora-kohya": Kind(make_lora("kohya"), damage_lora, read_lora),
    "lora-peft": Kind(make_peft, damage_lora, read_lora),
    "photos": Kind(make_photos, rewrite("*", damaged_bytes), read_photos),
    "captions": Kind(make_photos, damage_captions, read_photos),
    "customize-checkpoint": Kind(make_learned, damage_checkpoint("run"), learn),
}
