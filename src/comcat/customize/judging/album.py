"""The pictures of one contestant in a folder: drawn once, kept, and found again by prompt and seed.

    FOLDER/album.json                        what they were drawn with, and how long that took
    FOLDER/a-dog-in-the-snow-3f9c01b2-seed0.png

Every picture appears whole or not at all, so that what an interrupted run has drawn is there for the next one.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import CheckpointError, DataError
from ...progress import Progress
from ...storage.atomic import atomic_file
from ...storage.manifest import Manifest
from ...storage.reader import read_json, shown, validated
from ...wording import slug
from ..generation import FLAGGED, Drawing, draw
from ..pictures import as_png
from .peak import peak_memory

_RECORD = "album.json"
#: A prompt and a seed.
Job = tuple[str, int]


@dataclass
class DrawingCost:
    """What drawing took.

    Attributes:
        device: where; batch_size: pictures at a time; seconds: per picture, one entry a batch.
        peak_bytes: most memory at a time, of the GPU (allocated by PyTorch) or of the process (resident, Linux); None
            where it cannot be told.
        flagged: names of pictures that the pipeline's safety checker has blackened.
    """

    device: str = ""
    batch_size: int = 0
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    flagged: list[str] = field(default_factory=list)

    @property
    def per_picture(self) -> float | None:
        """Seconds, the median of the batches; the first one, which warms up, counts only where it is alone."""
        return statistics.median(self.seconds[1:] or self.seconds) if self.seconds else None


class Album:
    """
    Args:
        settings: plain data that decides how pictures come out, beside prompt and seed.

    Raises:
        CheckpointError: the folder's pictures were drawn with other settings, and ``overwrite`` is off.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        self.cost = DrawingCost()
        self.manifest = Manifest(folder)
        record = folder / _RECORD
        if record.is_file():
            kept = read_json(record, what="record of pictures")
            if (
                not isinstance(kept, dict)
                or set(kept) != {"settings", "cost"}
                or not isinstance(kept["settings"], dict)
            ):
                raise CheckpointError(f"'{record}' is damaged; remove the folder, or choose another --out")
            if kept["settings"] == self.settings and not overwrite:
                self.cost = validated(DrawingCost, kept["cost"], f"'{record}'")
                return
            if not overwrite and self._pictures():
                raise CheckpointError(
                    f"the pictures in '{folder}' were drawn with {_difference(kept['settings'], self.settings)}; give "
                    "--overwrite to draw them again, or choose another --out"
                )
            for name in self._pictures():
                self.manifest.remove(name)
        elif folder.is_dir() and any(folder.iterdir()):
            raise CheckpointError(f"'{folder}' holds something else than pictures of a judgement; choose another --out")
        self._write_record()

    def path(self, prompt: str, seed: int) -> Path:
        """Where the picture is, or will be."""
        sha = hashlib.sha256(prompt.encode()).hexdigest()[:8]
        return self.folder / f"{slug(prompt)}-{sha}-seed{seed}.png"

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """Those that are not drawn yet, each once."""
        drawn = set(self._pictures())
        return [job for job in dict.fromkeys(jobs) if self.path(*job).name not in drawn]

    def _pictures(self) -> list[str]:
        """Names of those that are drawn."""
        return [n for n in self.manifest.files if n.endswith(".png") and (self.folder / n).is_file()]

    def draw(
        self,
        pipe: Any,
        jobs: Sequence[Job],
        drawing: Drawing,
        batch_size: int,
        progress: Progress | None = None,
        stage: str = "draw",
    ) -> None:
        """Draw what is missing, batch by batch.

        Raises:
            DataError: the pipeline cannot draw this.
        """
        missing = self.missing(jobs)
        if not missing:
            return
        device = pipe.device if hasattr(pipe, "device") else "cpu"
        if (self.cost.device, self.cost.batch_size) != (str(device), batch_size):
            # What it took before compares no more.
            self.cost = DrawingCost(str(device), batch_size, flagged=self.cost.flagged)
        done = 0
        try:
            with peak_memory(device) as peak:
                start = time.perf_counter()
                for images in draw(pipe, missing, drawing, batch_size):
                    self.cost.seconds.append((time.perf_counter() - start) / len(images))
                    for job, image in zip(missing[done : done + len(images)], images, strict=True):
                        self._keep(self.path(*job), image)
                    done += len(images)
                    if progress:
                        progress(stage, done, len(missing))
                    start = time.perf_counter()
        finally:
            found = [n for n in (self.cost.peak_bytes, peak.bytes) if n is not None]
            self.cost.peak_bytes = max(found, default=None)
            self._write_record()

    def _keep(self, path: Path, image: Image.Image) -> None:
        self.manifest.write(path.name, as_png(image))
        if image.info.get(FLAGGED):
            self.cost.flagged.append(path.name)

    def _write_record(self) -> None:
        content = {"settings": self.settings, "cost": asdict(self.cost)}
        with atomic_file(self.folder / _RECORD) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())


def read_picture(path: Path) -> Image.Image:
    """A picture of an album.

    Raises:
        DataError: it cannot be read any more.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"the picture '{path}' is damaged ({error}); remove it, and it is drawn again") from error


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first setting that is not as it was, with both values."""
    name = next(name for name in (*new, *old) if old.get(name) != new.get(name))
    return f"{name.replace('_', ' ')} {shown(old.get(name))}, not {shown(new.get(name))}"
