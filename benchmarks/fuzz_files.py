"""Kinds of files of the compression side for fuzz.py: how valid ones are made, damaged and read."""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

import comcat
from damage import damaged_bytes, damaged_json, damaged_safetensors

ARCHITECTURE = "vit_tiny_patch16_224"
ARGS = {"depth": 2, "embed_dim": 12, "num_heads": 2, "img_size": 8, "patch_size": 4, "num_classes": 5}


class Kind(NamedTuple):
    """``make`` writes valid files into a folder, ``damage`` changes one of them, ``read`` reads them."""

    make: Callable[[Path], None]
    damage: Callable[[Path, random.Random], None]
    read: Callable[[Path], object]


def rewrite(name: str, *how: Callable[[bytes, random.Random], bytes]) -> Callable[[Path, random.Random], None]:
    def damage(folder: Path, r: random.Random) -> None:
        file = r.choice(sorted(folder.glob(name)))
        file.write_bytes(r.choice(how)(file.read_bytes(), r))

    return damage


def dense() -> torch.nn.Module:
    torch.manual_seed(0)
    return comcat.load_model(ARCHITECTURE, model_args=ARGS, pretrained=False).eval()


def batches() -> list[torch.Tensor]:
    return [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))]


def make_model(folder: Path) -> None:
    model = dense()
    comcat.save(comcat.compress(model, comcat.plan(model, comcat.Budget(params=0.6))), folder / "m")


def damage_model(folder: Path, r: random.Random) -> None:
    tensors, config = folder / "m" / "model.safetensors", folder / "m" / "comcat.json"
    kind = r.randrange(8)
    if kind == 7:
        tensors.unlink()
        os.mkfifo(tensors) if r.random() < 0.5 else tensors.symlink_to("/dev/zero")
    elif kind >= 5:  # damaged tensors whose checksum is right
        content = damaged_safetensors(tensors.read_bytes(), r)
        tensors.write_bytes(content)
        data = json.loads(config.read_text())
        data["tensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        config.write_text(json.dumps(data))
    elif kind >= 2:  # a description without its checksum, as older versions wrote it
        data = json.loads(config.read_text())
        data["tensors"].pop("description", None)
        config.write_bytes(damaged_json(json.dumps(data).encode(), r))
    else:
        rewrite("m/*", damaged_bytes)(folder, r)


def read_model(folder: Path) -> None:
    with torch.no_grad():
        comcat.load(folder / "m")(torch.zeros(1, 3, 8, 8))


def make_calibration(folder: Path) -> None:
    comcat.calibrate(dense(), batches(), fisher=True, probe_images=2).save(folder / "c.safetensors")


def damage_calibration(folder: Path, r: random.Random) -> None:
    """Half of the files are without their checksum, as older versions wrote them."""
    file = folder / "c.safetensors"
    if r.random() < 0.5:
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        meta = json.loads(header["__metadata__"]["comcat_calibration"])
        meta.pop("sha256")
        header["__metadata__"]["comcat_calibration"] = json.dumps(meta)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    rewrite("c.safetensors", *SAFETENSORS)(folder, r)


def read_calibration(folder: Path) -> None:
    calibration, model = comcat.Calibration.load(folder / "c.safetensors"), dense()
    comcat.compress(model, comcat.plan(model, comcat.Budget(params=0.6), calibration), calibration)


def make_plan(folder: Path) -> None:
    comcat.plan(dense(), comcat.Budget(params=0.6)).save(folder / "p.json")


def read_plan(folder: Path) -> None:
    plan = comcat.Plan.load(folder / "p.json")
    comcat.compress(dense(), plan)
    plan.save(folder / "again.json")


def make_latency(folder: Path) -> None:
    comcat.measure_latency(dense(), 1).save(folder / "l.json")


def damage_latency(folder: Path, r: random.Random) -> None:
    data = json.loads((folder / "l.json").read_text())
    data.pop("sha256", None)
    (folder / "l.json").write_text(json.dumps(data))
    rewrite("l.json", damaged_bytes, damaged_json, damaged_json)(folder, r)


def read_latency(folder: Path) -> None:
    table = comcat.LatencyTable.load(folder / "l.json")
    with suppress(comcat.BudgetError):  # so small a model may have no time to save
        comcat.plan(dense(), comcat.Budget(latency=0.8), latency=table)


def make_settings(folder: Path) -> None:
    sections = {"budget": {"params": 0.5}, "compress": {}, "finetune": {"epochs": 3, "lr": 0.001, "ema": 0.9}}
    (folder / "r.yaml").write_text(json.dumps({"model": ARCHITECTURE, "model_args": ARGS, **sections}))


def read_settings(folder: Path) -> None:
    from comcat.cli.run_command import Recipe

    recipe = Recipe.read(folder / "r.yaml")
    comcat.Budget(**recipe.budget)
    comcat.load_model(ARCHITECTURE, model_args=recipe.model_args, pretrained=False)


def make_weights(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(dense().state_dict(), folder / "w.safetensors")


def read_weights(folder: Path) -> None:
    comcat.load_model(ARCHITECTURE, folder / "w.safetensors", ARGS)


SAFETENSORS = (damaged_bytes, damaged_safetensors, damaged_safetensors, damaged_safetensors)
JSON = (damaged_bytes, damaged_json, damaged_json)
FILES: dict[str, Kind] = {
    "model": Kind(make_model, damage_model, read_model),
    "calibration": Kind(make_calibration, damage_calibration, read_calibration),
    "plan": Kind(make_plan, rewrite("p.json", *JSON), read_plan),
    "latency": Kind(make_latency, damage_latency, read_latency),
    "settings": Kind(make_settings, rewrite("r.yaml", *JSON), read_settings),
    "weights": Kind(make_weights, rewrite("w.safetensors", *SAFETENSORS), read_weights),
}
