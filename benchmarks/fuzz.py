"""Feeds damaged files of every kind to comcat: each is read, or refused by a ComcatError, and nothing else happens.

    python benchmarks/fuzz.py --count 10000 --seed 7 --kinds model,plan

A corpus of tiny valid files is made on the fly. Each case damages one of them, its bytes or its structure (with the
checksums made right again for some), and reads it under an alarm, with an audit hook that counts unpickling, sockets,
processes and writes outside the folder, and with the memory watched. Prints a table by kind.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from comcat.errors import ComcatError
from fuzz_adapters import ADAPTERS
from fuzz_files import FILES
from fuzz_runs import RUNS

KINDS = {**FILES, **RUNS, **ADAPTERS}
SECONDS, MEGABYTES = 20, 2000


class Hang(BaseException):
    """Raised by the alarm, through every ``except Exception``."""


class Watch:
    """Counts events that reading a file must not cause, while ``armed``. An audit hook cannot be taken off again."""

    def __init__(self, folder: Path) -> None:
        home = os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
        cache = os.environ.get("HF_DATASETS_CACHE", os.path.join(home, "datasets"))  # where parquet becomes tables
        self.allowed = (str(folder), "/dev/null", "/proc/self", cache)
        self.armed, self.seen = False, collections.Counter[str]()
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
