"""One run of ``comcat finetune``: load, check, train, write, show."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, ModelError
from .console import Screen
from .inputs import Reading, report_skipped
from .making import made_with

if TYPE_CHECKING:
    from torch import nn

    from ..data.training_set import Augmentation
    from ..training.finetune_config import FinetuneConfig
    from ..training.finetuning import FinetuneResult

#: Left beside the model, its log and, on request, its checkpoints.
DOCUMENT = "finetune.json"


@dataclass(frozen=True)
class FinetuneOptions:
    """The options of the command that are no settings of the training itself.

    Attributes:
        plain: where to write the trained model as its own library does, too; of a stock model.
    """

    model: Path
    out: Path
    resume: bool
    teacher: str | None
    teacher_checkpoint: Path | None
    teacher_args: dict[str, Any]
    train_split: str | None
    eval_split: str | None
    eval_images: int | None
    evaluate: bool
    batch_size: int
    workers: int | None
    cpu: bool
    keep_checkpoints: bool
    metric: str | None = None
    plain: Path | None = None


class FinetuneJob:
    def __init__(
        self,
        screen: Screen,
        options: FinetuneOptions,
        reading: Reading,
        config: FinetuneConfig,
        augmentation: Augmentation,
    ) -> None:
        self.screen, self.options, self.reading = screen, options, reading
        self.config, self.augmentation = config, augmentation
        self.eval_batches: Any = None

    def prepare(self) -> None:
        """Student, teacher and data, checked before the long work."""
        import comcat

        from ..evaluation.metric import load_metric

        o = self.options
        self._check_out()
        self.metric = load_metric(o.metric) if o.metric else None
        self.student: nn.Module = comcat.load_model(str(o.model))
        self.cost = comcat.profile(self.student)
        self._open_data()
        self.teacher = self._load_teacher() if self.config.needs_teacher else None

    def _check_out(self) -> None:
        """Raise CheckpointError if the model could not be written into OUT in the end."""
        from ..errors import CheckpointError
        from ..storage.atomic import CONFIG_NAME, check_place
        from ..storage.checkpoint import TENSORS_NAME
        from ..storage.manifest import Manifest
        from ..storage.owned import MODEL, check_replaceable

        out = self.options.out
        check_place(out / TENSORS_NAME)
        manifest = Manifest(out)
        if self.options.resume and not manifest.exists:  # of a version without records
            try:
                check_replaceable(out, MODEL)
                return
            except CheckpointError:
                pass
        if not (out / CONFIG_NAME).exists() or self.options.resume:  # else the run says that a model is there
            manifest.refuse_others([TENSORS_NAME, DOCUMENT, CONFIG_NAME])

    def _open_data(self) -> None:
        from ..data import loader
        from ..data.training_set import training_loader
        from .inputs import declared_classes

        o, screen = self.options, self.screen
        config = self.reading.configure(self.student)
        classes = declared_classes(self.student)
        train = self.reading.open(o.train_split, "calibration", config, classes, self.config.seed)
        self.train_batches = training_loader(
            train, o.batch_size, config, self.augmentation, seed=self.config.seed, workers=o.workers
        )
        if train.as_is:
            size = "x".join(str(n) for n in train.input_size[1:])
            screen.note(
                f"the images already are {size}, so they are not resized; they are padded and cropped at random"
            )
        self.places: tuple[str | None, str | None] = (train.split, None)
        if not o.evaluate:
            return
        evaluation = self.reading.open_labelled(o.eval_split, config, self.student, screen, o.metric is not None)
        if evaluation.split == train.split:
            what = f"the split {train.split!r}" if train.split else f"{train.name}, which has no splits"
            raise DataError(
                f"training and evaluation would both use {what}. Give --train-split and --eval-split, or --no-eval"
            )
        self.places = (train.split, evaluation.split)
        screen.note(f"trains on {train.split!r}, evaluates on {evaluation.split!r}")
        self.eval_batches = loader(evaluation, o.batch_size, o.workers, o.eval_images)

    def _load_teacher(self) -> nn.Module:
        """The model that the options name; the architecture of the student's file where only weights are given.

        What a file says is never a reason to ask the network: pretrained weights are those of a NAME that was typed.

        Raises:
            ModelError: no teacher is named, or its weights cannot be had.
        """
        import comcat

        from ..models.opening import open_source
        from ..models.source import recorded_source

        o = self.options
        if o.teacher is not None:
            self._check_classes(o.teacher)
            return comcat.load_model(o.teacher, o.teacher_checkpoint, o.teacher_args)
        made = recorded_source(self.student)
        if made is None or o.teacher_checkpoint is None:
            name = made.name if made is not None else type(self.student).__name__
            raise ModelError(
                "the teacher is not named. Give the dense model's weights: --teacher-checkpoint FILE.safetensors; or a "
                "saved model: --teacher DIR; or a model with timm's pretrained weights, from the network: --teacher "
                f"NAME (the student was made from {name}); or train without: --distillation none"
            )
        return open_source(made, o.teacher_checkpoint, o.teacher_args)

    def _check_classes(self, name: str) -> None:
        """Raise ModelError if the classifier of timm's weights would not be used, so that the teacher's is random."""
        import timm

        plain = not any(mark in name for mark in ":/") and not Path(name).exists()
        known = timm.get_pretrained_cfg(name, allow_unregistered=False) if plain else None
        classes = self.options.teacher_args.get("num_classes")
        if self.options.teacher_checkpoint is None and known is not None and classes not in (None, known.num_classes):
            raise ModelError(
                f"timm has no pretrained weights of '{name}' with {classes} classes to learn from. Give those of the "
                "dense model: --teacher-checkpoint FILE.safetensors, or train with --distillation none"
            )

    # -- the long work ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train; the main process writes the model, and removes the checkpoints when it is safe."""
        from ..storage.manifest import Manifest
        from ..training import state
        from ..training.finetuning import finetune
        from ..training.process import process_index

        o = self.options
        self.result: FinetuneResult = finetune(
            self.student,
            self.teacher,
            self.train_batches,
            self.eval_batches,
            self.config,
            out=o.out,
            resume=o.resume,
            progress=self.screen.progress,
            note=self.screen.warn if process_index() == 0 else None,
            cpu=o.cpu,
            evaluate=self.metric,
        )
        if process_index() == 0:
            self._write()
            if not o.keep_checkpoints:
                state.remove(o.out)
            Manifest(o.out).path.unlink(missing_ok=True)  # the model says from now on whose directory it is

    def _write(self) -> None:
        """The model into OUT, beside the log; the file that makes a directory a model comes last."""
        import comcat

        from ..storage import temporary
        from ..storage.atomic import CONFIG_NAME, sync_tree
        from ..storage.manifest import Manifest

        out = self.options.out
        if self.options.plain is not None:
            self._write_plain(self.options.plain)
        temporary.sweep(out)
        manifest = Manifest(out)
        adopt = self.options.resume and (out / CONFIG_NAME).exists()  # written by a version without records
        with temporary.new(out / "model", directory=True) as stage:
            comcat.save(self.student.cpu(), stage, overwrite=True)
            (stage / DOCUMENT).write_text(json.dumps(self._document(), indent=1, default=str) + "\n")
            sync_tree(stage)
            for path in sorted(stage.iterdir(), key=lambda path: path.name == CONFIG_NAME):
                if adopt and path.name not in manifest.files:
                    manifest.record(path.name)
                manifest.take(path, path.name)

    def _write_plain(self, target: Path) -> None:
        """Before the model that ends the run, so that an interruption in between leaves a run to resume."""
        from ..stock_export import write_plain
        from ..storage.atomic import atomic_directory
        from ..storage.owned import STOCK

        source = self.options.model
        processor = source / "preprocessor_config.json"
        with atomic_directory(target, True, STOCK) as stage:
            write_plain(self.student, stage, processor if processor.is_file() else None)
            (stage / "plan.json").write_bytes((source / "plan.json").read_bytes())
            (stage / "report.json").write_text(json.dumps(self._document(), indent=1, default=str) + "\n")

    # -- the outcome -----------------------------------------------------------------------------------------

    def _document(self) -> dict[str, Any]:
        o, history = self.options, self.result.history
        return {
            **made_with(self.student),
            "model": str(o.model),
            "out": str(o.out),
            "data": self.reading.data,
            "train_split": self.places[0],
            "eval_split": self.places[1],
            "params": self.cost.params,
            "macs": self.cost.macs,
            "before": history[0].evaluation.to_dict() if history else None,
            "after": history[-1].evaluation.to_dict() if history else None,
            "batch_size": o.batch_size,
            "config": self.config.to_dict(),
            "augmentation": asdict(self.augmentation),
            **self.result.to_dict(),
            "skipped_images": {**self.result.skipped, **(self.eval_batches.skipped if self.eval_batches else {})},
        }

    def show(self) -> None:
        """Print the outcome."""
        from ..report import tables
        from ..report.tables import Measured
        from ..storage.checkpoint import TENSORS_NAME

        out, result = self.screen.out, self.result
        document = self._document()
        report_skipped(self.screen, document["skipped_images"])
        size = (self.options.out / TENSORS_NAME).stat().st_size
        evaluations: Iterable[Any] = (
            [entry.evaluation for entry in (result.history[0], result.history[-1])]
            if (result.history)
            else [None, None]
        )
        columns = [
            Measured(name, self.cost.params, self.cost.macs, size, evaluation)
            for name, evaluation in zip(("before", "after"), evaluations, strict=True)
        ]
        place = f"split {self.places[1]} of {self.reading.data}" if self.eval_batches else "not evaluated"
        out.print(tables.comparison(columns, f"{self.options.model}, {result.steps:,} steps, {place}"))
        target = self.options.out
        self.screen.say("written to ", (target, "bold"), f"; in Python: comcat.load({str(target)!r})")
        if self.options.plain is not None:
            self.screen.say("for its own library, without comcat: ", (self.options.plain, "bold"))
        self.screen.result(document)
