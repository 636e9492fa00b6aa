"""One adapter for each of many subjects, all judged alike: DreamBench, or subjects of the user's own.

    OUT/benchmark.json            the recipe that the adapters were taught by
    OUT/base/                     pictures of the base, shared by the subjects of a class
    OUT/SUBJECT/adapter.safetensors, adapter.run/, training.json, judged/

What is there is not made again, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict

from ...errors import DataError, TrainingError
from ...progress import Progress
from ...storage.atomic import atomic_file, claimed_output
from ...storage.reader import read_json, validated
from ...training import state
from ...training.settings import check_fields
from ...wording import some
from ..adapter.attached import remove_adapter
from ..adapter.words import has_token
from ..files.adapter_file import write_adapter
from ..files.header import Storage
from ..teaching.customize_config import CustomizeConfig
from ..teaching.material import Note
from ..teaching.teach import CLASS_IMAGES, finish, train
from .contestants import Contestant
from .encoders import ImageEncoder
from .judge import BASE, judge
from .judgement import KINDS, Judgement
from .metrics import Estimate, estimate
from .prompt_lists import PLACE, dreambench

ADAPTER, RECIPE, TRAINING, RESULT = "adapter", "benchmark.json", "training.json", "dreambench.json"


@dataclass(frozen=True)
class SubjectRecipe:
    """How every subject is taught and judged.

    Attributes:
        base, dino, clip: as for ``comcat judge``; one of the encoders may be left out.
        subjects: name of a folder -> class; those of DreamBench by default.
        subject: what it is called, with {} for the class; token: the word of it that is learned; None: none is.
        caption: of all photos, with {} for the subject.
        class_caption: what prior preservation draws, with {} for the class; None: no prior preservation.
        customize: settings of ``comcat customize``; storage: of the adapters.
        seeds, steps, guidance: of the pictures. prompts, retention_prompts: in place of the package's.

    Raises:
        DataError, TrainingError: a setting that cannot be.
    """

    base: str
    dino: str | None = None
    clip: str | None = None
    subjects: dict[str, str] = field(default_factory=lambda: dict(dreambench()["subjects"]))
    subject: str = "V* {}"
    token: str | None = "V*"
    caption: str = "a photo of {}"
    class_caption: str | None = "a photo of a {}"
    customize: dict[str, Any] = field(default_factory=dict)
    storage: Storage = "float16"
    allow_upscale: bool = False
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    steps: int | None = None
    guidance: float | None = None
    prompts: tuple[str, ...] | None = None
    retention_prompts: tuple[str, ...] | None = None
    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        if not self.subjects:
            raise DataError("the recipe names no subjects; write a line such as 'mug: cup' for each, or leave it out")
        if any("/" in name or name.startswith(".") for name in self.subjects):
            raise DataError("a subject is the name of a folder in DATA, without slashes")
        for name in ("subject", "caption", "class_caption"):
            text = getattr(self, name)
            if text is not None and text.count(PLACE) != 1:
                raise DataError(f"the recipe's {name} is {text!r}, but must hold {{}} once, as in 'a photo of a {{}}'")
        if self.token is not None and not has_token(self.subject, self.token):
            raise DataError(f"the recipe's subject {self.subject!r} does not have its token {self.token!r}")
        if "seed" in self.customize:
            raise TrainingError("the recipe's 'customize' sets a seed; leave it out and give --seed")
        _ = self.config

    @classmethod
    def of(cls, values: Mapping[str, Any], what: str) -> SubjectRecipe:
        """From the plain data of a recipe; ``what`` names it in messages."""
        check_fields(values, [f.name for f in fields(cls)])
        made: SubjectRecipe = validated(cls, dict(values), what, TrainingError)
        return made

    @property
    def config(self) -> CustomizeConfig:
        """The training of one adapter."""
        return CustomizeConfig.from_dict({"token": self.token, **self.customize})

    def training(self) -> dict[str, Any]:
        """What the adapters of a run must have in common, as plain data."""
        kept = ("base", "subject", "caption", "class_caption", "token", "customize", "storage", "allow_upscale")
        plain: dict[str, Any] = json.loads(json.dumps({name: getattr(self, name) for name in kept}))
        return plain


@dataclass(frozen=True)
class BenchmarkResult:
    """
    Attributes:
        judgements: by subject; subjects: how many the benchmark has in all.
        seconds: of the training of each adapter, where it ran through in one go.
    """

    judgements: dict[str, Judgement]
    subjects: int
    seconds: dict[str, float]

    def mean(self, row: int) -> dict[str, Estimate]:
        """Means over the subjects of the base (0) or the adapters (1), with intervals by bootstrap over subjects."""
        tables = [judgement.rows[row].scores for judgement in self.judgements.values()]
        names = [name for name in (*KINDS, "clip_t_rest") if all(name in table for table in tables)]
        return {name: estimate(torch.tensor([[table[name].mean] for table in tables])) for name in names}

    def ceiling(self) -> dict[str, float]:
        """Mean over the subjects of what their photos reach."""
        tables = [judgement.ceiling for judgement in self.judgements.values()]
        names = [name for name in tables[0] if all(name in table for table in tables)]
        return {name: sum(table[name] for table in tables) / len(tables) for name in names}

    def to_dict(self) -> dict[str, Any]:
        first = next(iter(self.judgements.values()))
        return {
            "subjects": len(self.judgements),
            "subjects_of_the_benchmark": self.subjects,
            "encoders": first.encoders,
            "missing": first.missing,
            "intervals": "95 %, bootstrap over subjects; within a subject over prompts and seeds",
            "mean": {
                name: {key: found.to_dict() for key, found in self.mean(row).items()}
                for row, name in enumerate((BASE, ADAPTER))
            },
            "ceiling": self.ceiling(),
            "train_seconds": self.seconds,
            "by_subject": {name: judgement.to_dict() for name, judgement in self.judgements.items()},
        }


def find_subjects(recipe: SubjectRecipe, data: Path, note: Note) -> dict[str, str]:
    """Name -> class of the subjects that ``data`` has photos of.

    Raises:
        DataError: it has none of them.
    """
    if not data.is_dir():
        raise DataError(f"there is no folder {data}; give the one that holds a folder of photos for each subject")
    found = {name: kind for name, kind in recipe.subjects.items() if (data / name).is_dir()}
    others = sorted(f.name for f in data.iterdir() if f.is_dir() and f.name not in found and f.name[0] != ".")
    if not found:
        raise DataError(
            f"{data} has folders of none of the subjects ({some(recipe.subjects)}); give the one that holds them, or "
            "write your own with their classes under 'subjects' in the recipe"
        )
    if others:
        note(f"no subjects of the recipe, and left out: {', '.join(others)}")
    if len(found) < len(recipe.subjects):
        note(f"{len(found)} of the {len(recipe.subjects)} subjects are in {data}; the result is of those")
    return found


def run_benchmark(
    recipe: SubjectRecipe,
    pipe: Any,
    encoders: Mapping[str, ImageEncoder],
    subjects: Mapping[str, str],
    data: Path,
    out: Path,
    *,
    batch_size: int = 4,
    seed: int = 0,
    cpu: bool = False,
    progress: Progress | None = None,
    note: Note = lambda _: None,
) -> BenchmarkResult:
    """Teach and judge every subject; ``out`` may hold a part of it already.

    Raises:
        TrainingError: what is in ``out`` was taught by another recipe.
    """
    judgements: dict[str, Judgement] = {}
    seconds: dict[str, float] = {}
    with claimed_output(out):
        _check_same(out / RECIPE, {**recipe.training(), "seed": seed})
        for number, (name, class_word) in enumerate(subjects.items(), 1):
            try:
                prefix = f"{name} ({number}/{len(subjects)})"
                told = _prefixed(progress, prefix)
                drawn = _class_images(subjects, name, out)
                _teach(recipe, pipe, name, class_word, data, out, drawn, seed, cpu, told, note)
                one = Contestant.read(out / name / f"{ADAPTER}.safetensors")
                took = read_json(out / name / TRAINING)["seconds"]
                if took is not None:
                    seconds[name] = took
                judgements[name] = judge(
                    pipe,
                    [replace(one, seconds=took)],
                    data / name,
                    out=out / name / "judged",
                    **encoders,  # type: ignore[arg-type]
                    class_word=class_word,
                    subject=recipe.subject.replace(PLACE, class_word),
                    prompts=recipe.prompts,
                    retention_prompts=recipe.retention_prompts,
                    seeds=recipe.seeds,
                    steps=recipe.steps,
                    guidance_scale=recipe.guidance,
                    batch_size=batch_size,
                    base_pictures=out / BASE,
                    progress=told,
                )
            except KeyboardInterrupt as interrupt:
                done = f"{len(judgements)} of {len(subjects)} subjects are done"
                interrupt.args = (f"{done}, and a part of {name}; continue with --resume",)
                raise
        result = BenchmarkResult(judgements, len(recipe.subjects), seconds)
        with atomic_file(out / RESULT) as file:
            file.write((json.dumps(result.to_dict(), indent=1) + "\n").encode())
    return result


def _teach(
    recipe: SubjectRecipe,
    pipe: Any,
    name: str,
    class_word: str,
    data: Path,
    out: Path,
    class_images: Path | None,
    seed: int,
    cpu: bool,
    progress: Progress | None,
    note: Note,
) -> None:
    """Write the adapter of a subject, unless it is there."""
    folder = out / name
    file, run = folder / f"{ADAPTER}.safetensors", folder / f"{ADAPTER}.run"
    if file.is_file() and (folder / TRAINING).is_file():
        return
    resume = bool(state.checkpoints(run))
    start = time.perf_counter()
    handle = train(
        pipe,
        data / name,
        recipe.caption.replace(PLACE, recipe.subject.replace(PLACE, class_word)),
        replace(recipe.config, seed=seed),
        name=ADAPTER,
        class_prompt=recipe.class_caption.replace(PLACE, class_word) if recipe.class_caption else None,
        class_images=class_images,
        out=run,
        resume=resume,
        allow_upscale=recipe.allow_upscale,
        cpu=cpu,
        progress=progress,
        note=note,
    )
    took = None if resume else time.perf_counter() - start
    try:
        handle.info["base"] = recipe.base
        write_adapter(handle, file, recipe.storage)
    finally:
        remove_adapter(pipe, ADAPTER)
    with atomic_file(folder / TRAINING) as target:
        target.write((json.dumps({"seconds": took}) + "\n").encode())
    finish(run)


def _class_images(subjects: Mapping[str, str], name: str, out: Path) -> Path | None:
    """Those that the first subject of the class has drawn; None for that one itself, which draws them."""
    first = next(other for other, kind in subjects.items() if kind == subjects[name])
    folder = out / first / f"{ADAPTER}.run" / CLASS_IMAGES
    return None if first == name or not folder.is_dir() else folder


def _check_same(path: Path, wanted: Mapping[str, Any]) -> None:
    if not path.is_file():
        with atomic_file(path) as file:
            file.write((json.dumps(wanted, indent=1) + "\n").encode())
        return
    kept = read_json(path, what="recipe of the benchmark", error=TrainingError)
    kept = kept if isinstance(kept, dict) else {}
    other = [name for name in wanted if kept.get(name) != wanted[name]]
    if other:
        raise TrainingError(
            f"the adapters in '{path.parent}' were taught with {other[0]} {kept.get(other[0])!r}, not "
            f"{wanted[other[0]]!r}; use that recipe, or another --out"
        )


def _prefixed(progress: Progress | None, prefix: str) -> Progress | None:
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{prefix}: {stage}", done, total)
