"""One run of ``comcat compress``: load, check, calibrate, plan, compress, evaluate, write, show."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import timings
from .compress_settings import CompressOutcome, CompressSettings
from .console import Screen
from .inputs import Reading, report_skipped
from .judging import Judge, refuse_text
from .making import SmallModel, made_with, make, told

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..calibration.statistics import Calibration
    from ..data.loading import ImageData, ImageLoader, StreamData
    from ..planning.latency import LatencyTable
    from ..planning.plan import Budget, Plan
    from ..report.tables import Measured
    from ..runtimes.realizing import Outcome
    from .searching import Search


class CompressJob:
    def __init__(
        self,
        screen: Screen,
        settings: CompressSettings,
        reading: Reading | None,
        budget: Budget | None,
        plan: Plan | None,
    ) -> None:
        self.screen, self.settings, self.reading = screen, settings, reading
        self.budget, self.plan = budget, plan
        self.calibration: Calibration | None = None
        self.latency: LatencyTable | None = None
        self.calibration_batches: ImageLoader | None = None
        self.eval_batches: ImageLoader | None = None
        self.search_batches: Any = None
        self.realized: Outcome[SmallModel] | None = None

    # -- before the long work --------------------------------------------------------------------------------

    def load(self, checkpoint: Path | None, args: dict[str, Any], device: torch.device) -> None:
        """The model, and everything about the job that can be checked against it."""
        import torch

        import comcat

        from ..calibration.statistics import Calibration
        from ..evaluation.outputs import check_kind
        from ..layers.base import check_parts

        check_parts(self.settings.parts)
        self.settings.latency.check()
        check_kind(self.settings.judging.outputs)
        self.settings.judging.check()
        torch.manual_seed(self.settings.seed)
        with told(self.screen):
            model = comcat.load_model(self.settings.model, checkpoint=checkpoint, model_args=args)
        self.model: nn.Module = model.to(device).eval()
        self.prepared = comcat.prepare(self.model)
        inventory = self.prepared.inventory
        self.latency = self.settings.latency.read(self.screen)
        self._check_budget()
        if self.plan is not None:
            self.plan.check(inventory)
        path = self.settings.calibration_file
        if path is not None and path.is_file():
            self.calibration = Calibration.load(path)
            self.prepared.check(self.calibration)
            self._check_calibration(self.calibration, path)

    def _check_budget(self) -> None:
        import comcat

        s, budget = self.settings, self.budget
        if budget is not None and (budget.unit != "latency" or self.latency is not None):
            more: Any = {"method": s.method, "latency": self.latency, "stock": s.stock}
            comcat.check_budget(self.prepared, budget, s.parts, s.rank_multiple, **more)

    def _check_calibration(self, calibration: Calibration, path: Path) -> None:
        from ..errors import CalibrationError

        wanted = self.settings.calibration_images
        if wanted is not None and wanted != calibration.num_images:
            raise CalibrationError(
                f"{path} holds statistics of {calibration.num_images} images, not {wanted}. "
                "Leave --calibration-images out or name another file"
            )
        if self.settings.fisher and not calibration.fisher:
            raise CalibrationError(f"{path} was made with --no-fisher. Leave --fisher out or name another file")
        self.screen.note(f"calibration read from {path} ({calibration.num_images} images)")

    def open_data(self) -> None:
        """Both splits, checked before any of them is used."""
        from ..data import calibration_batches, loader

        s, reading = self.settings, self.reading
        if reading is None:
            return
        config = reading.configure(self.model)
        calibration = evaluation = None
        if self.calibration is None and not s.data_free:
            refuse_text(self.model)
            calibration = reading.open(s.calibration_split, "calibration", config, None, s.seed)
            self.calibration_batches = calibration_batches(
                calibration, s.calibration_images, s.batch_size, s.seed, s.workers
            )
        if s.evaluate:
            device = next(self.model.parameters()).device
            self.judge = Judge(s.judging, reading, s.eval_split, self.model, s.model, device, self.screen, True)
            evaluation = self.judge.data
            self.eval_batches = loader(evaluation, s.batch_size, s.workers, s.eval_images)
        if s.search is not None:
            self.search_batches = s.search.open(reading, self.model, evaluation, self.screen)
        self._explain(calibration, evaluation)

    def _explain(self, calibration: ImageData | StreamData | None, evaluation: ImageData | StreamData | None) -> None:
        """Say what was chosen where the user did not choose."""
        either = calibration or evaluation
        if either is not None and either.as_is:
            size = "x".join(str(n) for n in either.input_size[1:])
            self.screen.note(f"the images already are {size}, so they are neither resized nor cropped")
        if calibration is not None and evaluation is not None:
            if calibration.split == evaluation.split:
                self.screen.warn("calibration and evaluation share their images; the accuracy flatters a little")
            else:
                self.screen.note(f"calibrates on {calibration.split!r}, evaluates on {evaluation.split!r}")

    # -- the long work ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """Nothing is written to the output directory before all of it has succeeded."""
        from ..training.process import process_index

        try:
            self._measure_latency()
            self._calibrate()
            plan = self.plan or self._make_plan()
            if process_index() == 0:  # the others have done their share of the search
                self.outcome = self._compress(plan)
        except KeyboardInterrupt as interrupt:
            path = self.settings.calibration_file
            if not interrupt.args and path is not None and path.is_file():  # a search says how to go on
                interrupt.args = (f"no model was written, the calibration is in {path}",)
            raise

    def _measure_latency(self) -> None:
        s = self.settings
        if self.budget is not None and self.budget.unit == "latency" and self.latency is None:
            self.latency = s.latency.measure(self.prepared, self.screen)
            self._check_budget()

    def _calibrate(self) -> None:
        import comcat

        from ..errors import DataError

        batches, wanted = self.calibration_batches, self.settings.calibration_images
        if batches is None:
            return
        self.calibration = comcat.calibrate(
            self.prepared,
            batches,
            fisher=self._fisher(),
            outputs=self.settings.judging.outputs,
            seed=self.settings.seed,
            progress=self.screen.progress,
        )
        report_skipped(self.screen, batches.skipped)
        have = self.calibration.num_images
        if wanted and have < wanted:
            raise DataError(
                f"only {have} of the {wanted} calibration images can be read. "
                f"Use --calibration-images {have} or add images"
            )
        self._save_calibration()

    def _fisher(self) -> bool:
        """By default on: features too have gradients, those of a squared error."""
        return self.settings.fisher is not False

    def _save_calibration(self) -> None:
        if self.settings.calibration_file is not None and self.calibration is not None:
            self.calibration.save(self.settings.calibration_file)

    def _make_plan(self) -> Plan:
        import comcat

        from ..planning.choice import comparison

        assert self.budget is not None
        if self.settings.search is not None:
            return self._learn_plan(self.settings.search, self.budget)
        known = json.dumps(self.calibration.probes) if self.calibration else ""
        with told(self.screen):
            plan = comcat.plan(
                self.prepared,
                self.budget,
                calibration=self.calibration,
                method=self.settings.method,
                parts=self.settings.parts,
                rank_multiple=self.settings.rank_multiple,
                progress=self.screen.progress,
                latency=self.latency,
                stock=self.settings.stock,
            )
        if self.calibration is not None and json.dumps(self.calibration.probes) != known:
            self._save_calibration()  # with what was probed, which took longest
        if line := comparison(plan):
            self.screen.note(line)
        return plan

    def _learn_plan(self, search: Search, budget: Budget) -> Plan:
        import comcat

        return comcat.search(
            self.prepared,
            budget,
            self.search_batches,
            search.config,
            calibration=self.calibration,
            parts=self.settings.parts,
            rank_multiple=self.settings.rank_multiple,
            latency=self.latency,
            out=search.folder,
            resume=search.resume,
            progress=self.screen.progress,
            note=self.screen.warn,
            cpu=search.cpu,
        )

    def _build(self, plan: Plan) -> Plan:
        """The small model; of another plan where a latency budget is met in its runtime by that one."""

        def build(plan: Plan) -> SmallModel:
            return make(s.stock, self.prepared, plan, self.calibration, self.screen, s.model)

        def replan(table: LatencyTable) -> Plan:
            self.latency = table
            return self._make_plan()

        s = self.settings
        if self.latency is None or self.budget is None or not s.latency.realized_in(self.latency):
            self.made = build(plan)
            return plan
        again = None if s.search is not None else replan
        found = timings.realize(self.prepared, self.latency, plan, self.budget, build, again, self.screen)
        self.made, self.latency, self.realized = found.built, found.table, found
        return found.plan

    def _compress(self, plan: Plan) -> CompressOutcome:
        """Compress, evaluate, write; the output directory appears complete or not at all."""
        from ..errors import ComcatError
        from ..report.figures import draw_kept
        from ..report.tables import Measured
        from ..storage.atomic import atomic_directory
        from ..storage.owned import MODEL, STOCK

        screen, s = self.screen, self.settings
        plan = self._build(plan)
        report = self.made.report
        size = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        dense = Measured("dense", report.params_before, report.macs_before, size)
        small = Measured("compressed", report.params_after, report.macs_after, 0)
        if self.eval_batches is not None:
            dense, small = self._evaluate([self.model, self.made.model], [dense, small])
        with atomic_directory(s.out, s.overwrite, STOCK if s.stock else MODEL) as stage:
            self.made.write(stage)
            small = replace(small, bytes=sum(file.stat().st_size for file in stage.glob("*.safetensors")))
            outcome = CompressOutcome(plan, report, dense, small)
            plan.save(stage / "plan.json")
            (stage / "report.json").write_text(json.dumps(self._document(outcome), indent=1, default=str) + "\n")
            try:
                draw_kept(report, stage / "report.png", *self._titles(outcome))
            except ComcatError as error:
                screen.note(f"no report.png: {error}")
            if self.settings.search is not None:
                self.settings.search.hand_over(stage)
        if self.settings.search is not None:
            self.settings.search.clean()
        return outcome

    def _evaluate(self, models: list[nn.Module], columns: list[Measured]) -> list[Measured]:
        """Accuracy one after the other, speed in turns."""
        import torch

        from ..evaluation.measure import evaluate
        from ..evaluation.speed import throughput

        assert self.eval_batches is not None
        measured = []
        for model, column in zip(models, columns, strict=True):
            result = evaluate(
                model,
                self.eval_batches,
                progress=self.screen.stage(f"evaluate {column.name}"),
                **self.judge.arguments(models[0]),
            )
            measured.append(replace(column, evaluation=result))
        images = next(iter(self.eval_batches))[0]
        if self.latency is not None:  # as the layers were timed
            images = images[torch.arange(self.latency.batch_size) % len(images)]
        speeds = throughput(models, images, forwards=[self.judge.call(model) for model in models])
        return [replace(column, speed=speed) for column, speed in zip(measured, speeds, strict=True)]

    # -- the outcome -----------------------------------------------------------------------------------------

    def _titles(self, outcome: CompressOutcome) -> tuple[str, str]:
        from ..report.format import count

        dense, small = outcome.dense, outcome.small
        title = f"{self.settings.model}: {count(dense.params)} → {count(small.params)} parameters"
        subtitle = f"what every layer kept · MACs {count(dense.macs)} → {count(small.macs)}"
        if dense.evaluation and small.evaluation:
            before, after = dense.evaluation.figures()[0], small.evaluation.figures()[0]
            subtitle += f" · {before.label} {before.shown().removesuffix(' %')} → {after.shown()}"
        return title, subtitle

    def _latency(self, outcome: CompressOutcome) -> dict[str, Any] | None:
        if self.latency is None:
            return None
        return timings.describe(self.latency, outcome.plan, outcome.dense, outcome.small, self.realized)

    def _place(self) -> str | None:
        if self.eval_batches is None:
            return None
        data = self.eval_batches.data
        return f"{data.name}, split {data.split}" if data.split else data.name

    def _document(self, outcome: CompressOutcome) -> dict[str, Any]:
        """The outcome for machines: the ``--json`` document and ``report.json``."""
        made = self.calibration
        return {
            **made_with(self.model),
            "model": self.settings.model,
            "out": str(self.settings.out),
            "method": outcome.plan.method,
            "seed": self.settings.seed,
            "calibration": {"images": made.num_images, "fisher": made.fisher} if made else None,
            "latency": self._latency(outcome),
            "evaluated_on": self._place(),
            "skipped_images": {
                **(self.calibration_batches.skipped if self.calibration_batches else {}),
                **(self.eval_batches.skipped if self.eval_batches else {}),
            },
            "dense": outcome.dense.to_dict(),
            "compressed": outcome.small.to_dict(),
            "report": outcome.report.to_dict(),
        }

    def show(self) -> None:
        """Print the outcome, on the main process."""
        from ..report import tables
        from ..training.process import process_index

        if process_index() > 0:
            return

        outcome, out = self.outcome, self.screen.out
        if self.eval_batches is not None:
            report_skipped(self.screen, self.eval_batches.skipped)
        out.print()
        out.print(tables.layers(outcome.report))
        if dense := tables.left_dense(outcome.report):
            out.print(dense)
        place = self._place()
        title = f"{self.settings.model}, ranks by {outcome.plan.method}, "
        title += f"evaluated on {place}" if place else "not evaluated"
        out.print(tables.comparison([outcome.dense, outcome.small], title))
        if latency := self._latency(outcome):
            out.print(timings.line(latency))
        target = self.settings.out
        self.screen.say("written to ", (target, "bold"), f"; in Python: {self.made.loaded_by(target)}")
        self.screen.result(self._document(outcome))
