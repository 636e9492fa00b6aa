"""What ``comcat demo`` runs: train, compress, fine-tune and compare on this machine, in a minute or two, offline."""

from __future__ import annotations

import copy
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

import comcat
from comcat.cli.inputs import Reading
from comcat.data import calibration_batches, loader
from comcat.data.loading import ImageData
from comcat.data.training_set import training_loader
from comcat.errors import CheckpointError
from comcat.evaluation.measure import evaluate
from comcat.evaluation.speed import throughput
from comcat.report import tables
from comcat.report.tables import Measured
from comcat.storage.atomic import atomic_directory, claimed_output

from . import vit
from .layouts import VIT_DEMO
from .one_thread import one_thread
from .vit_figure import draw_demo

if TYPE_CHECKING:
    from comcat import Report
    from comcat.calibration.statistics import Calibration
    from comcat.cli.console import Screen

BUDGETS = (0.7, 0.5, 0.3, 0.2, 0.1)  # the last one is fine-tuned
SHOWN = (0.5, 0.3)  # the budgets whose layers are shown, the larger one first
SAVED = 0.5
TUNING_EPOCHS = 10
DIGITS_SHOWN = 14


class VitDemo:
    """One run, made beside DIR and given its name when all is done."""

    def __init__(self, screen: Screen, out: Path, stage: Path, seed: int, epochs: int | None) -> None:
        self.screen, self.out, self.stage, self.seed, self.epochs = screen, out, stage, seed, epochs
        self.columns: list[Measured] = []
        self.models: list[nn.Module] = []
        self.reports: dict[float, Report] = {}

    def prepare(self) -> None:
        """The digits as PNG files, and the untrained model."""
        torch.manual_seed(self.seed)
        vit.write_digits(self.stage / "digits", self.seed)
        self.model: nn.Module = vit.build(self.seed)
        self.train_data, self.test_data = self._open("train"), self._open("test")

    def _open(self, split: str) -> ImageData:
        reading = Reading(str(self.stage / "digits"))
        data = reading.open(split, "evaluation", reading.configure(self.model), 10)
        assert isinstance(data, ImageData)
        return data

    def train(self) -> None:
        batches = list(loader(self.train_data))
        images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
        vit.train(self.model, images, labels, epochs=self.epochs, seed=self.seed, progress=self.screen.progress)
        save_file(self.model.state_dict(), self.stage / "dense.safetensors")

    def compress(self) -> None:
        """Calibrate once, then compress to every budget from the same statistics."""
        batches = calibration_batches(self.train_data, 1024, seed=self.seed)
        calibration = comcat.calibrate(self.model, batches, fisher=True, seed=self.seed, progress=self.screen.progress)
        self.test_batches = loader(self.test_data, batch_size=50)
        self._measure("dense", self.model)
        for budget in BUDGETS:
            self._compress_to(budget, calibration)

    def _compress_to(self, budget: float, calibration: Calibration) -> None:
        name = f"{budget:.0%}"
        plan = comcat.plan(
            self.model,
            comcat.Budget(params=budget),
            calibration=calibration,
            progress=self.screen.stage(f"choose ranks for {name}"),
        )
        small = comcat.compress(self.model, plan, calibration=calibration)
        self.reports[budget] = small.comcat.report  # type: ignore[union-attr, assignment]
        if budget == SAVED:
            comcat.save(small, self.stage / "model")
            self.identical = self._same(small, comcat.load(self.stage / "model"))
        if budget == SHOWN[-1]:
            self.shown = small
        self._measure(name, small)

    def finetune(self) -> None:
        """Train the smallest model a little, with the dense one as its teacher."""
        tuned = copy.deepcopy(self.models[-1])
        loader = training_loader(self.train_data, 64, seed=self.seed)
        config = comcat.FinetuneConfig(
            epochs=TUNING_EPOCHS, lr=1e-3, warmup_epochs=0.5, distillation_weight=0.9, seed=self.seed
        )
        comcat.finetune(tuned, self.model, loader, None, config, progress=self._tuning, cpu=True)
        comcat.save(tuned, self.stage / "finetuned")
        self._measure(f"{BUDGETS[-1]:.0%} tuned", tuned)
        self._time()

    def _tuning(self, _: str, done: int, total: int | None) -> None:
        self.screen.progress(f"fine-tune the one at {BUDGETS[-1]:.0%}", done, total)

    def _time(self) -> None:
        images = next(iter(self.test_batches))[0]
        speeds = throughput(self.models, images)
        self.columns = [replace(c, speed=speed) for c, speed in zip(self.columns, speeds, strict=True)]

    def _measure(self, name: str, model: nn.Module) -> None:
        cost = comcat.profile(model)
        result = evaluate(model, self.test_batches, progress=self.screen.stage(f"evaluate {name}"))
        size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        self.models.append(model)
        self.columns.append(Measured(name, cost.params, cost.macs, size, result))

    def _same(self, small: nn.Module, again: nn.Module) -> bool:
        """Whether a model that was saved and loaded is the same: its tensors bitwise, its outputs to rounding.

        Tensors that are equal may lie differently in memory, and then go through kernels that round differently.
        """
        tensors = again.state_dict()
        if any(not torch.equal(tensor, tensors[name]) for name, tensor in small.state_dict().items()):
            return False
        with torch.no_grad():
            pairs = [(small(images), again(images)) for images, _ in self.test_batches]
        return all(float((a - b).abs().max()) <= 1e-5 * float(a.abs().max()) for a, b in pairs)

    def write(self) -> None:
        """The picture, the report, and the saved model at the top of the directory."""
        if not self.identical:
            raise CheckpointError("the saved model differs from the one in memory. Please report this")
        *points, tuned = [(c.name, c.params, c.evaluation.top1) for c in self.columns if c.evaluation]
        reports = {f"{b:.0%} kept": self.reports[b] for b in SHOWN}
        draw_demo(
            points,
            tuned,
            reports,
            self._answers(),
            self.stage / "report.png",
            "A vision transformer for handwritten digits, compressed by comcat",
            "trained once, compressed without further training, the smallest then fine-tuned; below, test digits and "
            f"the answers of the model at {SHOWN[-1]:.0%}",
        )
        (self.stage / "report.json").write_text(json.dumps(self._document(), indent=1) + "\n")
        for file in (self.stage / "model").iterdir():
            file.rename(self.stage / file.name)
        (self.stage / "model").rmdir()

    def _answers(self) -> list[tuple[Any, int, int]]:
        """Some test digits, evenly spread, with the answers of the model whose layers are shown."""
        step = len(self.test_data) // DIGITS_SHOWN
        samples = [self.test_data[i * step + 2] for i in range(DIGITS_SHOWN)]
        with torch.no_grad():
            answers = self.shown(torch.stack([image for image, _ in samples])).argmax(1).tolist()
        pictures = [((image[0].numpy() + 1) / 2, label) for image, label in samples]
        return [(picture, label, answer) for (picture, label), answer in zip(pictures, answers, strict=True)]

    def _document(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "seed": self.seed,
            "reloaded_identical": self.identical,
            "models": {c.name: c.to_dict() for c in self.columns},
            "reports": {f"{budget:.0%}": report.to_dict() for budget, report in self.reports.items()},
        }

    def show(self, seconds: float) -> None:
        """Print what was measured, and how to go on from here."""
        out = self.screen.out
        out.print()
        out.print(tables.layers(self.reports[SAVED]))
        title = f"Handwritten digits, {len(self.test_data)} test images; fine-tuned in the last row only"
        out.print(tables.budgets(self.columns, title))
        folder = shlex.quote(str(self.out))
        self.screen.done(f"the model at {SAVED:.0%}, saved and loaded again, is the same")
        self.screen.done(f"all of it in {seconds:.0f} s; see ", (self.out / "report.png", "bold"))
        args = " ".join(f"--model-arg {k}={v}" for k, v in vit.MODEL_ARGS.items())
        out.print("\nYour turn:", style="bold")
        for line in (
            f"comcat evaluate {folder} --data {folder}/digits",
            f"comcat compress {vit.ARCHITECTURE} --checkpoint {folder}/dense.safetensors {args} "
            f"--data {folder}/digits --keep 0.05 --out digits-5",
            f"comcat finetune digits-5 --teacher-checkpoint {folder}/dense.safetensors --data {folder}/digits "
            "--epochs 20 --lr 1e-3 --out digits-5-tuned",
        ):
            out.print(f"  {line}", soft_wrap=True)
        self.screen.result(self._document())


def run(screen: Screen, out: Path, overwrite: bool, seed: int, epochs: int | None) -> VitDemo:
    """All of it; what was measured can be shown afterwards.

    Raises:
        ComcatError: ``out`` cannot be written, or a package of the extra ``demo`` is not installed.
    """
    with one_thread(), claimed_output(out), atomic_directory(out, overwrite, VIT_DEMO) as stage:
        made = VitDemo(screen, out, stage, seed, epochs)
        made.prepare()
        made.train()
        made.compress()
        made.finetune()
        made.write()
    return made
