"""Pictures of the base and of adapters on it, side by side at the same seeds."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ComcatError, DataError
from .areas import EVERYWHERE, OWN
from .work import Job, Stopped
from .workplace import Workplace

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ChosenAdapter:
    """An adapter that is on.

    Attributes:
        area: where it acts in words; mask: the image that says it, or None.
        word: for the one that it learned, where another is wanted.
    """

    file: Path
    scale: float
    area: str = EVERYWHERE
    mask: Path | None = None
    word: str | None = None

    @property
    def shown(self) -> str:
        where = "" if self.mask is None else f", {self.mask.name if self.area == OWN else self.area}"
        return f"{self.file.stem} {self.scale:g}{where}"


@dataclass(frozen=True)
class DrawingRequest:
    """What is to be drawn.

    Attributes:
        adapters: in the order in which they are put on.
        steps, guidance, negative_prompt, size: None for the pipeline's own; size: of both sides, in pixels.
    """

    base: str
    prompt: str
    adapters: tuple[ChosenAdapter, ...] = ()
    seed: int = 0
    count: int = 1
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    size: int | None = None

    @property
    def seeds(self) -> list[int]:
        return [*range(self.seed, self.seed + self.count)]

    @property
    def shown(self) -> str:
        """The adapters and their strengths in one line."""
        return " + ".join(adapter.shown for adapter in self.adapters)


@dataclass(frozen=True)
class DrawnPicture:
    """A picture, whose settings say all that it takes to draw it again; ``caption`` is short."""

    image: Image
    caption: str
    settings: dict[str, Any]


class Studio:
    """The pipeline that pictures are drawn with: opened once, and let go where a training needs the memory.

    Only the thread of the jobs uses it.
    """

    def __init__(self, place: Workplace) -> None:
        self.place = place
        self._base = ""
        self._pipe: Any = None

    def close(self) -> None:
        self._pipe, self._base = None, ""
        gc.collect()

    def open(self, base: str, note: Any) -> Any:
        """The pipeline of ``base`` without adapters.

        Raises:
            ModelError: it cannot be opened.
        """
        from ..cli.inputs import parse_device
        from ..customize.adapter.attached import adapters, remove_adapter
        from ..customize.pipelines import open_pipeline

        if self._pipe is None or base != self._base:
            self.close()
            device = parse_device(self.place.device)
            precision = "fp16" if device.type == "cuda" else "no"
            self._pipe = open_pipeline(base, precision, device, self.place.variant, note)
            self._base = base
        for name in adapters(self._pipe):
            remove_adapter(self._pipe, name)
        return self._pipe


class DrawingJob(Job):
    """Draws the base, then the base with the adapters; ``pictures`` has a pair for every seed, as they come."""

    kind = "library"

    def __init__(self, studio: Studio, request: DrawingRequest) -> None:
        super().__init__("Drawing")
        self.studio, self.request = studio, request
        self.pictures: list[DrawnPicture] = []
        self._halted = False

    def halt(self) -> None:
        self._halted = True

    def run(self) -> None:
        from ..cli.generate_command import AdapterOption, load_all
        from ..customize.generation import check_prompts

        asked = self.request
        if not asked.base.strip():
            raise ComcatError("there is no base model yet; write a pipeline's directory, or its name on the Hub")
        if not asked.prompt.strip():
            raise DataError("the prompt is empty; say what to draw")
        self.progress("open the base model", 0, None)
        pipe = self.studio.open(asked.base.strip(), self.notes.append)
        columns = 2 if asked.adapters else 1
        try:
            base = self._draw(pipe, 0, columns)
            drawn = []
            if asked.adapters:
                load_all(pipe, [AdapterOption(a.file, a.scale, a.word, a.mask) for a in asked.adapters])
                check_prompts(pipe, [asked.prompt])
                drawn = self._draw(pipe, 1, columns)
        finally:
            self.studio.open(asked.base.strip(), self.notes.append)  # without adapters
        for i, seed in enumerate(asked.seeds):
            self.pictures.append(DrawnPicture(base[i], f"base · seed {seed}", self._settings(seed, False)))
            if drawn:
                self.pictures.append(DrawnPicture(drawn[i], f"{asked.shown} · seed {seed}", self._settings(seed, True)))

    def _draw(self, pipe: Any, column: int, columns: int) -> list[Image]:
        """One picture per seed, each a call of its own, so that work can be stopped between them."""
        from ..customize.generation import generate

        asked, images = self.request, []
        for i, seed in enumerate(asked.seeds):
            self.progress("draw", column * asked.count + i, columns * asked.count)
            if self._halted:
                raise Stopped("No picture is kept.")
            images += generate(
                pipe,
                [asked.prompt],
                seeds=[seed],
                steps=asked.steps,
                guidance_scale=asked.guidance,
                negative_prompt=asked.negative_prompt,
                height=asked.size,
                width=asked.size,
            )[0]
        return images

    def _settings(self, seed: int, adapted: bool) -> dict[str, Any]:
        from .._version import __version__

        settings = {**asdict(self.request), "seed": seed, "comcat": __version__}
        del settings["count"]
        chosen = self.request.adapters if adapted else ()
        own = [
            {"file": str(a.file), "scale": a.scale, "where": a.shown.partition(", ")[2] or a.area, "word": a.word}
            for a in chosen
        ]
        return {**settings, "adapters": own}


def save_pictures(pictures: list[DrawnPicture], folder: Path, prompt: str) -> list[Path]:
    """Write PNGs whose entry ``comcat`` holds their settings as JSON; nothing that is there is replaced.

    Raises:
        CheckpointError: one cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    from ..cli.generate_command import slug
    from ..storage.atomic import atomic_file

    paths = []
    for number, picture in _numbered(folder, pictures):
        kind = "adapted" if picture.settings["adapters"] else "base"
        path = folder / f"{number:03d}-{slug(prompt)}-{kind}-seed{picture.settings['seed']}.png"
        entries = PngInfo()
        entries.add_itxt("comcat", json.dumps(picture.settings))
        with atomic_file(path, overwrite=False) as file:
            picture.image.save(file, format="PNG", pnginfo=entries)
        paths.append(path)
    return paths


def _numbered(folder: Path, pictures: list[DrawnPicture]) -> list[tuple[int, DrawnPicture]]:
    """One number for all pictures of a drawing, behind those that the folder has."""
    names = (path.name.partition("-")[0] for path in folder.glob("[0-9]*-*.png"))
    there = [int(name) for name in names if name.isdecimal()]
    return [(max(there, default=-1) + 1, picture) for picture in pictures]
