"""Kills and threads while files are written: what a reader finds is old or new and whole, and no junk stays.

    python benchmarks/crash.py [--kills 40] [--seconds 10]

The table has one row per scenario: how often the old and the new content was found, anything else (which must be 0),
and what the next good run left behind (which must be 0 too).
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import comcat

ARGS = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 5}


def dense() -> torch.nn.Module:
    torch.manual_seed(0)
    return comcat.load_model("vit_tiny_patch16_224", model_args=ARGS, pretrained=False).eval()


def child(work: Callable[[], object], after: float | None = None, at_event: int | None = None) -> bool:
    """Run in a process of its own, killed after so many seconds or at that file event; whether it was killed."""
    pid = os.fork()
    if pid == 0:
        if at_event is not None:
            _die_at(at_event)
        work()
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def _die_at(event: int) -> None:
    import sys

    seen = [0]

    def hook(name: str, args: tuple[object, ...]) -> None:
        writes = name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or name in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "fcntl.flock"):
            if seen[0] == event:
                os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1

    sys.addaudithook(hook)


def kills(
    folder: Path, old: Callable[[], object], new: Callable[[], object], look: Callable[[], str], count: int, seed: int
) -> None:
    """Random kills, then one at every file event."""
    start = time.perf_counter()
    child(new)
    whole, chance = time.perf_counter() - start, random.Random(seed)
    for label, moments in (("random", range(count)), ("every file event", range(10**6))):
        found: collections.Counter[str] = collections.Counter()
        for moment in moments:
            old()
            if label == "random":
                child(new, after=chance.uniform(0, whole))
            elif not child(new, at_event=moment):
                break
            found[look()] += 1
        new()
        row(f"{folder.name}, SIGKILL at {label}", found, junk(folder))


def row(label: str, found: collections.Counter[str], left: list[str]) -> None:
    bad = {what: n for what, n in found.items() if what not in ("old", "new")}
    print(f"| {label} | {found['old']} | {found['new']} | {bad or 0} | {left or 0} |", flush=True)


def junk(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def threads(folder: Path, save: Callable[[int], object], look: Callable[[], str], seconds: float) -> None:
    """Eight threads that save one path, and a reader."""
    found: collections.Counter[str] = collections.Counter()
    saves: collections.Counter[str] = collections.Counter()
    stop = threading.Event()

    def work(index: int) -> None:
        while not stop.is_set():
            try:
                save(index)
                saves["saved"] += 1
            except Exception as error:
                saves[f"{type(error).__name__}: {error}"] += 1

    save(0)
    workers = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for worker in workers:
        worker.start()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        found[look()] += 1
    stop.set()
    for worker in workers:
        worker.join()
    row(f"{folder.name}, 8 threads: {dict(saves)}", found, junk(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = dense()
    ranks = {2: "old", 3: "new"}
    small = {n: comcat.compress(model, comcat.Plan({"head": {"rank": n}})) for n in ranks}
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    calibration = comcat.calibrate(model, [images])
    larger = replace(calibration, images=torch.cat([images] * 8))
    print("| scenario | old | new | anything else | junk after the next good run |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for kind in ("model", "calibration"):
            (Path(name) / kind).mkdir()
        path, file = Path(name) / "model" / "out", Path(name) / "calibration" / "out"

        def look_at_model() -> str:
            try:
                return ranks[comcat.load(path).comcat.plan.layers["head"]["rank"]]
            except Exception as error:
                return f"{type(error).__name__}: {str(error)[:80]}"

        def look_at_file() -> str:
            try:
                return "old" if len(comcat.Calibration.load(file).images) == len(images) else "new"
            except Exception as error:
                return f"{type(error).__name__}: {str(error)[:80]}"

        def save(rank: int) -> None:
            comcat.save(small[rank], path, overwrite=True)

        kills(path.parent, lambda: save(2), lambda: save(3), look_at_model, options.kills, 1)
        kills(file.parent, lambda: calibration.save(file), lambda: larger.save(file), look_at_file, options.kills, 2)
        threads(path.parent, lambda i: save(2 + i % 2), look_at_model, options.seconds)
        threads(file.parent, lambda i: (calibration, larger)[i % 2].save(file), look_at_file, options.seconds)


if __name__ == "__main__":
    main()
