"""The tab "Compress": a model and a budget in, a small model and its report out."""

from __future__ import annotations

from html import escape
from typing import Any

from ..errors import ComcatError
from .compress_form import CompressForm, CompressionJob, compress_words
from .setting_fields import number
from .shared import Shared
from .status_card import job_card, problem_card
from .work import DONE

AUTOMATIC = "as comcat sees fit"
IDLE = "Name a model and a folder of images, press Start. The report appears here."


class CompressTab:
    """What it does; handlers take and return plain values."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    @property
    def job(self) -> CompressionJob | None:
        job = self.shared.line.latest(CompressionJob.kind)
        return job if isinstance(job, CompressionJob) else None

    def start(
        self,
        model: str,
        images: str,
        out: str,
        percent: float,
        of: str,
        method: str,
        measure: bool,
        calibration: str,
        measured: str,
        skip_bad: bool,
        overwrite: bool,
    ) -> str:
        """Start a compression; why it cannot be, or ""."""
        try:
            form = CompressForm(
                model,
                images,
                out,
                percent / 100,
                of,
                None if method == AUTOMATIC else method,
                measure,
                number(calibration, "Calibration images", int),
                number(measured, "Images to measure on", int),
                skip_bad,
                overwrite,
            )
            self._add(CompressionJob(form, self._device))
        except ComcatError as error:
            return problem_card(compress_words(str(error)))
        return ""

    def resume(self) -> str:
        """The compression that was stopped once more, with the statistics that it had; why it cannot be, or ""."""
        job = self.job
        try:
            if job is None or not job.over or job.state == DONE:
                raise ComcatError("no compression was stopped; press Start")
            self._add(job.again())
        except ComcatError as error:
            return problem_card(compress_words(str(error)))
        return ""

    def stop(self) -> None:
        if job := self.job:
            self.shared.line.stop(job)

    def look(self) -> dict[str, Any]:
        """Everything that may have changed, as plain values."""
        job = self.job
        done = job is not None and job.state == DONE
        return {
            "card": job_card(job, self.shared.line, IDLE),
            "busy": job is not None and not job.over,
            "resumable": job is not None and job.resumable,
            "page": str(job.page) if job is not None and done else "",
            "out": str(job.out.resolve()) if job is not None and done else "",
            "command": job.typed if job is not None else "",
        }

    def report(self) -> str:
        """The report of the newest compression, in a frame that runs nothing."""
        job = self.job
        if job is None or job.state != DONE or not job.page.is_file():
            return ""
        page = escape(job.page.read_text(encoding="utf-8"), quote=True)
        return f'<iframe title="Report" sandbox="" srcdoc="{page}" class="report"></iframe>'

    @property
    def _device(self) -> list[str]:
        device = self.shared.place.device
        return ["--device", device] if device != "auto" else []

    def _add(self, job: CompressionJob) -> None:
        job.before = self.shared.studio.close
        self.shared.line.add(job)
