"""What the tab "Compress" asks for, as the arguments of ``comcat compress`` and of the report behind it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ..errors import ComcatError
from .command_job import CommandJob
from .work import DONE

METHODS = ("auto", "probe", "spectrum", "uniform")
#: What a budget is a share of -> the option.
SHARES = {"parameters": "--keep", "multiply-adds (MACs)": "--keep-macs", "time on this machine": "--keep-latency"}
WORDS = {
    "--calibration-images": "“Calibration images”",
    "--data": "“Images”",
    "--eval-images": "“Images to measure on”",
    "--method": "“Method”",
    "--out": "“Output folder”",
    "--overwrite": "“Replace”",
    "or overwrite it": "or tick “Replace”",
    "--skip-bad-images": "“Leave out images that cannot be read”",
}


@dataclass(frozen=True)
class CompressForm:
    """What one compression is told.

    Attributes:
        model: as the command takes it; images: "" for the weights alone; out: of the small model.
        share: of ``of`` (one of SHARES), which is kept; 0 to 1. method: None for the command's own.
        measure: whether accuracy and speed are measured; calibration_images, eval_images: None for the command's own.
    """

    model: str
    images: str
    out: str
    share: float
    of: str = "parameters"
    method: str | None = None
    measure: bool = True
    calibration_images: int | None = None
    eval_images: int | None = None
    skip_bad: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """What can be said at once.

        Raises:
            ComcatError: something is missing, or does not go together.
        """
        if not self.model.strip():
            raise ComcatError("there is no model yet; write a timm name, or the directory of a model")
        if not self.out.strip():
            raise ComcatError("there is no output folder yet; write where the small model is to go")
        if not self.images.strip() and self.method in ("auto", "probe"):
            raise ComcatError(
                f"the method {self.method} measures on images, and there are none. Give a folder of images, or take "
                "the method spectrum or uniform, which work on the weights alone"
            )

    @property
    def calibration(self) -> Path:
        """Where statistics are kept until the model is written, so that a run that is stopped can go on.

        The name says of what they are: other images are never taken for these.
        """
        told = f"{self.model.strip()}\0{self.images.strip()}\0{self.calibration_images}"
        out = Path(self.out.strip())
        return out.with_name(f"{out.name}.calibration-{hashlib.sha256(told.encode()).hexdigest()[:8]}.safetensors")

    def arguments(self, device: list[str]) -> list[str]:
        """Of the command."""
        numbers = (("--calibration-images", self.calibration_images), ("--eval-images", self.eval_images))
        images = self.images.strip()
        return [
            *("compress", self.model.strip(), "--out", self.out.strip(), SHARES[self.of], f"{self.share:g}"),
            *(["--data", images, "--calibration", str(self.calibration)] if images else ["--data-free"]),
            *(["--method", self.method] if self.method else []),
            *(part for option, value in numbers if value and images for part in (option, str(value))),
            *(["--skip-bad-images"] if self.skip_bad and images else []),
            *([] if self.measure and images else ["--no-eval"]),
            *(["--overwrite"] if self.overwrite else []),
            *device,
        ]


class CompressionJob(CommandJob):
    """A compression and its report.

    Attributes:
        out: of the small model; page: the report; form: what it was told.
    """

    kind = "compress"

    def __init__(self, form: CompressForm, device: list[str]) -> None:
        from ..report.page import PAGE_NAME  # with PyTorch

        form.check()
        self.form, self._device = form, device
        self.out = Path(form.out.strip())
        self.page = self.out / PAGE_NAME
        # Spectra are those of activations where there are statistics.
        spectra = ["--calibration", str(form.calibration)] if form.images.strip() else []
        report = ["report", str(self.out), "--overwrite", "--dense", form.model.strip(), *spectra, *device]
        commands = (form.arguments(device), report)
        super().__init__(f"Compressing {form.model.strip()}", *commands, words=compress_words)

    def run(self) -> None:
        super().run()
        self.form.calibration.unlink(missing_ok=True)

    @property
    def resumable(self) -> bool:
        """Whether it ended before its end, with something gathered."""
        return self.over and self.state != DONE and self.form.calibration.exists()

    def again(self) -> CompressionJob:
        """The same once more, with the statistics that are there."""
        return CompressionJob(self.form, self._device)


def compress_words(text: str) -> str:
    """A message of the command in the words of the page."""
    for option, label in sorted(WORDS.items(), key=lambda pair: -len(pair[0])):
        text = text.replace(option, label)
    return text
