"""``comcat compress BASE --component NAME``: the denoiser of a pipeline, calibrated in its own sampling loop."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from .compress_outcome import CompressOutcome
from .compress_settings import CompressSettings
from .console import Screen
from .denoiser_options import Denoising
from .making import SmallModel, made_with, told

if TYPE_CHECKING:
    import torch

    from ..calibration.statistics import Calibration
    from ..denoisers.distill_config import DistillConfig
    from ..denoisers.recorded_calls import Recording
    from ..planning.plan import Budget, Plan

#: In the directory of a run that distills: what was recorded, and the model that the distillation starts from.
RECORDED, START = "recorded", "start"


class ComponentJob:
    """One run: record, calibrate, plan, compress, distill, write, show.

    Args:
        prompts: to calibrate on; resume: continue the distillation of the run beside ``settings.out``.

    Raises:
        CalibrationError: there is nothing to calibrate on. TrainingError: nothing to resume.
    """

    def __init__(
        self,
        screen: Screen,
        settings: CompressSettings,
        drawing: Denoising,
        prompts: tuple[str, ...],
        budget: Budget | None,
        plan: Plan | None,
        resume: bool,
    ) -> None:
        self.screen, self.settings, self.drawing = screen, settings, drawing
        self.prompts, self.budget, self.plan, self.resume = prompts, budget, plan, resume
        self.distill = drawing.distillation(settings.seed)
        self.folder = settings.out.with_name(f"{settings.out.name}.run")
        self.calibration: Calibration | None = None
        self.errors: dict[str, float] = {}
        self._check()

    def _check(self) -> None:
        from ..errors import CalibrationError, TrainingError

        path = self.settings.calibration_file
        if not (self.prompts or self.resume or self.settings.data_free or (path is not None and path.is_file())):
            raise CalibrationError(
                "there are no prompts to calibrate on; give --prompts FILE with what the model is to draw, one a line, "
                "or --data-free"
            )
        if self.resume and self.distill is None:
            raise TrainingError("--resume continues a distillation; say again with how many --distill-steps")
        if self.distill is not None and not self.prompts and not self.resume:
            raise CalibrationError("the distillation needs what was recorded; give --prompts")

    def run(self, device: torch.device) -> None:
        """Nothing is written to the output directory before all of it has succeeded."""
        from ..customize.pipelines import open_pipeline
        from ..denoisers.pipeline_parts import component, described
        from ..training import state

        self.pipe = open_pipeline(self.settings.model, "no", device, self.drawing.variant, self.screen.note)
        self.name, self.dense = component(self.pipe, self.drawing.component)
        self.dense.comcat_source = described(self.name, self.dense)  # type: ignore[assignment]
        with ExitStack() as stack:
            folder = self.folder if self.distill else Path(stack.enter_context(tempfile.TemporaryDirectory()))
            recording = self._resumed(folder) if self.resume else self._compressed(folder)
            if self.distill is not None:
                self._distilled(self.distill, recording)
            self._write(recording)
        if self.distill is not None:
            state.remove(self.folder)
            self._clean()

    # -- training-free ----------------------------------------------------------------------------------------

    def _compressed(self, folder: Path) -> Recording:
        """The small model, from the statistics of the pipeline's own loop."""
        import comcat

        from ..calibration.statistics import Calibration

        s, path = self.settings, self.settings.calibration_file
        with tempfile.TemporaryDirectory() as place:  # one picture shows the layers, and whether the budget can be met
            first = self._record(Path(place), self.prompts[:1] or ("",), (0,), 2, 1.0, quiet=True)
            example = next(iter(first))[:3]
        self.prepared = comcat.prepare(self.dense, example.call)
        self._check_budget()
        known = path is not None and path.is_file()
        if path is not None and known:
            self.calibration = Calibration.load(path)
            self.prepared.check(self.calibration)
            self.screen.note(f"calibration read from {path} ({self.calibration.num_images} examples)")
        if s.data_free or (known and self.distill is None):
            recording = first
        else:
            seeds = tuple(range(s.seed, s.seed + self.drawing.pictures))
            d = self.drawing
            recording = self._record(folder / RECORDED, self.prompts, seeds, d.steps, d.share)
        if self.calibration is None and not s.data_free:
            self.calibration = comcat.calibrate(
                self.prepared,
                recording,
                fisher=s.fisher is not False,
                outputs="features",
                seed=s.seed,
                progress=self.screen.progress,
            )
            if path is not None:
                self.calibration.save(path)
        self.plan = self.plan or self._planned()
        small = comcat.compress(self.prepared, self.plan, self.calibration, progress=self.screen.progress)
        self.made = SmallModel(small)
        self._measure("training_free")
        if self.distill is not None:
            comcat.save(self.made.model, folder / START)
        return recording

    def _record(
        self,
        folder: Path,
        prompts: tuple[str, ...],
        seeds: tuple[int, ...],
        steps: int | None,
        share: float,
        quiet: bool = False,
    ) -> Recording:
        from ..denoisers.sampling_loop import record

        return record(
            self.pipe,
            prompts,
            folder,
            name=self.name,
            seeds=seeds,
            steps=steps,
            guidance_scale=self.drawing.guidance,
            height=self.drawing.resolution,
            width=self.drawing.resolution,
            share=share,
            batch_size=self.settings.batch_size,
            progress=None if quiet else self.screen.progress,
        )

    def _check_budget(self) -> None:
        from ..planning.planner import check_budget

        s = self.settings
        if self.plan is not None:
            self.plan.check(self.prepared.inventory)
        elif self.budget is not None:
            check_budget(self.prepared, self.budget, s.parts, s.rank_multiple, method=s.method)

    def _planned(self) -> Plan:
        import comcat

        from ..planning.choice import comparison

        s = self.settings
        assert self.budget is not None
        known = json.dumps(self.calibration.probes) if self.calibration else ""
        with told(self.screen):
            plan = comcat.plan(
                self.prepared,
                self.budget,
                self.calibration,
                s.method,
                s.parts,
                s.rank_multiple,
                progress=self.screen.progress,
            )
        if self.calibration is not None and s.calibration_file and json.dumps(self.calibration.probes) != known:
            self.calibration.save(s.calibration_file)
        if line := comparison(plan):
            self.screen.note(line)
        return plan

    def _measure(self, stage: str) -> None:
        """The error of the predictions, on examples that the statistics have not seen where there are some."""
        from ..denoisers.prediction_error import prediction_error

        made = self.calibration
        examples = None if made is None else made.unseen or made.sample
        if examples:
            self.errors[stage] = prediction_error(self.dense, self.made.model, examples)

    # -- distillation -----------------------------------------------------------------------------------------

    def _resumed(self, folder: Path) -> Recording:
        """What the run beside the output directory has come to."""
        import comcat

        from ..denoisers.recorded_calls import Recording
        from ..errors import TrainingError

        if not (folder / START).is_dir():
            raise TrainingError(f"there is no run in '{folder}' to resume; start without --resume")
        recording = Recording(folder / RECORDED)
        self.prepared = comcat.prepare(self.dense, next(iter(recording))[:3].call)
        self.made = SmallModel(comcat.load(folder / START).to(next(self.dense.parameters()).device))
        self.plan = self.made.model.comcat.plan  # type: ignore[union-attr, assignment]
        return recording

    def _distilled(self, config: DistillConfig, recording: Recording) -> None:
        from ..denoisers.distillation import distill

        cpu = next(self.dense.parameters()).device.type == "cpu"
        distill(
            self.made.model,
            self.dense,
            recording,
            config,
            out=self.folder,
            resume=self.resume,
            progress=self.screen.progress,
            note=self.screen.note,
            cpu=cpu,
        )
        self._measure("distilled")

    def _clean(self) -> None:
        """Drop what the run needed to be resumed."""
        from ..storage import temporary

        for name in (RECORDED, START):
            temporary.remove(self.folder / name)

    # -- the outcome ------------------------------------------------------------------------------------------

    def _write(self, recording: Recording) -> None:
        from ..report.tables import Measured
        from ..storage.atomic import atomic_directory

        s, report = self.settings, self.made.report
        assert self.plan is not None
        size = sum(t.numel() * t.element_size() for t in self.dense.state_dict().values())
        with atomic_directory(s.out, s.overwrite) as stage:
            self.made.write(stage)
            bytes_ = sum(file.stat().st_size for file in stage.glob("*.safetensors"))
            self.outcome = CompressOutcome(
                settings=s,
                made_with=made_with(self.dense),
                plan=self.plan,
                calibration=self.calibration,
                report=report,
                dense=Measured("dense", report.params_before, report.macs_before, size),
                small=Measured("compressed", report.params_after, report.macs_after, bytes_),
                latency=None,
                place=None,
                skipped={},
                more={
                    "component": self.name,
                    "recording": None if s.data_free else recording.settings.model_dump(),
                    "examples": None if s.data_free else recording.examples,
                    "prediction_error": self.errors,
                    "distillation": self.distill.to_dict() if self.distill else None,
                },
            )
            self.outcome.write(stage, self.screen)

    def show(self) -> None:
        said = {"training_free": "training-free", "distilled": "after distillation"}
        self.outcome.show(self.screen, self.made.loaded_by(self.settings.out))
        if self.errors:
            shown = ", ".join(f"{100 * error:.2g} % {said[stage]}" for stage, error in self.errors.items())
            self.screen.say(f"squared error of the predictions, relative to their variance: {shown}")
        self.screen.say(f"draw with it: comcat generate {self.settings.model} --denoiser {self.settings.out} ...")
