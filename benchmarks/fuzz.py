"""Feeds damaged files of every kind to comcat: each is read, or refused by a ComcatError, and nothing else happens.

    python benchmarks/fuzz.py --count 10000 --seed 7 --kinds model,plan

A corpus of tiny valid files is made on the fly. Each case damages one of them, its bytes or its structure (with the
checksums made right again for some), and reads it under an alarm, with an audit hook that counts unpickling, sockets,
processes and writes outside the folder, and with the memory watched. Prints a table by kind.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

import comcat
from comcat.errors import ComcatError
from damage import damaged_bytes, damaged_json, damaged_safetensors

ARCHITECTURE = "vit_tiny_patch16_224"
ARGS = {"depth": 2, "embed_dim": 12, "num_heads": 2, "img_size": 8, "patch_size": 4, "num_classes": 5}
SECONDS, MEGABYTES = 10, 2000

# -- kinds of files ---------------------------------------------------------------------------------------------------


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
    from comcat.cli.run import Recipe

    recipe = Recipe.read(folder / "r.yaml")
    comcat.Budget(**recipe.budget)
    comcat.load_model(ARCHITECTURE, model_args=recipe.model_args, pretrained=False)


def make_weights(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(dense().state_dict(), folder / "w.safetensors")


def read_weights(folder: Path) -> None:
    comcat.load_model(ARCHITECTURE, folder / "w.safetensors", ARGS)


def make_photos(folder: Path) -> None:
    from PIL import Image

    for i in range(2):
        Image.new("RGB", (16, 16), (40 * i, 80, 120)).save(folder / f"{i}.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "a photo of V*"}) + "\n")
    (folder / "1.txt").write_text("V* again")


def read_photos(folder: Path) -> None:
    from comcat.customize.photos import Bucket, find_photos, load_photo

    for photo in find_photos(folder, None, note=lambda text: None):
        load_photo(photo, Bucket(8, 8))


SAFETENSORS = (damaged_bytes, damaged_safetensors, damaged_safetensors, damaged_safetensors)
JSON = (damaged_bytes, damaged_json, damaged_json)
KINDS: dict[str, Kind] = {
    "model": Kind(make_model, damage_model, read_model),
    "calibration": Kind(make_calibration, damage_calibration, read_calibration),
    "plan": Kind(make_plan, rewrite("p.json", *JSON), read_plan),
    "latency": Kind(make_latency, damage_latency, read_latency),
    "settings": Kind(make_settings, rewrite("r.yaml", *JSON), read_settings),
    "weights": Kind(make_weights, rewrite("w.safetensors", *SAFETENSORS), read_weights),
    "photos": Kind(make_photos, rewrite("*", damaged_bytes), read_photos),
}


# -- the run ----------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """Raised by the alarm, through every ``except Exception``."""


class Watch:
    """Counts events that reading a file must not cause, while ``armed``. An audit hook cannot be taken off again."""

    def __init__(self, folder: Path) -> None:
        self.allowed, self.armed, self.seen = (
            (str(folder), "/dev/null", "/proc/self"),
            False,
            collections.Counter[str](),
        )
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event in ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"):
            self.seen[event] += 1
        elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            path = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes)) else ""
            if path and not os.path.abspath(path).startswith(self.allowed):
                self.seen[f"writes {path}"] += 1


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def place_of(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/comcat/" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


def fuzz(kind: str, count: int, seed: int, folder: Path, watch: Watch) -> tuple[collections.Counter[str], list[str]]:
    """Counts of accepted, refused, other, hang, memory and events; and what the bad ones were."""
    valid, work = folder / f"{kind}.valid", folder / kind
    valid.mkdir()
    KINDS[kind].make(valid)
    KINDS[kind].read(valid)  # the undamaged files are read, and modules imported, before anything is watched
    counts, bad = collections.Counter[str](), []
    for case in range(count):
        r = random.Random(f"{seed} {kind} {case}")
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(valid, work)
        KINDS[kind].damage(work, r)
        before, watch.armed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, True
        try:
            with alarm(SECONDS):
                KINDS[kind].read(work)
            counts["accepted"] += 1
        except ComcatError:
            counts["refused"] += 1
        except Hang as error:
            counts["hang"] += 1
            bad.append(f"{kind} {case}: hangs at {place_of(error)}")
        except Exception as error:
            counts["other"] += 1
            bad.append(f"{kind} {case}: {type(error).__name__} at {place_of(error)}: {str(error)[:150]}")
        finally:
            watch.armed = False
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > MEGABYTES * 1024:
            counts["memory"] += 1
            bad.append(f"{kind} {case}: more than {MEGABYTES} MB")
    counts["events"] = sum(watch.seen.values())
    bad += [f"{kind}: {event}" for event in watch.seen]
    watch.seen.clear()
    return counts, bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="files over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kinds, failed = options.kinds.split(","), []
    columns = ("accepted", "refused", "other", "hang", "memory", "events")
    print(f"{'kind':<12}{'files':>8}", *(f"{name:>9}" for name in columns))
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(Path(folder))
        for kind in kinds:
            counts, bad = fuzz(kind, options.count // len(kinds), options.seed, Path(folder), watch)
            print(
                f"{kind:<12}{options.count // len(kinds):>8}", *(f"{counts[name]:>9,}" for name in columns), flush=True
            )
            failed += bad
    print(*failed[:100], sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
