"""``comcat run``: a recipe from the dense model to the fine-tuned small one, or of many subjects, in one command."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .config_options import reads_images
from .console import Screen, command, main_process_speaks
from .inputs import Reading, ReadingOf, check_input_file, parse_count, parse_device
from .subjects_job import MARK, check_options, run_subjects

if TYPE_CHECKING:
    from ..planning.plan import Budget

COMPRESSED, FINETUNED, PLAIN = "compressed", "finetuned", "stock"
_SECTIONS = ("model", "model_args", "budget", "compress", "search", "finetune", "batch_size", "metric", "stock")
_LATENCY = ("latency_batch", "runtime", "precision", "threads")
_COMPRESS = ("method", "parts", "rank_multiple", "calibration_images", *_LATENCY)


@dataclass(frozen=True)
class Recipe:
    """A recipe file: the model, its budget, and the settings of every stage as plain data.

    Attributes:
        metric: ``module:function`` that scores before and after, in place of the outputs' kind.
        stock: whether the small model is of the dense one's own class, so that its library loads it without comcat.

    Raises:
        TrainingError: a section or setting that does not exist, or of the wrong kind.
    """

    model: str
    budget: dict[str, Any]
    model_args: dict[str, Any] = field(default_factory=dict)
    compress: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    metric: str | None = None
    stock: bool = False

    def __post_init__(self) -> None:
        from ..errors import ComcatError, TrainingError
        from ..planning.plan import UNITS
        from ..rank_search.search_config import SearchConfig
        from ..training.settings import check_fields
        from .finetune_command import merge

        for name in ("budget", "model_args", "compress", "search", "finetune"):
            if not isinstance(getattr(self, name), dict):
                raise TrainingError(f"the recipe's '{name}' must hold settings, one a line, such as 'epochs: 30'")
        check_fields(self.budget, list(UNITS))
        check_fields(self.compress, list(_COMPRESS))
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise TrainingError(f"the recipe's batch_size is {self.batch_size!r}, but must be a number of images")
        if self.metric is not None and not isinstance(self.metric, str):
            raise TrainingError(f"the recipe's metric is {self.metric!r}, but must be a text such as mine:iou")
        if not isinstance(self.stock, bool):
            raise TrainingError(f"the recipe's stock is {self.stock!r}, but must be true or false")
        if self.stock and self.method == "search":
            raise TrainingError(
                "the recipe's stock model has one width for all layers, and learned ranks differ; "
                "leave 'search' or 'stock' out"
            )
        parts = self.compress.get("parts", [])
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise TrainingError(f"the recipe's parts are {parts!r}, but must be a list such as [qk, vo, ffn]")
        # Every stage's settings are checked here: the last one begins hours after the first.
        for name, check in (("search", SearchConfig.from_dict), ("finetune", partial(merge, {}))):
            if "seed" in getattr(self, name):
                raise TrainingError(f"the recipe's '{name}' sets a seed; leave it out and give --seed")
            try:
                check(getattr(self, name))
            except ComcatError as error:
                raise TrainingError(f"the recipe's '{name}': {error}") from error

    @property
    def method(self) -> str | None:
        """How ranks are chosen; learned where there are settings for that."""
        return self.compress.get("method", "search" if self.search else None)

    @classmethod
    def read(cls, file: Path) -> Recipe:
        """From a YAML file."""
        from ..errors import TrainingError
        from ..training.settings import check_fields, read_yaml

        values = read_yaml(file)
        check_fields(values, list(_SECTIONS))
        missing = [name for name in ("model", "budget") if name not in values]
        if missing:
            raise TrainingError(f"the recipe '{file}' names no {' and no '.join(missing)}; see the folder recipes")
        return cls(**values)


@command
@reads_images
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see the folder recipes.")],
    data: opt.Data,
    out: Annotated[
        Path,
        opt.Option(metavar="DIR", help="Gets compressed/ and finetuned/, or a folder for each subject."),
    ],
    resume: Annotated[bool, opt.Option("--resume", help="Continue the run in --out where it was interrupted.")] = False,
    keep: Annotated[
        float | None, opt.Option(metavar="F", help="Fraction of the parameters, in place of the recipe's budget.")
    ] = None,
    max_params: Annotated[
        str | None, opt.Option(metavar="N", help="Parameters, e.g. 11M, in place of the recipe's budget.")
    ] = None,
    checkpoint: opt.Checkpoint = None,
    train_split: Annotated[
        str | None, opt.Option(help="Split to search and train on; train.", rich_help_panel=opt.DATA)
    ] = None,
    eval_split: opt.EvalSplit = None,
    eval_images: opt.EvalImages = None,
    reading_of: ReadingOf = Reading,
    batch_size: Annotated[
        int | None, opt.Option(min=1, help="Images of one process; the recipe's.", rich_help_panel=opt.RUN)
    ] = None,
    workers: opt.Workers = None,
    device: opt.TrainingDevice = "auto",
    seed: opt.Seed = 0,
    json_output: opt.Json = False,
) -> None:
    """Compress and fine-tune a model as RECIPE says, or teach and judge the subjects of a benchmark.

    Under [bold]accelerate launch -m comcat run ...[/bold] it runs on many GPUs and machines.

    [dim]comcat run recipes/deit_small.yaml --data imagenet/ --out deit-small-half[/dim]
    """
    if keep is not None and max_params is not None:
        raise typer.BadParameter("give at most one of --keep and --max-params", param_hint="budget")
    if device not in ("auto", "cpu"):
        raise typer.BadParameter(
            "takes auto or cpu; choose GPUs with CUDA_VISIBLE_DEVICES or accelerate launch", param_hint="--device"
        )
    most = parse_count(max_params, "--max-params")
    from ..training.process import process_index, wait_for_everyone

    rank = process_index()
    screen = Screen(json_output or rank > 0)
    with screen, main_process_speaks(rank) as started:
        from ..planning.plan import Budget
        from ..training.settings import read_yaml

        check_input_file(recipe, "RECIPE")
        check_input_file(checkpoint, "--checkpoint")
        reading, values = reading_of(data), read_yaml(recipe)
        if MARK in values:
            others = {"--keep": keep, "--max-params": max_params, "--checkpoint": checkpoint, "--workers": workers}
            others |= {"--train-split": train_split, "--eval-split": eval_split, "--eval-images": eval_images}
            check_options(others, reading)
            _check_out(out, resume)
            run_subjects(screen, recipe, values, Path(data), out, batch_size=batch_size, device=device, seed=seed)
            return
        plan = Recipe.read(recipe)
        params = most if keep is None else keep
        budget = Budget(**plan.budget) if params is None else Budget(params=params)
        _check_out(out, resume)
        stages = _Stages(
            screen,
            replace(plan, batch_size=batch_size or plan.batch_size),
            budget,
            reading,
            out,
            resume,
            checkpoint,
            (train_split, eval_split),
            eval_images,
            workers,
            device,
            seed,
        )
        if (out / COMPRESSED).is_dir():
            stages.check_compressed()
        started.append(True)
        if not (out / COMPRESSED).is_dir():
            stages.compress()
        wait_for_everyone()
        stages.finetune()
    if rank == 0:
        stages.show()


def _check_out(out: Path, resume: bool) -> None:
    from ..errors import TrainingError

    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"'{out}' already holds something; continue with --resume or choose another --out")
    if resume and not out.is_dir():
        raise TrainingError(f"there is no run in '{out}' to resume; start without --resume")


@dataclass
class _Stages:
    screen: Screen
    recipe: Recipe
    budget: Budget
    reading: Reading
    out: Path
    resume: bool
    checkpoint: Path | None
    splits: tuple[str | None, str | None]
    eval_images: int | None
    workers: int | None
    device: str
    seed: int

    def check_compressed(self) -> None:
        """Raise TrainingError if what an earlier start compressed had another budget or form."""
        from ..errors import TrainingError
        from ..planning.plan import Plan
        from ..storage.atomic import CONFIG_NAME

        if self.recipe.stock == (self.out / COMPRESSED / CONFIG_NAME).exists():
            form = "with" if self.recipe.stock else "without"
            raise TrainingError(f"'{self.out / COMPRESSED}' was not made {form} 'stock: true'; use another --out")
        made = Plan.load(self.out / COMPRESSED / "plan.json").budget
        asked = {self.budget.unit: self.budget.value, "of": self.budget.of}
        if made != asked:
            raise TrainingError(
                f"'{self.out / COMPRESSED}' was made for the budget {made}, not {asked}; use that one, or another --out"
            )

    def compress(self) -> None:
        """Calibrate, choose ranks, write ``compressed/``."""
        from ..training import state
        from .compress_job import CompressJob
        from .compress_settings import CompressSettings
        from .judging import Judging
        from .searching import Search, read_config
        from .timings import LatencyWanted

        recipe, made = self.recipe, self.recipe.compress
        folder = self.out / "search"
        target = parse_device(self.device)
        search = None
        if recipe.method == "search":
            search = Search(
                config=read_config(None, {**recipe.search, "seed": self.seed}),
                folder=folder,
                resume=self.resume and bool(state.checkpoints(folder)),
                split=self.splits[0],
                batch_size=recipe.batch_size,
                workers=self.workers,
                cpu=target.type == "cpu",
            )
        settings = CompressSettings(
            model=recipe.model,
            out=self.out / COMPRESSED,
            overwrite=False,
            method=recipe.method,
            parts=tuple(made["parts"]) if "parts" in made else None,
            rank_multiple=made.get("rank_multiple"),
            # Kept, so that a resumed search goes on with the same timings.
            latency=LatencyWanted(
                self.out / "latency.json" if self.budget.unit == "latency" else None,
                made.get("latency_batch"),
                made.get("runtime"),
                made.get("precision", "fp32"),
                made.get("threads"),
            ),
            calibration_images=made.get("calibration_images"),
            calibration_file=None,
            fisher=None,
            data_free=False,
            evaluate=True,
            calibration_split=self.splits[0],
            eval_split=self.splits[1],
            eval_images=self.eval_images,
            batch_size=min(recipe.batch_size, 64),
            workers=self.workers,
            seed=self.seed,
            search=search,
            judging=Judging(recipe.metric),
            stock=recipe.stock,
        )
        job = CompressJob(self.screen, settings, self.reading, self.budget, None)
        job.load(self.checkpoint, recipe.model_args, target)
        job.open_data()
        job.run()
        job.show()

    def finetune(self) -> None:
        """Train what is in ``compressed/``, write ``finetuned/``."""
        from ..training import state
        from .finetune_command import merge
        from .finetune_job import FinetuneJob, FinetuneOptions

        config, augmentation = merge({"seed": self.seed}, self.recipe.finetune)
        target = self.out / FINETUNED
        options = FinetuneOptions(
            model=self.out / COMPRESSED,
            out=target,
            resume=self.resume and bool(state.checkpoints(target)),
            teacher=self.recipe.model,
            teacher_checkpoint=self.checkpoint,
            teacher_args=self.recipe.model_args,
            train_split=self.splits[0],
            eval_split=self.splits[1],
            eval_images=self.eval_images,
            evaluate=True,
            batch_size=self.recipe.batch_size,
            workers=self.workers,
            cpu=self.device == "cpu",
            keep_checkpoints=False,
            metric=self.recipe.metric,
            plain=self.out / PLAIN if self.recipe.stock else None,
        )
        self.job = FinetuneJob(self.screen, options, self.reading, config, augmentation)
        self.job.prepare()
        self.job.run()

    def show(self) -> None:
        """Print what came of it."""
        self.job.show()
