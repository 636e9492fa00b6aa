"""What the tab "Customize" asks for, as the arguments of ``comcat customize``, and what a run has to show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..customize.teaching.customize_config import CustomizeConfig
from ..errors import ComcatError, TrainingError
from ..training.log import METRICS, SAMPLES
from .command_job import CommandJob
from .given_photos import GivenPhoto, read_told, write_photos
from .setting_fields import as_arguments, fields_of
from .workplace import Workplace

#: Of numbers in the file; the second is the command's own choice.
STORAGES = ("float32", "float16", "bfloat16", "int8", "nf4")
FIELDS = fields_of(CustomizeConfig)
#: Where the page begins; all else is the command's own default. Samples are drawn: here is a place to see them.
START = {"validate_every": 100}
#: Options of the command -> what the page calls them, in messages.
WORDS = {
    "--allow-upscale": "“Enlarge small photos”",
    "--class-images": "“Class images”",
    "--class-prompt": "“Class prompt”",
    "--max-bytes": "“Largest file”",
    "--out": "“Name”",
    "--overwrite": "“Replace”",
    "--prompt": "“Prompt”",
    "--resume (resume=True)": "“Resume”",
    "--resume": "“Resume”",
    **{field.option: f"“{field.label}”" for field in FIELDS if len(field.option) > 4},
}


@dataclass(frozen=True)
class CustomizeForm:
    """What one training is told; ``settings`` are values of :class:`CustomizeConfig` by their names."""

    base: str
    prompt: str
    class_prompt: str = ""
    class_images: str = ""
    storage: str = STORAGES[1]
    max_bytes: str = ""
    allow_upscale: bool = False
    overwrite: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """What can be said at once.

        Raises:
            ComcatError: a setting is out of range, or something is missing.
        """
        if not self.base.strip():
            raise ComcatError("there is no base model yet; write a pipeline's directory, or its name on the Hub")
        CustomizeConfig.from_dict(self.settings)

    def arguments(self, place: Workplace, name: str, resume: bool) -> list[str]:
        """Of the command."""
        flags = (("--allow-upscale", self.allow_upscale), ("--resume", resume), ("--overwrite", self.overwrite))
        texts = (
            ("--prompt", self.prompt),
            ("--class-prompt", self.class_prompt),
            ("--class-images", self.class_images),
            ("--storage", self.storage if self.storage != STORAGES[1] else ""),
            ("--max-bytes", self.max_bytes),
        )
        return [
            *("customize", self.base.strip(), "--images", str(place.photos(name)), "--out", str(place.adapter(name))),
            *(part for option, text in texts if text.strip() for part in (option, text.strip())),
            *as_arguments(FIELDS, self.settings),
            *(option for option, wanted in flags if wanted),
            *place.options,
        ]


#: What the page asks for beside the settings, in the order in which it is handed over.
ASKED = [entry.name for entry in fields(CustomizeForm) if entry.name != "settings"]


class TrainingJob(CommandJob):
    """A training.

    Attributes:
        name: of the adapter; folder: of its run; file: that it writes.
    """

    kind = "customize"

    def __init__(self, place: Workplace, name: str, arguments: Sequence[str]) -> None:
        super().__init__(f"Training {place.adapter(name).stem}", arguments, words=page_words)
        self.name, self.folder, self.file = place.adapter(name).stem, place.run(name), place.adapter(name)


def start(place: Workplace, name: str, form: CustomizeForm, photos: Sequence[GivenPhoto]) -> TrainingJob:
    """A new training.

    Raises:
        ComcatError: what it is told cannot be.
    """
    from ..training.checks import check_new

    form.check()
    if place.adapter(name).exists() and not form.overwrite:
        raise ComcatError(f"there is an adapter {name!r} already. Choose another name, or tick “Replace”")
    try:
        check_new(place.run(name))  # its photos must stay
    except TrainingError as error:
        raise TrainingError(page_words(str(error))) from error
    write_photos(place.photos(name), photos, asdict(form))
    return TrainingJob(place, name, form.arguments(place, name, resume=False))


def resume(place: Workplace, name: str, form: CustomizeForm, photos: Sequence[GivenPhoto]) -> TrainingJob:
    """The training of this name goes on: as the page was told when it began, or, if it began on the command line, as
    it is told now.

    Raises:
        ComcatError: what it is told cannot be.
    """
    told = read_told(place.photos(name))
    if told is None:
        form.check()
        write_photos(place.photos(name), photos, asdict(form))
    else:
        try:
            form = CustomizeForm(**told)
        except TypeError as error:
            raise ComcatError(
                f"what the training of {name!r} was told is damaged; start it under another name"
            ) from error
    return TrainingJob(place, name, form.arguments(place, name, resume=True))


def page_words(text: str) -> str:
    """A message of the command in the words of the page."""
    for option, label in sorted(WORDS.items(), key=lambda pair: -len(pair[0])):
        text = text.replace(option, label)
    return text


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of a run's log so far."""
    file = folder / METRICS
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(errors="replace").split("\n")[:-1]:  # the last one may be half-written
        entry = json.loads(line)
        if isinstance(entry.get("loss"), float):
            found.append((entry["step"], entry["loss"]))
    return found


def samples(folder: Path) -> list[tuple[str, str]]:
    """(file, caption) of the sample sheets of a run, the newest first."""
    sheets = sorted((folder / SAMPLES).glob("step-*.png"), reverse=True)
    return [(str(sheet), f"step {int(sheet.stem.removeprefix('step-'))}") for sheet in sheets]
