"""``comcat demo customize``: a tiny Stable Diffusion learns a digit that it has never seen, in minutes, offline."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from . import options as opt
from .console import Screen, command
from .demo_command import one_thread

if TYPE_CHECKING:
    from ..customize.contest import Outcome

REPORT = "report.json"
SAVED_RANK = 2  # whose adapter file is kept, and stored as int8 too


@command
def demo_customize(
    out: Annotated[Path, opt.Option(metavar="DIR", help="Directory for everything that is made.")] = Path(
        "comcat-demo-customize"
    ),
    digit: Annotated[int, opt.Option(min=0, max=9, help="The digit that the base never sees and V* is to become.")] = 0,
    steps: Annotated[int, opt.Option(min=1, metavar="N", help="Updates of every method.")] = 200,
    cache: Annotated[
        Path | None, opt.Option(metavar="DIR", help="Where the trained base is kept; ~/.cache/comcat.")
    ] = None,
    base_steps: Annotated[
        int, opt.Option(min=0, metavar="N", help="Training of the base; 0: default.", hidden=True)
    ] = 0,
    seed: opt.Seed = 0,
    overwrite: Annotated[bool, opt.Option("--overwrite", help="Replace an earlier demo.")] = False,
    json_output: opt.Json = False,
) -> None:
    """Build a tiny Stable Diffusion of handwritten digits, leave one out, and teach it as V* from five images.

    Compares added products with LoRA at the same size and with full fine-tuning. Needs no network, no GPU and no data.
    """
    screen = Screen(json_output)
    start = time.perf_counter()
    with screen, one_thread():
        from ..customize import digits, digits_cache
        from ..customize.contest import METHODS, Contest
        from ..customize.pipelines import quiet_loading
        from ..storage.atomic import atomic_directory, claimed_output
        from ..storage.owned import CUSTOMIZE_DEMO

        # Everything is made beside DIR and gets its name when all is done.
        with claimed_output(out), atomic_directory(out, overwrite, CUSTOMIZE_DEMO) as stage:
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
            from ..report.figures_customize import draw_contest

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
    _show(screen, outcomes, storage, document)


def _storages(contest: Any, out: Path) -> list[dict[str, Any]]:
    """The saved adapter loaded back from every storage: bytes, largest relative error of a tensor, scores."""
    import torch

    from ..customize.adapter.attached import remove_adapter
    from ..customize.files.adapter_file import load_adapter, read_adapter
    from ..customize.files.restoring import restore_adapter

    rows = []
    _, exact = read_adapter(out / "concept.safetensors")
    for storage in ("float32", "float16", "int8"):
        path = out / (f"concept-{storage}.safetensors" if storage != "float32" else "concept.safetensors")
        if storage != "float32":
            restore_adapter(out / "concept.safetensors", path, storage)
        _, tensors = read_adapter(path)
        off = max(float((tensors[k].float() - t).norm() / t.norm()) for k, t in exact.items() if torch.any(t != 0))
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


def _show(screen: Screen, outcomes: list[Outcome], storage: list[dict[str, Any]], document: dict[str, Any]) -> None:
    from ..customize.contest import PROMPT
    from ..report import customize_pictures as tables

    out, folder = screen.out, Path(document["out"])
    out.print()
    out.print(tables.contest(outcomes, f"{document['steps']} steps on 5 images of the digit {document['digit']}"))
    out.print(tables.storages(storage))
    screen.done(
        f"all of it in {document['seconds']:.0f} s ({document['base_seconds']:.0f} s for the base, which is kept); ",
        "see ",
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
    screen.result(document)
