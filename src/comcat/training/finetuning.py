"""Fine-tuning a compressed model with its dense original as the teacher.

    result = comcat.finetune(small, dense, train_loader, eval_loader, comcat.FinetuneConfig(epochs=30), out="run/")

Runs on Hugging Face Accelerate: the same call trains on a CPU, one GPU, many GPUs or many machines
(``accelerate launch``). With ``out`` the run leaves a log and checkpoints, and ``resume=True`` continues it bit by bit.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import TrainingError
from ..evaluation.metric import Metric, name_of
from ..evaluation.results import Evaluation
from ..models.modes import frozen, placed
from ..models.wrappers import check_plain
from ..progress import Progress
from ..rank_search.halves import sample_batches
from .answers import unit
from .checks import check_batches, check_models, check_same, digest
from .engine import Run
from .finetune_config import FinetuneConfig
from .finetune_task import FinetuneTask, Milestone
from .fresh_or_resumed import alone, how_to_go_on, open_run
from .loaders import Batches
from .loop import StudentTrainer, trainable_copy
from .losses import Loss
from .process import accelerated, agree, explained
from .randomness import SAMPLE, isolated
from .schedule import Steps

#: Training images on which the spread of values and features is measured.
UNIT_IMAGES = 256


@dataclass(frozen=True)
class FinetuneResult:
    """What :func:`finetune` did.

    Attributes:
        steps, epochs: of the whole run.
        history: evaluations, the first one before the first step; empty without ``eval_loader``.
        final: the last of them, of the weights that the student now holds.
        seconds: of this call.
        notes: what was worth a remark, such as a damaged checkpoint that was passed over.
        skipped: name -> cause of every image that could not be read and was replaced.
    """

    steps: int
    epochs: float
    history: tuple[Milestone, ...]
    final: Evaluation | None
    seconds: float
    notes: tuple[str, ...]
    skipped: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "epochs": self.epochs,
            "history": [entry.to_dict() for entry in self.history],
            "seconds": self.seconds,
            "notes": list(self.notes),
            "skipped_images": self.skipped,
        }


def finetune(
    student: nn.Module,
    teacher: nn.Module | None,
    train_loader: Any,
    eval_loader: Iterable[Any] | None = None,
    config: FinetuneConfig | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    cpu: bool = False,
    evaluate: Metric | None = None,
) -> FinetuneResult:
    """Train ``student`` in place, with ``teacher`` as its guide.

    Args:
        student: maps (B, C, H, W) images to its outputs, e.g. (B, classes) logits. It receives the weights of every
            evaluation, and the result; with ``config.ema`` these are averaged. After an error it holds those of the
            last evaluation.
        teacher: the dense model; None where ``config`` needs none. It is not changed.
        train_loader: a DataLoader with random access over (image, label) pairs, e.g. from
            :func:`comcat.data.training_set.training_loader`; ``batch_size`` is that of one process. Labels are class
            numbers, 0 or 1 for each of several labels, floating-point values, or maps of class numbers, in which 255
            counts for nothing; features need none. Samples may draw random
            numbers from Python, NumPy and PyTorch: they are seeded by (seed, epoch, index).
        eval_loader: batches of (images, labels) to evaluate on; features are compared with the teacher's.
        out: directory for ``metrics.jsonl``, TensorBoard and checkpoints; None writes nothing.
        resume: continue the run in ``out`` from its newest checkpoint, bit by bit.
        progress: called as ``progress("train", steps done, steps in all)``, and by evaluations.
        note: called with remarks when they arise; the result holds them too.
        cpu: do not use a GPU. Otherwise Accelerate chooses the device.
        evaluate: a metric of your own for the evaluations, as of :func:`comcat.evaluate`; every process computes it.

    Raises:
        TrainingError: the settings contradict each other or the run to resume, the loss is not finite, or another
            process died. ModelError: teacher and student do not fit. DataError: no labels, or unreadable images.
        CheckpointError: a checkpoint cannot be written.
    """
    config = config or FinetuneConfig()
    check_plain(student)
    if evaluate is not None and eval_loader is None:
        raise TrainingError("a metric needs images to be computed on; give eval_loader")
    begin = time.perf_counter()
    notes: list[str] = []

    def remark(text: str) -> None:
        notes.append(text)
        if note is not None:
            note(text)

    teacher = teacher if config.needs_teacher or teacher is None else None
    answers = check_models(student, teacher, config)
    if answers.kind == "features" and config.outputs is None:
        remark(
            "the student's outputs are taken for features: labels are not used. If they are something else, say so "
            "with outputs="
        )
    config = config.resolved(answers.kind)
    if teacher is student:
        teacher = copy.deepcopy(student)
    directory = Path(out) if out is not None else None
    with ExitStack() as stack:
        stack.enter_context(explained(how_to_go_on(directory)))
        accelerator = stack.enter_context(accelerated(config.precision, config.seed, cpu))
        stack.enter_context(alone(accelerator, directory))
        saved = open_run(accelerator, directory, resume, remark)
        batches = Batches(train_loader, accelerator, config.seed, answers)
        check_batches(config, batches.batch_size, batches.images, batches.drop_last)
        fixed = {**batches.description, "teacher": digest(teacher)}
        if answers.kind != "classes":  # as runs of earlier versions were, which do not say so
            fixed["outputs"] = answers.kind
        if evaluate is not None:  # its history is compared from the first evaluation to the last
            fixed["metric"] = name_of(evaluate)
        if saved is not None:
            check_same(saved.plain, config, fixed)
        stack.enter_context(placed(student, accelerator.device))
        if teacher is not None:
            stack.enter_context(placed(teacher, accelerator.device))
            stack.enter_context(frozen(teacher))
        with isolated(SAMPLE, config.seed):  # augmentations draw the same in every process
            sample = sample_batches(train_loader, UNIT_IMAGES, config.seed)
            spreads = agree(accelerator, unit(answers, teacher if config.distils else None, sample))
        trainer = StudentTrainer(
            accelerator,
            trainable_copy(student, config, answers.kind),
            teacher,
            config,
            Steps.of(config, len(batches)),
            answers,
            Loss(answers.kind, spreads),
        )
        stack.callback(trainer.close)
        task = FinetuneTask(trainer, batches, student, eval_loader, directory, progress, evaluate)
        run = Run(task, fixed, directory, saved, progress, remark)
        run.go()
    final = task.history[-1].evaluation if task.history else None
    seconds = time.perf_counter() - begin
    return FinetuneResult(
        run.step, run.step / task.per_epoch, tuple(task.history), final, seconds, tuple(notes), dict(batches.skipped)
    )
