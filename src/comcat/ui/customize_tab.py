"""The tab "Customize": photos in, captions, settings, training with its loss and samples, the adapter out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ComcatError
from . import customize_form as forms
from .customize_form import ASKED, FIELDS, CustomizeForm, TrainingJob
from .given_photos import GivenPhoto, add_photos, photos_of
from .shared import Shared
from .status_card import job_card, problem_card
from .work import DONE
from .workplace import unfinished

#: Settings that are always seen; the others are folded away.
FIRST = ("rank", "steps", "lr", "token")
IDLE = "Add photos, press Start. The loss and samples appear here while it learns."


class CustomizeTab:
    """Its components, and what they do; handlers take and return plain values."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    # -- what the handlers do ------------------------------------------------------------------------------------

    def added(self, files: list[str] | None, photos: list[GivenPhoto]) -> tuple[list[GivenPhoto], str]:
        """(photos, what is wrong with those files that are none)."""
        photos, problems = add_photos(photos, files or [])
        kept = f" The other {len(photos)} are kept." if problems and photos else ""
        return photos, problem_card("; ".join(problems) + "." + kept if problems else "")

    def added_folder(self, folder: str, photos: list[GivenPhoto]) -> tuple[list[GivenPhoto], str]:
        """(photos, why the folder cannot be used)."""
        try:
            if not folder.strip():
                raise ComcatError("write the folder that holds the photos")
            new = photos_of(Path(folder.strip()))
        except ComcatError as error:
            return photos, problem_card(str(error))
        names = {photo.name for photo in photos}
        return [*photos, *(photo for photo in new if photo.name not in names)], ""

    def form(self, values: Sequence[Any]) -> CustomizeForm:
        """What the fields hold: those of ASKED, then those of FIELDS."""
        asked = dict(zip(ASKED, values, strict=False))
        held = zip(FIELDS, values[len(ASKED) :], strict=True)
        return CustomizeForm(**asked, settings={field.name: field.read(value) for field, value in held})

    def start(self, name: str, photos: list[GivenPhoto], *values: Any) -> str:
        """Start a training; why it cannot be, or ""."""
        try:
            form = self.form(values)
            self._busy()
            self._add(forms.start(self.shared.place, name, form, photos))
        except ComcatError as error:
            return problem_card(forms.page_words(str(error)))
        return ""

    def resume(self, name: str | None, photos: list[GivenPhoto], *values: Any) -> str:
        """Go on with a training that was stopped; why it cannot be, or ""."""
        try:
            if not name:
                raise ComcatError("no training is left to go on with; press Start for a new one")
            form = self.form(values)
            self._busy()
            self._add(forms.resume(self.shared.place, name, form, photos))
        except ComcatError as error:
            return problem_card(forms.page_words(str(error)))
        return ""

    def stop(self) -> None:
        if job := self.job:
            self.shared.line.stop(job)

    @property
    def job(self) -> TrainingJob | None:
        job = self.shared.line.latest(TrainingJob.kind)
        return job if isinstance(job, TrainingJob) else None

    def _busy(self) -> None:
        """Refuse before photos are written: those of a training that is on must stay."""
        if (job := self.job) is not None and not job.over:
            raise ComcatError(f"“{job.title}” is {job.state} already, perhaps from another window. Wait, or stop it")

    def _add(self, job: TrainingJob) -> None:
        job.before = self.shared.studio.close
        self.shared.line.add(job)

    # -- what is shown -------------------------------------------------------------------------------------------

    def look(self) -> dict[str, Any]:
        """Everything that may have changed, as plain values."""
        job = self.job
        open_runs = unfinished(self.shared.place.folder)
        if job is not None and not job.over and job.name in open_runs:
            open_runs.remove(job.name)
        return {
            "card": job_card(job, self.shared.line, IDLE),
            "busy": job is not None and not job.over,
            "losses": forms.losses(job.folder) if job is not None and job.started else [],
            "samples": forms.samples(job.folder) if job is not None and job.started else [],
            "file": str(job.file) if job is not None and job.state == DONE else None,
            "command": job.typed if job is not None else "",
            "runs": open_runs,
        }
