"""One run of ``comcat compress``: load, check, calibrate, plan, compress, evaluate, write, show."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import timings
from .compress_images import CompressImages
from .compress_outcome import CompressOutcome
from .compress_settings import CompressSettings
from .console import Screen
from .inputs import Reading, report_skipped
from .making import SmallModel, made_with, make, told

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..calibration.statistics import Calibration
    from ..planning.latency import LatencyTable
    from ..planning.plan import Budget, Plan
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
        self.screen, self.settings = screen, settings
        self.budget, self.plan = budget, plan
        self.calibration: Calibration | None = None
        self.latency: LatencyTable | None = None
        self.images = CompressImages(screen, settings, reading)
        self.realized: Outcome[SmallModel] | None = None

    # -- before the long work --------------------------------------------------------------------------------

    def load(self, checkpoint: Path | None, args: dict[str, Any], device: torch.device) -> None:
        """The model, and everything about the job that can be checked against it."""
        import torch

        import comcat

        from ..calibration.statistics import Calibration
        from ..evaluation.outputs import check_kind
        from ..layers.base import check_parts

        if self.settings.parts is not None:
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
        """The images of every use, checked before any of them is used."""
        self.images.open(self.model, calibrated=self.calibration is not None)

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

        batches, wanted = self.images.calibration, self.settings.calibration_images
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

        from ..planning.planner import usual_parts

        return comcat.search(
            self.prepared,
            budget,
            self.images.search,
            search.config,
            calibration=self.calibration,
            parts=self.settings.parts or usual_parts("search"),
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
        from ..report.tables import Measured
        from ..storage.atomic import atomic_directory
        from ..storage.owned import MODEL, STOCK

        s, images = self.settings, self.images
        plan = self._build(plan)
        report, table = self.made.report, self.latency
        size = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        dense = Measured("dense", report.params_before, report.macs_before, size)
        small = Measured("compressed", report.params_after, report.macs_after, 0)
        timed = None if table is None else table.batch_size  # as the layers were timed
        dense, small = images.evaluate([self.model, self.made.model], [dense, small], timed)
        latency = None if table is None else timings.describe(table, plan, dense, small, self.realized)
        with atomic_directory(s.out, s.overwrite, STOCK if s.stock else MODEL) as stage:
            self.made.write(stage)
            small = replace(small, bytes=sum(file.stat().st_size for file in stage.glob("*.safetensors")))
            outcome = CompressOutcome(
                settings=s,
                made_with=made_with(self.model),
                plan=plan,
                calibration=self.calibration,
                report=report,
                dense=dense,
                small=small,
                latency=latency,
                place=images.place,
                skipped=images.skipped,
            )
            outcome.write(stage, self.screen)
            if s.search is not None:
                s.search.hand_over(stage)
        if s.search is not None:
            s.search.clean()
        return outcome

    def show(self) -> None:
        """Print the outcome, on the main process."""
        from ..training.process import process_index

        if process_index() == 0:
            if self.images.evaluation is not None:
                report_skipped(self.screen, self.images.evaluation.skipped)
            self.outcome.show(self.screen, self.made.loaded_by(self.settings.out))
