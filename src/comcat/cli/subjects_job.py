"""A recipe of ``comcat run`` that teaches and judges many subjects: DreamBench."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from .console import Screen
from .inputs import Reading, parse_device

#: By which such a recipe is told from one that compresses.
MARK = "base"


def check_options(given: Mapping[str, Any], reading: Reading) -> None:
    """Refuse options of recipes that compress.

    Args:
        given: option -> its value, None where it was not given.
    """
    named = next((name for name, value in given.items() if value is not None), None)
    if named is None and reading != Reading(reading.data):
        named = "how images are read"
    if named is not None:
        raise typer.BadParameter("belongs to recipes that compress a model", param_hint=named)


def run_subjects(
    screen: Screen,
    file: Path,
    values: Mapping[str, Any],
    data: Path,
    out: Path,
    *,
    batch_size: int | None,
    device: str,
    seed: int,
) -> None:
    """Teach and judge what ``data`` has photos of, as the recipe in ``file`` says."""
    from ..customize.judging.jury import open_encoders
    from ..customize.judging.subject_benchmark import RESULT, SubjectRecipe, find_subjects, run_benchmark
    from ..customize.pipelines import open_pipeline
    from ..errors import TrainingError
    from ..report.judge_table import benchmark_tables
    from ..training.process import process_count
    from .making import told

    if process_count() > 1:
        raise TrainingError("subjects are taught one after the other; start this recipe without accelerate launch")
    recipe = SubjectRecipe.of(values, f"the recipe '{file}'")
    place = parse_device("cpu" if device == "cpu" else "auto")
    subjects = find_subjects(recipe, data, screen.note)
    if recipe.config.precision == "fp16" and place.type == "cpu":
        raise TrainingError("precision fp16 needs a GPU; use bf16 or no")
    with told(screen):
        encoders = open_encoders(recipe.dino, recipe.clip, str(place))
        pipe = open_pipeline(recipe.base, recipe.config.precision, place, None, screen.note)
        found = run_benchmark(
            recipe,
            pipe,
            encoders,
            subjects,
            data,
            out,
            batch_size=batch_size or 4,
            seed=seed,
            cpu=place.type == "cpu",
            progress=screen.progress,
            note=screen.note,
        )
    screen.out.print(benchmark_tables(found))
    screen.done((out / RESULT, "bold"))
    screen.result({"out": str(out), **found.to_dict()})
