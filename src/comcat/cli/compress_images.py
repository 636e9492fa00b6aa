"""The images of one run of ``comcat compress``: to calibrate on, to evaluate on, and to learn ranks on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .compress_settings import CompressSettings
from .console import Screen
from .inputs import Reading
from .judging import Judge, refuse_text

if TYPE_CHECKING:
    from torch import nn

    from ..data.loading import ImageData, ImageLoader, StreamData
    from ..report.tables import Measured


class CompressImages:
    """Batches of every use, None where there is none; ``search`` is a loader of training images.

    Args:
        reading: how images are read; None without data.
    """

    def __init__(self, screen: Screen, settings: CompressSettings, reading: Reading | None) -> None:
        self.screen, self.settings, self.reading = screen, settings, reading
        self.calibration: ImageLoader | None = None
        self.evaluation: ImageLoader | None = None
        self.search: Any = None

    def open(self, model: nn.Module, calibrated: bool) -> None:
        """All splits, checked before any of them is used.

        Args:
            calibrated: the statistics are there already.
        """
        from ..data import calibration_batches, loader

        s, reading = self.settings, self.reading
        if reading is None:
            return
        config = reading.configure(model)
        calibration = evaluation = None
        if not calibrated and not s.data_free:
            refuse_text(model)
            calibration = reading.open(s.calibration_split, "calibration", config, None, s.seed)
            self.calibration = calibration_batches(calibration, s.calibration_images, s.batch_size, s.seed, s.workers)
        if s.evaluate:
            device = next(model.parameters()).device
            self.judge = Judge(s.judging, reading, s.eval_split, model, s.model, device, self.screen, True)
            evaluation = self.judge.data
            self.evaluation = loader(evaluation, s.batch_size, s.workers, s.eval_images)
        if s.search is not None:
            self.search = s.search.open(reading, model, evaluation, self.screen)
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

    def evaluate(self, models: list[nn.Module], columns: list[Measured], timed: int | None) -> list[Measured]:
        """The columns with accuracy, one model after the other, and speed, in turns; unchanged without evaluation.

        Args:
            timed: how many images a batch has whose speed is measured; as many as are evaluated by default.
        """
        import torch

        from ..evaluation.measure import evaluate
        from ..evaluation.speed import throughput

        if self.evaluation is None:
            return columns
        measured = []
        for model, column in zip(models, columns, strict=True):
            result = evaluate(
                model,
                self.evaluation,
                progress=self.screen.stage(f"evaluate {column.name}"),
                **self.judge.arguments(models[0]),
            )
            measured.append(replace(column, evaluation=result))
        images = next(iter(self.evaluation))[0]
        if timed is not None:
            images = images[torch.arange(timed) % len(images)]
        speeds = throughput(models, images, forwards=[self.judge.call(model) for model in models])
        return [replace(column, speed=speed) for column, speed in zip(measured, speeds, strict=True)]

    @property
    def place(self) -> str | None:
        """What the model is evaluated on."""
        if self.evaluation is None:
            return None
        data = self.evaluation.data
        return f"{data.name}, split {data.split}" if data.split else data.name

    @property
    def skipped(self) -> dict[str, str]:
        """Images that could not be read, and why."""
        return {
            **(self.calibration.skipped if self.calibration else {}),
            **(self.evaluation.skipped if self.evaluation else {}),
        }
