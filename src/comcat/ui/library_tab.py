"""The tab "Library": adapters of a folder, switched on with strengths, drawn side by side with the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ComcatError
from .areas import EVERYWHERE, mask_of
from .command_job import CommandJob
from .drawing import ChosenAdapter, DrawingJob, DrawingRequest, DrawnPicture, save_pictures
from .setting_fields import number
from .shared import Shared
from .status_card import job_card, problem_card
from .work import DONE
from .workplace import LibraryEntry, library

HEADERS = ["adapter", "base", "rank", "size", "word", "taught with"]
PICTURES = "pictures"
_IDLE = "Choose adapters, say what to draw, press Draw."


class LoraJob(CommandJob):
    """An adapter that becomes an ordinary LoRA."""

    kind = "export"


class LibraryTab:
    """Its components, and what they do; handlers take and return plain values."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    # -- what the handlers do ------------------------------------------------------------------------------------

    def entries(self) -> list[LibraryEntry]:
        return library(self.shared.place.folder)

    def draw(
        self,
        base: str,
        prompt: str,
        chosen: Sequence[str],
        told: dict[str, dict[str, Any]],
        seed: float,
        count: float,
        steps: str,
        guidance: str,
        negative: str,
        size: str,
    ) -> str:
        """Draw; why it cannot be, or "".

        Args:
            told: of adapters that are to differ from their files: ``strength``, ``area``, ``image`` (of the mask) and
                ``word``.
        """
        try:
            own = {entry.name: entry for entry in self.entries()}
            if gone := [name for name in chosen if name not in own]:
                raise ComcatError(f"there is no adapter {gone[0]!r} any more; choose others")
            adapters = tuple(self._chosen(own[name], told.get(name, {})) for name in chosen)
            request = DrawingRequest(
                base,
                prompt,
                adapters,
                int(seed),
                int(count),
                number(steps, "Steps", int),
                number(guidance, "Guidance"),
                negative.strip() or None,
                number(size, "Pixels a side", int),
            )
            self.shared.line.add(DrawingJob(self.shared.studio, request))
        except ComcatError as error:
            return problem_card(str(error))
        return ""

    def _chosen(self, entry: LibraryEntry, told: dict[str, Any]) -> ChosenAdapter:
        area = told.get("area", EVERYWHERE)
        mask = mask_of(area, told.get("image"), self.shared.scratch, entry.name)
        word = str(told.get("word") or "").strip()
        other = word if word and word != entry.word else None
        return ChosenAdapter(entry.path, told.get("strength", entry.header.scale), area, mask, other)

    def stop(self, kind: str = DrawingJob.kind) -> None:
        if job := self.shared.line.latest(kind):
            self.shared.line.stop(job)

    def pictures(self) -> list[DrawnPicture]:
        """Those of the newest drawing."""
        job = self.shared.line.latest(DrawingJob.kind)
        return list(job.pictures) if isinstance(job, DrawingJob) else []

    def save(self) -> str:
        """Write the pictures that are shown, with their settings; where, or why not."""
        pictures = self.pictures()
        try:
            if not pictures:
                raise ComcatError("there are no pictures yet; press Draw")
            folder = self.shared.place.folder / PICTURES
            paths = save_pictures(pictures, folder, pictures[0].settings["prompt"])
        except ComcatError as error:
            return problem_card(str(error))
        return f"Saved in `{folder}`: {', '.join(path.name for path in paths)}. Each holds its settings."

    def export(self, name: str | None, base: str, layout: str) -> str:
        """Write an adapter as a LoRA beside it; why it cannot be, or ""."""
        try:
            if not name:
                raise ComcatError("choose an adapter first")
            source = self.shared.place.adapter(name)
            out = source.with_name(f"{source.stem}.{layout}-lora.safetensors")
            arguments = ["adapter", "convert", str(source), str(out), "--to", layout, "--base", base.strip()]
            job = LoraJob(f"Exporting {source.stem} as a LoRA", [*arguments, *self.shared.place.options])
            job.before = self.shared.studio.close
            self.shared.line.add(job)
        except ComcatError as error:
            return problem_card(str(error))
        return ""

    def exported(self) -> str:
        """What came of the newest export: the file, and how far off it is."""
        from ..report.format import error, size

        job = self.shared.line.latest(LoraJob.kind)
        if job is None or job.state != DONE:
            return ""
        found = job.result
        drawn = found.get("output_error")
        text = f"`{found['out']}`, {size(found['bytes'])}. "
        text += f"Relative error of the products: **{error(found['relative_error'])}**"
        text += f"; of what the denoiser returns: **{error(drawn)}**." if drawn is not None else "."
        dropped = found.get("dropped") or []
        return text + (f" Not in the file: {'; '.join(dropped[:5])}." if dropped else "")

    def remove(self, name: str | None) -> str:
        """Delete the file of an adapter; what was done."""
        try:
            entry = next((entry for entry in self.entries() if entry.name == name), None)
            if entry is None:
                raise ComcatError("choose an adapter first")
            entry.path.unlink()
        except ComcatError as error:
            return problem_card(str(error))
        except OSError as error:
            return problem_card(f"'{entry.path}' cannot be removed: {error.strerror}")  # type: ignore[union-attr]
        return f"Removed `{entry.path}`."

    # -- what is shown -------------------------------------------------------------------------------------------

    def look(self) -> dict[str, Any]:
        """Everything that may have changed, as plain values."""
        line = self.shared.line
        job, export = line.latest(DrawingJob.kind), line.latest(LoraJob.kind)
        entries = self.entries()
        return {
            "table": [entry.row() for entry in entries],
            "names": [entry.name for entry in entries if entry.header],
            "card": job_card(job, line, _IDLE),
            "busy": job is not None and not job.over,
            "pictures": [id(picture) for picture in self.pictures()] if job is None or job.over else None,
            "export": job_card(export, line, "") if export else "",
            "exported": self.exported(),
        }
