"""What the tabs share: the place, the line of jobs, the pipeline to draw with, and files that the browser may see."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from .drawing import Studio
from .work import Line
from .workplace import Workplace

#: Seconds between two looks at the jobs.
EVERY = 1.0


@dataclass
class Shared:
    """One page, for all of its windows.

    Attributes:
        line: the jobs; studio: the pipeline that pictures are drawn with.
        scratch: files that go with the page: uploads, copies of what is shown, statistics of a compression.
    """

    place: Workplace
    line: Line = field(default_factory=Line)
    scratch: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="comcat-ui-")))

    def __post_init__(self) -> None:
        self.studio = Studio(self.place)

    def shown(self, path: str | Path) -> str:
        """A copy that the browser may ask for: the page serves nothing outside its scratch folder."""
        path = Path(path)
        stamp = path.stat()
        key = hashlib.sha256(f"{path.resolve()} {stamp.st_mtime_ns} {stamp.st_size}".encode()).hexdigest()[:16]
        copy = self.scratch / "shown" / key / path.name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        return str(copy)

    def close(self) -> None:
        """End all jobs and drop what goes with the page."""
        self.line.close()
        shutil.rmtree(self.scratch, ignore_errors=True)
