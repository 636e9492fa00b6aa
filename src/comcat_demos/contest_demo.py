"""What ``comcat demo customize`` runs: a tiny Stable Diffusion learns a digit that it has never seen, offline."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comcat.customize import load_adapter, remove_adapter
from comcat.customize.files.restoring import restore_adapter
from comcat.customize.pipelines import quiet_loading
from comcat.storage.atomic import atomic_directory, claimed_output

from . import digits, digits_cache
from .contest import METHODS, PROMPT, Contest, MethodOutcome
from .contest_figure import draw_contest
from .contest_tables import outcomes_table, storages_table
from .layouts import CONTEST_DEMO
from .one_thread import one_thread

if TYPE_CHECKING:
    from comcat.cli.console import Screen

REPORT = "report.json"
SAVED_RANK = 2  # whose adapter file is kept, and stored as int8 too


def run(
    screen: Screen,
    out: Path,
    overwrite: bool,
    *,
    digit: int,
    steps: int,
    cache: Path | None,
    base_steps: int,
    seed: int,
    start: float,
) -> ContestDemo:
    """All of it, made beside ``out`` and given its name when all is done.

    Args:
        base_steps: training of the base; 0 takes the default. start: of the clock, as of :func:`time.perf_counter`.

    Raises:
        ComcatError: ``out`` cannot be written, or a package of the extra ``demo`` is not installed.
    """
    with one_thread(), claimed_output(out), atomic_directory(out, overwrite, CONTEST_DEMO) as stage:
        options = {"steps": base_steps, "vae_steps": base_steps} if base_steps else {}
        pipe = digits_cache.load_or_train(cache, digit, progress=screen.progress, **options)
        trained = time.perf_counter() - start
        with quiet_loading():
            pipe.save_pretrained(stage / "base")
        contest = Contest(pipe, stage, digit, seed, steps)
        contest.prepare()
        outcomes = []
        for method in METHODS:
            kept = method.kind == "comcat" and method.rank == SAVED_RANK
            outcomes.append(contest.run(method, stage / "concept.safetensors" if kept else None, screen.progress))
        storage = _storages(contest, stage)
        draw_contest(outcomes, digits.concept_images(digit, 5, seed=seed), stage / "report.png", digit)
        document = {
            "out": str(out),
            "digit": digit,
            "seed": seed,
            "steps": steps,
            "base_seconds": trained,
            "seconds": time.perf_counter() - start,
            "methods": [outcome.to_dict() for outcome in outcomes],
            "storage": storage,
        }
        (stage / REPORT).write_text(json.dumps(document, indent=1) + "\n")
    return ContestDemo(screen, outcomes, document)


def _storages(contest: Contest, out: Path) -> list[dict[str, Any]]:
    """The saved adapter loaded back from every storage: bytes, relative error of its products, scores."""
    rows = []
    for storage in ("float32", "float16", "int8", "nf4"):
        path = out / (f"concept-{storage}.safetensors" if storage != "float32" else "concept.safetensors")
        off = 0.0
        if storage != "float32":
            off = restore_adapter(out / "concept.safetensors", path, storage)
        handle = load_adapter(contest.pipe, path)
        scores = contest.score()
        remove_adapter(contest.pipe, handle.name)
        rows.append(
            {
                "storage": storage,
                "bytes": path.stat().st_size,
                "error": off,
                "concept": scores.concept,
                "retention": scores.retention,
            }
        )
    return rows


@dataclass(frozen=True)
class ContestDemo:
    """What was measured."""

    screen: Screen
    outcomes: list[MethodOutcome]
    document: dict[str, Any]

    def show(self) -> None:
        """Print it, and how to go on from here."""
        document, out = self.document, self.screen.out
        folder = Path(document["out"])
        out.print()
        out.print(
            outcomes_table(self.outcomes, f"{document['steps']} steps on 5 images of the digit {document['digit']}")
        )
        out.print(storages_table(document["storage"]))
        self.screen.done(
            f"all of it in {document['seconds']:.0f} s ({document['base_seconds']:.0f} s for the base, which is kept)",
            "; see ",
            (folder / "report.png", "bold"),
        )
        base, name = shlex.quote(str(folder / "base")), shlex.quote(str(folder))
        out.print("\nYour turn:", style="bold")
        prompt = shlex.quote(PROMPT)
        for line in (
            f"comcat generate {base} --adapter {name}/concept.safetensors:0.8 --prompt {prompt} --out {name}/images",
            f"comcat customize {base} --images {name}/photos --prompt {prompt} --class-images {name}/class-images "
            "--batch-size 5 --lr 1e-2 --token-lr 0.05 --token-init digit --out mine.safetensors",
            f"comcat adapter merge-report {name}/concept.safetensors --base {base}",
        ):
            out.print(f"  {line}", soft_wrap=True)
        self.screen.result(document)
