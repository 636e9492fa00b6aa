"""Learned ranks: a distribution over candidate widths, trained in turns with the weights.

Source: COMCAT (arXiv 2305.17235), Eq. 6. Batches alternate. On one the weights of the mixture are updated by the
cross-entropy (or the loss of another kind of outputs; features stay near the dense model's); on the next the logits of
the candidates, by

    two-sided:  CE * (cost / budget)^beta              as the paper writes it
    one-sided:  CE * max(cost / budget, 1)^beta        as its reference code has it
    exact:      CE, over the distributions that cost exactly the budget

The distribution begins at a training-free plan and the calibrated factors of the model, and ends as a plan: the
allocation nearest to the expected widths that meets the budget.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from ..calibration.collect import calibrate
from ..calibration.statistics import Calibration
from ..errors import ComcatError, TrainingError
from ..evaluation.metric import Metric
from ..evaluation.outputs import Forward
from ..layers.base import USUAL_PARTS
from ..models.modes import exclusive
from ..planning.latency import LatencyTable
from ..planning.plan import FORMAT as PLAN_FORMAT
from ..planning.plan import Budget, Plan
from ..prepared import Prepared, prepared
from ..progress import Progress
from ..storage.manifest import Manifest
from ..training.answers import answers_of, unit
from ..training.checks import check_same, refuse_half
from ..training.engine import Run
from ..training.fresh_or_resumed import alone, how_to_go_on, open_run
from ..training.loaders import Batches
from ..training.losses import Loss
from ..training.process import accelerated, agree, explained
from ..training.randomness import SAMPLE, isolated
from ..training.state import restoring
from .alternation import LOG_NAME, Alternation
from .halves import refuse_evaluation_data, sample_batches, sample_images
from .scoring import PlanScores
from .search_config import SearchConfig
from .space import SearchSpace
from .start import best_training_free

PICTURE_NAME = "search.png"
#: Images that a calibration of our own looks at.
CALIBRATION_IMAGES = 1024
#: Images on which the spread of values and features is measured.
UNIT_IMAGES = 256


def search(
    model: nn.Module | Prepared,
    budget: Budget,
    train_loader: Any,
    config: SearchConfig | None = None,
    *,
    calibration: Calibration | None = None,
    start: Plan | None = None,
    parts: Sequence[str] = USUAL_PARTS,
    rank_multiple: int | None = None,
    input_size: Sequence[int] | None = None,
    latency: LatencyTable | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    cpu: bool = False,
    eval_loader: Iterable[Any] | None = None,
    evaluate: Metric | None = None,
    forward: Forward | None = None,
) -> Plan:
    """Learn the widths of every layer on labelled training images.

    Args:
        model: the dense model, or what :func:`comcat.prepare` made of it; it is not changed.
        budget, parts, rank_multiple, input_size, latency: as for :func:`comcat.plan`; the budget is met within 0.5 %.
        train_loader: a DataLoader with random access over (image, label) pairs of the TRAINING split; half of its
            batches train the weights, half the ranks.
        calibration: statistics for the factors and the starting plan; by default collected from ``train_loader``.
        start: the plan to begin with, which meets the budget; by default the better of those that
            :func:`comcat.plan` makes without training.
        out: directory for ``search.jsonl`` (cost, losses, expected widths and probabilities over time), the picture
            ``search.png`` and checkpoints; None writes nothing.
        resume: continue the search in ``out`` from its newest checkpoint, bit by bit.
        progress: called as ``progress("search", batches done, batches in all)``.
        note: called with remarks. cpu: do not use a GPU.
        eval_loader: batches to score the models of the starting and of the learned plan on, before any fine-tuning.
            The plan's ``estimate`` then holds every score by its name, and ``start NAME``. No rank is chosen by them.
        evaluate: a metric of your own for that, as of :func:`comcat.evaluate`; every process computes it.
        forward: how the model is called, as in :func:`comcat.calibrate`.

    Raises:
        DataError: the loader reads an evaluation split, or the data set of ``eval_loader``, or has no labels.
        MetricError: ``evaluate`` raises, or returns no finite number.
        BudgetError: out of reach, or not below the dense model. TrainingError: as for :func:`comcat.finetune`.
    """
    config = config or SearchConfig()
    ready = prepared(model)
    dense = ready.model
    refuse_evaluation_data(train_loader, eval_loader)
    if evaluate is not None and eval_loader is None:
        raise TrainingError("a metric needs images to be computed on; give eval_loader")
    refuse_half(dense, "model")
    directory = Path(out) if out is not None else None
    remark = note or (lambda text: None)
    with ExitStack() as stack:
        # Outermost: word of a dead worker can arrive while the rest is put away.
        stack.enter_context(explained(how_to_go_on(directory)))
        stack.enter_context(exclusive(dense))
        accelerator = stack.enter_context(accelerated(config.precision, config.seed, cpu))
        if getattr(accelerator, "is_fsdp2", False):
            raise TrainingError(
                "a search shares its batches among processes, not its weights: run it without FSDP, which the "
                "fine-tune may use"
            )
        stack.enter_context(alone(accelerator, directory))
        saved = open_run(accelerator, directory, resume, remark)
        said = config.outputs or (calibration.outputs if calibration else None)
        answers = answers_of(dense, "model", said, forward)
        batches = Batches(train_loader, accelerator, config.seed, answers)
        if calibration is None:
            with isolated(SAMPLE, config.seed):  # augmentations draw the same in every process
                sample = sample_images(train_loader, CALIBRATION_IMAGES, config.seed)
                calibration = calibrate(
                    ready, sample, fisher=True, progress=progress, outputs=answers.kind, forward=forward
                )
        with isolated(SAMPLE, config.seed):
            sampled = sample_batches(train_loader, UNIT_IMAGES, config.seed)
            loss = Loss(answers.kind, agree(accelerator, unit(answers, dense, sampled, forward)))
        if start is None and saved is not None:
            with restoring(saved):
                start = Plan.from_dict({"comcat_plan": PLAN_FORMAT, "layers": saved.plain["run"]["start"]})
        if start is None:
            start = best_training_free(
                ready,
                budget,
                calibration,
                parts=parts,
                rank_multiple=rank_multiple,
                input_size=input_size,
                latency=latency,
                ffn=config.ffn,
                progress=progress,
                forward=forward,
            )
        start = agree(accelerator, start)
        space = SearchSpace(
            ready,
            budget,
            start,
            calibration,
            candidates=config.candidates,
            ffn=config.ffn,
            spread=config.spread,
            parts=parts,
            rank_multiple=rank_multiple,
            input_size=input_size,
            latency=latency,
        )
        space.gated.kind, space.gated.how = answers.kind, forward
        planner = space.planner
        fixed = {
            **batches.description,
            "start": start.layers,  # not its estimates, whose last digits depend on the machine
            "limit": planner.limit,
            "parts": list(planner.parts),
            "rank_multiple": planner.multiple,
        }
        if answers.kind != "classes":  # as searches of earlier versions were, which do not say so
            fixed["outputs"] = answers.kind
        if saved is not None:
            check_same(saved.plain, config, fixed)
        teacher = None
        if answers.kind == "features":
            teacher = copy.deepcopy(dense).to(accelerator.device).eval().requires_grad_(False)
        judge, before = None, {}
        if eval_loader is not None:  # a metric that does not work is known before the search
            judge = PlanScores(ready, calibration, eval_loader, answers.kind, evaluate, forward, progress)
            before = judge.of(start)
        task = Alternation(space, batches, config, accelerator, loss, teacher, forward)
        Run(task, fixed, directory, saved, progress, remark).go()
        if directory is not None and accelerator.is_main_process:
            _draw(directory, task.names(), remark)
        learned = task.plan()
        if judge is not None:
            after = judge.of(learned)
            learned.estimate |= after | {f"start {name}": value for name, value in before.items()}
        return learned


def _draw(out: Path, names: list[str], note: Callable[[str], None]) -> None:
    from ..report.search_figure import draw_search, read_log

    try:
        content = io.BytesIO()
        draw_search(read_log(out / LOG_NAME), names, content)
        Manifest(out).write(PICTURE_NAME, content.getvalue())
    except ComcatError as error:
        note(f"no {PICTURE_NAME}: {error}")
