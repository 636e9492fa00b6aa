"""What ``comcat demo customize`` runs: a tiny Stable Diffusion learns digits that it has never seen, offline."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comcat.customize import load_adapter, remove_adapter
from comcat.customize.files.restoring import restore_adapter
from comcat.customize.pipelines import quiet_loading
from comcat.errors import ComcatError
from comcat.storage.atomic import atomic_directory, claimed_output

from . import digits_cache, scenes
from .contest import PROMPT, TOKEN, MethodOutcome
from .contest_figure import draw_contest
from .contest_tables import outcomes_table, storages_table
from .digits import WORDS
from .layouts import CONTEST_DEMO
from .one_thread import one_thread
from .scene_contest import METHODS, SceneContest
from .scenes import Scene

if TYPE_CHECKING:
    from comcat.cli.console import Screen

REPORT = "report.json"
SAVED_RANK = 2  # whose adapter file is kept, and stored as int8 too
_ASKED = Scene(None, "red", "left", 2)  # of the adapter, in the commands to go on with


def run(
    screen: Screen,
    out: Path,
    overwrite: bool,
    *,
    taught: Sequence[int],
    steps: int,
    cache: Path | None,
    base_steps: int,
    seed: int,
    start: float,
) -> ContestDemo:
    """All of it, made beside ``out`` and given its name when all is done.

    Args:
        taught: the digits that the base never sees.
        base_steps: training of the base; 0 takes the default. start: of the clock, as of :func:`time.perf_counter`.

    Raises:
        ComcatError: ``out`` cannot be written, a package of the extra ``demo`` is not installed, or no digit is left
            to the base.
    """
    left_out = sorted(set(taught))
    if not scenes.known(left_out):
        raise ComcatError("the base needs a digit to learn; leave out fewer than all ten")
    with one_thread(), claimed_output(out), atomic_directory(out, overwrite, CONTEST_DEMO) as stage:
        options = {"steps": base_steps, "vae_steps": base_steps} if base_steps else {}
        pipe = digits_cache.load_or_train_scenes(cache, left_out, progress=screen.progress, **options)
        trained = time.perf_counter() - start
        with quiet_loading():
            pipe.save_pretrained(stage / "base")
        outcomes: dict[int, list[MethodOutcome]] = {}
        storage = []
        for digit in left_out:
            contest = SceneContest(pipe, stage / WORDS[digit], digit, left_out, seed, steps)
            contest.prepare()
            outcomes[digit] = []
            for method in METHODS:
                kept = method.kind == "comcat" and method.rank == SAVED_RANK
                save = contest.folder / "concept.safetensors" if kept else None
                outcomes[digit].append(contest.run(method, save, screen.progress))
            storage += _storages(contest)
        photos = {d: [image for image, _ in scenes.concept_photos(d, seed=seed)] for d in left_out}
        draw_contest(outcomes, photos, stage / "report.png")
        document = {
            "out": str(out),
            "digits": left_out,
            "seed": seed,
            "steps": steps,
            "base_seconds": trained,
            "seconds": time.perf_counter() - start,
            "methods": [{"digit": d, **outcome.to_dict()} for d, found in outcomes.items() for outcome in found],
            "storage": storage,
        }
        (stage / REPORT).write_text(json.dumps(document, indent=1) + "\n")
    return ContestDemo(screen, outcomes, document)


def _storages(contest: SceneContest) -> list[dict[str, Any]]:
    """The saved adapter loaded back from every storage: bytes, relative error of its products, scores."""
    rows, out = [], contest.folder
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
                "digit": contest.digit,
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
    outcomes: dict[int, list[MethodOutcome]]
    document: dict[str, Any]

    def show(self) -> None:
        """Print it, and how to go on from here."""
        document, out = self.document, self.screen.out
        folder = Path(document["out"])
        out.print()
        names = " and ".join(WORDS[digit] for digit in document["digits"])
        out.print(outcomes_table(self.outcomes, f"{document['steps']} steps on 5 single images of {names}"))
        out.print(storages_table(document["storage"]))
        self.screen.done(
            f"all of it in {document['seconds']:.0f} s ({document['base_seconds']:.0f} s for the base, which is kept)",
            "; see ",
            (folder / "report.png", "bold"),
        )
        base = shlex.quote(str(folder / "base"))
        name = shlex.quote(str(folder / WORDS[document["digits"][0]]))
        images = shlex.quote(str(folder / "images"))
        out.print("\nYour turn:", style="bold")
        prompt, asked = shlex.quote(PROMPT), shlex.quote(_ASKED.caption(TOKEN))
        for line in (
            f"comcat generate {base} --adapter {name}/concept.safetensors:0.8 --prompt {asked} --out {images}",
            f"comcat customize {base} --images {name}/photos --prompt {prompt} --class-images {name}/class-images "
            "--batch-size 5 --lr 1e-2 --token-lr 0.05 --token-init digit --out mine.safetensors",
            f"comcat adapter merge-report {name}/concept.safetensors --base {base}",
        ):
            out.print(f"  {line}", soft_wrap=True)
        self.screen.result(document)
