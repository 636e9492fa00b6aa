"""A short training of a compressed denoiser on what the dense one predicts of the same noise.

    E |student(x_t, t, c) - teacher(x_t, t, c)|^2 / Var(teacher)        x_t, t, c: recorded calls

The targets are the dense model's own predictions, so that no pictures are needed, and nothing is learned but what the
compression has lost. Source of the idea: Hinton et al., arXiv 1503.02531; for denoisers BK-SDM, arXiv 2305.15798.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import ModelError
from ..evaluation.outputs import Outputs, Spread, squared_error
from ..models.modes import copied, evaluating, frozen, placed
from ..models.wrappers import check_plain
from ..progress import Progress
from ..training.checks import check_same, digest, refuse_half
from ..training.engine import Run
from ..training.fresh_or_resumed import alone, how_to_go_on, open_run
from ..training.process import accelerated, agree, explained
from .distill_config import DistillConfig
from .distill_task import Distillation, Examples
from .recorded_calls import Recording

#: Recorded examples by which the spread of the predictions is measured, and whether the student came nearer.
_LOOKED_AT = 256


@dataclass(frozen=True)
class DistillResult:
    """What :func:`distill` did.

    Attributes:
        losses: of every step, the squared error relative to the variance of the dense predictions.
        before, after: the same of a sample of the recorded examples, before the first step of this call and of what the
            student holds now.
        seconds: of this call.
    """

    losses: tuple[float, ...]
    before: float
    after: float
    seconds: float


def distill(
    student: nn.Module,
    teacher: nn.Module,
    recording: Recording,
    config: DistillConfig | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    cpu: bool = False,
) -> DistillResult:
    """Train ``student`` in place to predict what ``teacher`` predicts.

    Where the training has not brought it nearer, as can be where little was lost, the student is left as it was.

    Args:
        student: a compressed denoiser, in float32; all of its weights are trained.
        teacher: the dense one, which is not changed.
        recording: of calls that the teacher was given, see :func:`comcat.denoisers.record`.
        out: directory for ``metrics.jsonl``, TensorBoard and checkpoints; None writes nothing.
        resume: continue the run in ``out`` from its newest checkpoint, bit by bit.
        progress: called as ``progress("distill", steps done, steps in all)``.
        note: told of remarks, e.g. a damaged checkpoint that is passed over.
        cpu: do not use a GPU. Otherwise Accelerate chooses the device.

    Raises:
        TrainingError: weights of half precision, other settings than those of the run to resume, or a loss that is not
            finite. ModelError: student and teacher are of different classes. CalibrationError: a damaged recording.
    """
    config, remark = config or DistillConfig(), note or (lambda _: None)
    begin = time.perf_counter()
    check_plain(student)
    refuse_half(student, "student")
    if type(student) is not type(teacher):
        raise ModelError(
            f"the student is a {type(student).__name__} and the teacher a {type(teacher).__name__}; give the dense "
            "denoiser that the student was made from"
        )
    directory = Path(out) if out is not None else None
    with ExitStack() as stack:
        stack.enter_context(explained(how_to_go_on(directory)))
        accelerator = stack.enter_context(accelerated(config.precision, config.seed, cpu))
        stack.enter_context(alone(accelerator, directory))
        saved = open_run(accelerator, directory, resume, remark)
        fixed = {
            "teacher": digest(teacher),
            "examples": recording.examples,
            "recording": recording.settings.model_dump(),
            "processes": accelerator.num_processes,
        }
        if saved is not None:
            check_same(saved.plain, config, fixed)
        stack.enter_context(placed(student, accelerator.device))
        stack.enter_context(placed(teacher, accelerator.device))
        stack.enter_context(frozen(teacher))
        examples = Examples(recording, config)
        spreads = agree(accelerator, _spreads(teacher, examples))
        model = copied(student).requires_grad_(True)
        task = Distillation(accelerator, model, teacher, examples, spreads, config)
        before = _error(student, teacher, examples, spreads)
        Run(task, fixed, directory, saved, progress, remark).go()
        start = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        student.load_state_dict(task.trained.weights())
        after = _error(student, teacher, examples, spreads)
        if not agree(accelerator, after < before):
            student.load_state_dict(start)
            remark(
                f"the distillation has not come nearer ({after:.2g} after, {before:.2g} before), so that the weights "
                "are left as they were; try a lower learning rate, or more steps"
            )
            after = before
    return DistillResult(tuple(task.losses), before, after, time.perf_counter() - begin)


def _looked_at(model: nn.Module, examples: Examples) -> Iterator[tuple[torch.Tensor, ...]]:
    """Predictions for the first batches of a run."""
    outputs, parameter = Outputs(model, "features"), next(model.parameters())
    for number in range(min(examples.per_pass, math.ceil(_LOOKED_AT / examples.config.batch_size))):
        batch = examples.batch(number).to(parameter.device, parameter.dtype)
        with torch.no_grad(), evaluating(model):
            found = outputs(batch.run(model), len(batch))
        yield found


def _error(student: nn.Module, teacher: nn.Module, examples: Examples, spreads: Sequence[torch.Tensor]) -> float:
    """The student's squared error in units of the spread."""
    errors = [
        float(
            squared_error("features", theirs, ours, [spread.to(one) for spread, one in zip(spreads, ours, strict=True)])
        )
        for theirs, ours in zip(_looked_at(teacher, examples), _looked_at(student, examples), strict=True)
    ]
    return sum(errors) / len(errors)


def _spreads(teacher: nn.Module, examples: Examples) -> list[torch.Tensor]:
    """The variance of the dense predictions, by which errors are divided."""
    spread: Spread | None = None
    for found in _looked_at(teacher, examples):
        if spread is not None and [t.shape[1:] for t in found] != [t.shape for t in spread.shift]:
            continue  # of another length
        spread = spread or Spread("features")
        spread.add(found)
    assert spread is not None
    return spread.result()
