"""``comcat compress``: from a trained model to a small one on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from . import options as opt
from .console import Screen, command
from .inputs import (
    Reading,
    check_input_file,
    parse_count,
    parse_device,
    parse_model_args,
    report_skipped,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..calibration import Calibration
    from ..compress import Report
    from ..evaluate import Evaluation
    from ..imageloader import ImageData, ImageLoader, StreamData
    from ..plan import Budget, Plan
    from ..report.tables import Measured

BUDGET = "Budget (one of these)"
HOW = "How"


@command
def compress(
    model: opt.Model,
    out: Annotated[Path, opt.Option(metavar="DIR", help="Directory to write the small model to.")],
    data: opt.OptionalData = None,
    keep: Annotated[
        Optional[float], opt.Option(metavar="F", help="Fraction of the parameters.", rich_help_panel=BUDGET)  # noqa: UP045
    ] = None,
    keep_macs: Annotated[
        Optional[float], opt.Option(metavar="F", help="Fraction of the MACs.", rich_help_panel=BUDGET)  # noqa: UP045
    ] = None,
    max_params: Annotated[
        Optional[str], opt.Option(metavar="N", help="Parameters, e.g. 11M.", rich_help_panel=BUDGET)  # noqa: UP045
    ] = None,
    max_macs: Annotated[
        Optional[str], opt.Option(metavar="N", help="MACs of one image, e.g. 2.3G.", rich_help_panel=BUDGET)  # noqa: UP045
    ] = None,
    of: Annotated[
        str,
        opt.Option(
            metavar="model|parts",
            help="Whether the budget is of the whole model or of the compressed parts only.",
            rich_help_panel=BUDGET,
        ),
    ] = "model",
    method: Annotated[
        Optional[str],  # noqa: UP045
        opt.Option(
            metavar="probe|spectrum|uniform",
            help="How ranks are chosen; probe with images, uniform without.",
            rich_help_panel=HOW,
        ),
    ] = None,
    parts: Annotated[
        str, opt.Option(help="Parts to compress, of qk, vo, ffn and head.", rich_help_panel=HOW)
    ] = "qk,vo,ffn,head",
    rank_multiple: Annotated[
        int,
        opt.Option(
            min=1, metavar="N", help="Round ranks to multiples of N (8 for GPUs).", rich_help_panel=HOW
        ),
    ] = 1,
    plan_file: Annotated[
        Optional[Path],  # noqa: UP045
        opt.Option(
            "--plan", metavar="FILE", help="Apply this plan instead of making one.", rich_help_panel=HOW
        ),
    ] = None,
    calibration_images: Annotated[
        Optional[int],  # noqa: UP045
        opt.Option(metavar="N", help="Images to collect statistics from; 1024 or all.", rich_help_panel=HOW),
    ] = None,
    calibration_file: Annotated[
        Optional[Path],  # noqa: UP045
        opt.Option(
            "--calibration",
            metavar="FILE",
            help="Statistics: read if the file exists, else collected and written there, to be used again.",
            rich_help_panel=HOW,
        ),
    ] = None,
    fisher: Annotated[
        bool, opt.Option("--fisher", help="Collect output gradients too (slower).", rich_help_panel=HOW)
    ] = False,
    data_free: Annotated[
        bool, opt.Option("--data-free", help="Use the weights only; no images needed.", rich_help_panel=HOW)
    ] = False,
    no_eval: Annotated[
        bool, opt.Option("--no-eval", help="Do not measure accuracy and speed.", rich_help_panel=HOW)
    ] = False,
    checkpoint: opt.Checkpoint = None,
    model_arg: opt.ModelArgs = None,
    split: Annotated[
        Optional[str],  # noqa: UP045
        opt.Option(help="Split for calibration and evaluation both.", rich_help_panel=opt.DATA),
    ] = None,
    calibration_split: Annotated[
        Optional[str],  # noqa: UP045
        opt.Option(help="Split to calibrate on; train if there is one.", rich_help_panel=opt.DATA),
    ] = None,
    eval_split: Annotated[
        Optional[str],  # noqa: UP045
        opt.Option(help="Split to evaluate on; validation, val or test.", rich_help_panel=opt.DATA),
    ] = None,
    eval_images: opt.EvalImages = None,
    data_root: opt.DataRoot = None,
    class_map: opt.ClassMap = None,
    skip_bad_images: opt.SkipBad = False,
    mean: opt.Mean = None,
    std: opt.Std = None,
    crop_pct: opt.CropPct = None,
    interpolation: opt.Interpolation = None,
    batch_size: opt.BatchSize = 32,
    workers: opt.Workers = None,
    device: opt.Device = "auto",
    seed: opt.Seed = 0,
    overwrite: opt.Overwrite = False,
    json_output: opt.Json = False,
) -> None:
    """Compress MODEL to a budget and write a small model that loads without the original.

    Calibrates on images of DATA (labels are not used), chooses ranks, factors, and evaluates before and after.

    [dim]comcat compress deit_small_patch16_224 --data imagenet/ --keep 0.5 --out deit-half[/dim]
    """
    settings = dict(locals())
    budget = _budget(plan_file, keep, keep_macs, max_params, max_macs, of)
    args = parse_model_args(model_arg)
    if data is None and not data_free and not (calibration_file and calibration_file.is_file()):
        raise typer.BadParameter("give --data DATA to calibrate on, or --data-free", param_hint="--data")
    if data_free and (calibration_file or fisher or calibration_images or method == "probe"):
        raise typer.BadParameter(
            "goes without images, so without --calibration, --calibration-images, --fisher and --method probe",
            param_hint="--data-free",
        )
    screen = Screen(json_output)
    with screen:
        from ..files import check_free
        from ..plan import Plan

        check_free(out, overwrite)
        check_input_file(plan_file, "--plan")
        check_input_file(checkpoint, "--checkpoint")
        given = Plan.load(plan_file) if plan_file else None
        reading = data and Reading(
            data, data_root, class_map, skip_bad_images, mean, std, crop_pct, interpolation
        )
        job = _Job(screen, settings, reading or None, budget, given)
        job.load(model, checkpoint, args, parse_device(device))
        job.open_data()
        job.run()
    job.show()


def _budget(
    plan: Path | None,
    keep: float | None,
    keep_macs: float | None,
    max_params: str | None,
    max_macs: str | None,
    of: str,
) -> Budget | None:
    given = [value for value in (keep, keep_macs, max_params, max_macs) if value is not None]
    if plan is not None and given:
        raise typer.BadParameter("a plan has its ranks already: leave the budget out", param_hint="--plan")
    if plan is None and len(given) != 1:
        raise typer.BadParameter(
            "give exactly one of --keep, --keep-macs, --max-params and --max-macs", param_hint="budget"
        )
    most_params = parse_count(max_params, "--max-params")
    most_macs = parse_count(max_macs, "--max-macs")
    if plan is not None:
        return None
    from ..plan import Budget

    return Budget(
        params=most_params if keep is None else keep,
        macs=most_macs if keep_macs is None else keep_macs,
        of=of,
    )


@dataclass
class _Outcome:
    """Everything that is shown and written."""

    plan: Plan
    report: Report
    columns: list[Measured]
    calibration: dict[str, Any] | None
    evaluated_on: str | None
    skipped: dict[str, str]


class _Job:
    """One run of the command: load, check, calibrate, plan, compress, evaluate, write."""

    def __init__(
        self,
        screen: Screen,
        settings: dict[str, Any],
        reading: Reading | None,
        budget: Budget | None,
        plan: Plan | None,
    ) -> None:
        self.screen, self.settings, self.reading, self.budget, self.plan = (
            screen,
            settings,
            reading,
            budget,
            plan,
        )
        self.parts = tuple(p.strip() for p in settings["parts"].split(",") if p.strip())
        self.calibration: Calibration | None = None
        self.calibration_batches: ImageLoader | None = None
        self.eval_batches: ImageLoader | None = None
        self.outcome: _Outcome | None = None

    def load(self, name: str, checkpoint: Path | None, args: dict[str, Any], device: torch.device) -> None:
        """The model, and everything about the job that can be checked against it."""
        import torch

        import comcat

        from ..calibration import Calibration
        from ..hosts import find_sites
        from ..sites import check_finite, check_parts

        torch.manual_seed(self.settings["seed"])
        self.model: nn.Module = (
            comcat.load_model(name, checkpoint=checkpoint, model_args=args).to(device).eval()
        )
        check_parts(self.parts)
        inventory = find_sites(self.model)
        check_finite(self.model)
        self.dense = comcat.profile(self.model)
        if self.budget is not None and self.budget.of == "model":
            cost = getattr(self.dense, self.budget.unit)
            self.budget.absolute(cost, cost)  # refuses what the dense model meets already
        if self.plan is not None:
            self.plan.check(inventory)
        path = self.settings["calibration_file"]
        if path is not None and path.is_file():
            self.calibration = Calibration.load(path)
            self.calibration.check(inventory)
            self._check_calibration(self.calibration, path)

    def _check_calibration(self, calibration: Calibration, path: Path) -> None:
        from ..errors import CalibrationError

        wanted = self.settings["calibration_images"]
        if wanted is not None and wanted != calibration.num_images:
            raise CalibrationError(
                f"{path} holds statistics of {calibration.num_images} images, not {wanted}. "
                "Leave --calibration-images out or name another file"
            )
        if self.settings["fisher"] and not calibration.fisher:
            raise CalibrationError(f"{path} was made without --fisher. Leave it out or name another file")
        self.screen.note(f"calibration read from {path} ({calibration.num_images} images)")

    def open_data(self) -> None:
        """Both splits, checked before any of them is used."""
        from ..data import calibration_batches, loader

        s, reading = self.settings, self.reading
        if reading is None:
            return
        config = reading.configure(self.model)
        calibration_data = evaluation_data = None
        if self.calibration is None and not s["data_free"]:
            calibration_data = reading.open(
                s["calibration_split"] or s["split"], "calibration", config, None, s["seed"]
            )
            self.calibration_batches = calibration_batches(
                calibration_data, s["calibration_images"], s["batch_size"], s["seed"], s["workers"]
            )
        if not s["no_eval"]:
            evaluation_data = reading.open_labelled(
                s["eval_split"] or s["split"], config, self.model, self.screen
            )
            self.eval_batches = loader(evaluation_data, s["batch_size"], s["workers"], s["eval_images"])
        self._explain(calibration_data, evaluation_data)

    def _explain(
        self, calibration: ImageData | StreamData | None, evaluation: ImageData | StreamData | None
    ) -> None:
        """Say what was chosen where the user did not choose."""
        either = calibration or evaluation
        if either is not None and either.as_is:
            size = "x".join(str(n) for n in either.input_size[1:])
            self.screen.note(f"the images already are {size}, so they are neither resized nor cropped")
        if calibration is not None and evaluation is not None:
            if calibration.split == evaluation.split:
                self.screen.note("calibration and evaluation share their images: there is one split only")
            else:
                self.screen.note(f"calibrates on {calibration.split!r}, evaluates on {evaluation.split!r}")

    def run(self) -> None:
        """The long part; nothing is written to the output directory before all of it has succeeded."""
        import comcat

        try:
            self._calibrate()
            plan = self.plan or self._make_plan()
            before = self._evaluate("evaluate dense")
            dense_bytes = _bytes(self.model)
            report = comcat.compress_(
                self.model, plan, calibration=self.calibration, progress=self.screen.progress
            )
            after = self._evaluate("evaluate compressed")
        except KeyboardInterrupt as interrupt:
            path = self.settings["calibration_file"]
            if path is not None and path.is_file():
                interrupt.kept = f"no model was written, the calibration is in {path}"  # type: ignore[attr-defined]
            raise
        self._write(plan, report, dense_bytes, before, after)

    def _calibrate(self) -> None:
        import comcat

        if self.calibration_batches is None:
            return
        self.calibration = comcat.calibrate(
            self.model,
            self.calibration_batches,
            fisher=self.settings["fisher"],
            seed=self.settings["seed"],
            progress=self.screen.progress,
        )
        report_skipped(self.screen, self.calibration_batches.skipped)
        wanted = self.settings["calibration_images"]
        if wanted and self.calibration.num_images < wanted:
            from ..errors import DataError

            raise DataError(
                f"only {self.calibration.num_images} of the {wanted} calibration images can be read. "
                f"Use --calibration-images {self.calibration.num_images} or add images"
            )
        self._save_calibration()

    def _save_calibration(self) -> None:
        if self.settings["calibration_file"] is not None and self.calibration is not None:
            self.calibration.save(self.settings["calibration_file"])

    def _make_plan(self) -> Plan:
        import comcat

        assert self.budget is not None
        probes = len(json.dumps(self.calibration.probes)) if self.calibration else 0
        plan = comcat.plan(
            self.model,
            self.budget,
            calibration=self.calibration,
            method=self.settings["method"],
            parts=self.parts,
            rank_multiple=self.settings["rank_multiple"],
            progress=self.screen.progress,
        )
        if self.calibration is not None and len(json.dumps(self.calibration.probes)) != probes:
            self._save_calibration()  # with what was probed, which took longest
        return plan

    def _evaluate(self, stage: str) -> Evaluation | None:
        if self.eval_batches is None:
            return None
        from ..evaluate import evaluate

        return evaluate(self.model, self.eval_batches, progress=self.screen.stage(stage))

    def _write(
        self,
        plan: Plan,
        report: Report,
        dense_bytes: int,
        before: Evaluation | None,
        after: Evaluation | None,
    ) -> None:
        import comcat

        from ..checkpoint import TENSORS_NAME
        from ..errors import ComcatError
        from ..files import atomic_directory
        from ..report.figures import draw_kept
        from ..report.tables import Measured

        dense = Measured("dense", report.params_before, report.macs_before, dense_bytes, before)
        with atomic_directory(self.settings["out"], self.settings["overwrite"]) as stage:
            comcat.save(self.model.cpu(), stage, overwrite=True)
            written = (stage / TENSORS_NAME).stat().st_size
            small = Measured("compressed", report.params_after, report.macs_after, written, after)
            skipped = self.eval_batches.skipped if self.eval_batches else {}
            data = self.eval_batches.data if self.eval_batches else None
            place = f"{data.name}, split {data.split}" if data and data.split else data.name if data else None
            made = self.calibration
            facts = {"images": made.num_images, "fisher": made.fisher} if made else None
            self.outcome = _Outcome(plan, report, [dense, small], facts, place, skipped)
            plan.save(stage / "plan.json")
            (stage / "report.json").write_text(json.dumps(self.document(), indent=1, default=str) + "\n")
            try:
                draw_kept(report, stage / "report.png", *self._titles(self.outcome))
            except ComcatError as error:
                self.screen.note(f"no report.png: {error}")

    def _titles(self, outcome: _Outcome) -> tuple[str, str]:
        from ..report.format import count

        dense, small = outcome.columns
        title = f"{self.settings['model']}: {count(dense.params)} → {count(small.params)} parameters"
        subtitle = f"what every layer kept · MACs {count(dense.macs)} → {count(small.macs)}"
        if dense.evaluation and small.evaluation:
            subtitle += f" · top-1 {dense.evaluation.top1:.2f} → {small.evaluation.top1:.2f} %"
        return title, subtitle

    def document(self) -> dict[str, Any]:
        """The outcome for machines: the ``--json`` document and ``report.json``."""
        outcome = self.outcome
        assert outcome is not None
        return {
            "model": self.settings["model"],
            "out": str(self.settings["out"]),
            "method": outcome.plan.method,
            "seed": self.settings["seed"],
            "calibration": outcome.calibration,
            "evaluated_on": outcome.evaluated_on,
            "skipped_images": outcome.skipped,
            "dense": outcome.columns[0].to_dict(),
            "compressed": outcome.columns[1].to_dict(),
            "report": outcome.report.to_dict(),
        }

    def show(self) -> None:
        """Print the outcome."""
        from ..report import tables

        outcome, out = self.outcome, self.screen.out
        assert outcome is not None
        report_skipped(self.screen, outcome.skipped)
        where = f", evaluated on {outcome.evaluated_on}" if outcome.evaluated_on else ", not evaluated"
        out.print()
        out.print(tables.layers(outcome.report))
        if dense := tables.left_dense(outcome.report):
            out.print(dense)
        out.print(
            tables.comparison(
                outcome.columns, f"{self.settings['model']}, ranks by {outcome.plan.method}{where}"
            )
        )
        target = self.settings["out"]
        out.print(f"written to [bold]{target}[/bold]: comcat.load({str(target)!r})")
        self.screen.result(self.document())


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())
