"""Kinds of files of runs for fuzz.py: settings in YAML, checkpoints, what a run wrote, and data to read images from."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import comcat
from damage import damaged_bytes, damaged_json, damaged_safetensors, damaged_yaml
from fuzz_files import ARCHITECTURE, ARGS, JSON, Kind, dense, rewrite

DATA = {"input_size": (3, 8, 8)}
SEARCH = {"epochs": 1.0, "candidates": 2, "checkpoint_every": 1, "lr": 0.05}
TUNE = {"epochs": 1, "max_steps": 2, "checkpoint_every": 1, "distillation": "none", "ema": 0.9, "warmup_epochs": 0}


def settings(make: dict[str, Any], read: Callable[[Path], object]) -> Kind:
    """A YAML file."""
    return Kind(
        lambda folder: (folder / "s.yaml").write_text(json.dumps(make)),
        rewrite("s.yaml", *JSON, damaged_yaml),
        lambda folder: read(folder / "s.yaml"),
    )


def read_recipe(file: Path) -> None:
    from comcat.cli.run_command import Recipe

    recipe = Recipe.read(file)
    comcat.Budget(**recipe.budget)
    comcat.load_model(ARCHITECTURE, model_args=recipe.model_args, pretrained=False)


def read_finetune(file: Path) -> None:
    from comcat.cli.finetune_command import merge
    from comcat.training.settings import read_yaml

    merge({}, read_yaml(file))


def read_search(file: Path) -> None:
    from comcat.cli.searching import read_config

    read_config(file, {})


def read_customize(file: Path) -> None:
    from comcat.cli.customize_command import settings_of

    settings_of({}, file)


def damage_checkpoint(run: str) -> Callable[[Path, random.Random], None]:
    """The newest checkpoint of ``folder/run``; most with checksums that are right."""

    def damage(folder: Path, r: random.Random) -> None:
        step = r.choice(sorted((folder / run / "checkpoints").iterdir()))
        file = r.choice(sorted(step.glob("*.safetensors")))
        document = json.loads((step / "state.json").read_text())
        kind = r.randrange(8)
        if kind == 0:
            rewrite("*", damaged_bytes)(step, r)
            return
        if kind <= 3:
            content = damaged_safetensors(file.read_bytes(), r)
            file.write_bytes(content)
            sha = hashlib.sha256(content).hexdigest()
            document["state"]["files"][file.name] = {"bytes": len(content), "sha256": sha}
        elif kind <= 6:
            try:
                document["state"] = json.loads(damaged_json(json.dumps(document["state"]).encode(), r))
            except (ValueError, RecursionError):
                document["state"] = {}
        else:
            file.unlink()
            file.symlink_to(r.choice(["/etc/hostname", "/dev/zero", file.name]))
        text = json.dumps(document["state"], sort_keys=True)
        document["sha256"] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        (step / "state.json").write_text(json.dumps(document))
        for other in step.parent.iterdir():
            if other != step:
                shutil.rmtree(other)

    return damage


def labelled() -> DataLoader[Any]:
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x, torch.arange(16) % 5), batch_size=8, shuffle=True)


def tune(folder: Path, resume: bool = True) -> None:
    model = comcat.load(folder / "m")
    config = comcat.FinetuneConfig(**TUNE)
    comcat.finetune(model, None, labelled(), None, config, out=folder / "run", resume=resume, cpu=True)


def make_tuned(folder: Path) -> None:
    model = dense()
    comcat.save(comcat.compress(model, comcat.plan(model, comcat.Budget(params=0.6))), folder / "m")
    tune(folder, resume=False)


def searched(folder: Path, resume: bool = True) -> None:
    calibration = comcat.Calibration.load(folder / "c.safetensors")
    budget, config = comcat.Budget(params=0.6), comcat.SearchConfig(**SEARCH)
    options: dict[str, Any] = {"calibration": calibration, "out": folder / "run", "resume": resume, "cpu": True}
    comcat.search(dense(), budget, labelled(), config, rank_multiple=1, **options)


def make_searched(folder: Path) -> None:
    comcat.calibrate(dense(), [labelled().dataset.tensors[0]]).save(folder / "c.safetensors")  # type: ignore[attr-defined]
    searched(folder, resume=False)


def make_manifest(folder: Path) -> None:
    from comcat.storage.manifest import Manifest

    (folder / "run").mkdir()
    Manifest(folder / "run").write("metrics.jsonl", b"{}\n")
    (folder / "outside.txt").write_text("the user's")


def read_manifest(folder: Path) -> None:
    """Whatever the list says, what is outside the run's directory stays."""
    from comcat.storage.manifest import Manifest
    from comcat.training import state

    run = folder / "run"
    try:
        manifest = Manifest(run)
        for name in list(manifest.files):
            manifest.remove(name)
        manifest.write("search.jsonl", b"{}\n")
        state.remove(run)
    finally:
        assert (folder / "outside.txt").exists()


def damage_manifest(folder: Path, r: random.Random) -> None:
    file = folder / "run" / ".comcat-run.json"
    if r.random() < 0.5:
        name = r.choice(["../outside.txt", "/etc/hostname", "..", ".", "", "a\0b", "x" * 5000, "checkpoints"])
        document = json.loads(file.read_text())
        document["comcat_files"][name] = r.choice([None, "", hashlib.sha256(b"the user's").hexdigest()])
        file.write_text(json.dumps(document))
    else:
        rewrite("run/.comcat-run.json", *JSON)(folder, r)


def png(seed: int, side: int = 8) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(3 * side * side)).save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(folder: Path) -> None:
    for split in ("train", "validation"):
        for label in range(2):
            place = folder / "data" / split / f"c{label}"
            place.mkdir(parents=True)
            for i in range(2):
                (place / f"{i}.png").write_bytes(png(i))


def make_parquet(folder: Path) -> None:
    import datasets

    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    (folder / "data" / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        rows = {"image": [{"bytes": png(i), "path": f"{i}.png"} for i in range(4)], "label": [i % 2 for i in range(4)]}
        file = folder / "data" / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(file)


def read_data(folder: Path) -> None:
    from comcat.data import load_dataset, loader

    for split in ("train", "validation"):
        for _ in loader(load_dataset(str(folder / "data"), split, DATA, root=str(folder / "cache")), 4, 0):
            pass


def damage_parquet(folder: Path, r: random.Random) -> None:
    """Half of them in the footer, which says what the file holds."""
    file = r.choice(sorted(folder.rglob("*.parquet")))
    content = file.read_bytes()
    if r.random() < 0.5:
        cut = len(content) - r.randrange(1, min(1500, len(content)))
        file.write_bytes(content[:cut] + damaged_bytes(content[cut:], r))
    else:
        file.write_bytes(damaged_bytes(content, r))


RUNS: dict[str, Kind] = {
    "recipe": settings({"model": ARCHITECTURE, "model_args": ARGS, "budget": {"params": 0.5}, "search": SEARCH,
                        "compress": {"parts": ["qk", "ffn"]}, "finetune": TUNE}, read_recipe),
    "finetune-settings": settings({**TUNE, "lr": 0.001, "mixup": 0.1, "feature_blocks": [0, -1]}, read_finetune),
    "search-settings": settings({**SEARCH, "temperature": [5.0, 1.0]}, read_search),
    "customize-settings": settings({"steps": 3, "rank": 2, "lr": 0.001, "flip": 0.5}, read_customize),
    "finetune-checkpoint": Kind(make_tuned, damage_checkpoint("run"), tune),
    "search-checkpoint": Kind(make_searched, damage_checkpoint("run"), searched),
    "manifest": Kind(make_manifest, damage_manifest, read_manifest),
    "images": Kind(make_folder, rewrite("data/*/*/*.png", damaged_bytes), read_data),
    "parquet": Kind(make_parquet, damage_parquet, read_data),
}  # fmt: skip
