"""From command line values to models, data and budgets; mistakes end here, before the long work begins."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import CheckpointError, DataError, ModelError
from ..wording import some
from .console import Screen

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..data.loading import ImageData, StreamData

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


def parse_count(text: str | None, option: str) -> int | None:
    """``11M`` -> 11000000, with K, M, G or B."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kmgb]?)", text.strip().replace(",", ""), re.IGNORECASE)
    if not match:
        raise typer.BadParameter(f"{text!r} is not a number such as 11M or 2.3G", param_hint=option)
    return round(float(match[1]) * _UNITS[match[2].lower()])


def parse_bytes(text: str | None, option: str) -> int | None:
    """``1M`` -> 1000000, ``1MiB`` -> 1048576, with k, M, G and KiB, MiB, GiB; a B at the end changes nothing."""
    if text is None:
        return None
    number = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
    match = re.fullmatch(number + r"\s*([kmg]?)(i?)b?", text.strip().replace(",", ""), re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise typer.BadParameter(f"{text!r} is no size such as 1M, 500k or 2MiB", param_hint=option)
    power = ("", "k", "m", "g").index(match[2].lower())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def parse_model_args(items: list[str] | None) -> dict[str, Any]:
    """``["img_size=32", "act_layer=gelu"]`` -> ``{"img_size": 32, "act_layer": "gelu"}``."""
    args: dict[str, Any] = {}
    for item in items or []:
        name, separator, value = item.partition("=")
        if not separator or not name.strip().isidentifier():
            raise typer.BadParameter(f"{item!r} is not NAME=VALUE, e.g. img_size=32", param_hint="--model-arg")
        try:
            args[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            args[name.strip()] = value.strip()
    return args


def parse_device(name: str) -> torch.device:
    """A device that exists on this machine.

    Raises:
        ModelError: there is no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ModelError(f"there is no device {name!r} on this machine. Use --device cpu or leave it out") from e
    return device


def check_output_file(path: Path, overwrite: bool) -> None:
    """Raise CheckpointError, before any work is done, where a .safetensors file cannot be written in the end."""
    if path.suffix != ".safetensors":
        raise CheckpointError(f"'{path}' does not end in .safetensors, the only format that is written")
    if path.is_dir():
        raise CheckpointError(f"'{path}' is a directory; choose another name")
    if path.exists() and not overwrite:
        raise CheckpointError(f"'{path}' exists already; choose another name or give --overwrite")
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "may not be written to" if place.is_dir() else "is a file"
        raise CheckpointError(f"'{path}' cannot be written: '{place}' {why}; choose another place")


def check_written_file(path: Path | None, option: str, suffix: str = "") -> None:
    """Raise CheckpointError, before any work is done, where a file that is replaced cannot be written in the end."""
    from ..storage.atomic import check_place

    if path is None:
        return
    if path.is_dir():
        raise CheckpointError(f"'{path}' is a directory; give {option} the name of a file")
    if suffix and path.suffix.lower() != suffix:
        raise CheckpointError(f"'{path}' does not end in {suffix}, which {option} writes")
    check_place(path)


@dataclass(frozen=True)
class Reading:
    """How images are read: the options that all commands with --data share."""

    data: str
    root: Path | None = None
    class_map: Path | None = None
    skip_bad: bool = False
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None

    def configure(self, model: nn.Module) -> dict[str, Any]:
        """The model's preprocessing with the options' values, which become its own and are saved with it.

        Raises:
            DataError: a value that cannot be, or a model that does not say how its images are normalized.
        """
        from ..models.preprocessing import configure

        if self.interpolation is not None:
            from timm.data.transforms import str_to_interp_mode

            try:
                str_to_interp_mode(self.interpolation)
            except KeyError as e:
                raise DataError(
                    f"there is no interpolation {self.interpolation!r}. Use nearest, bilinear, bicubic or lanczos"
                ) from e
        if self.std is not None and not all(s > 0 for s in self.std):
            raise DataError("a standard deviation must be positive. Correct --std")
        given = {
            key: value
            for key in ("mean", "std", "crop_pct", "interpolation")
            if (value := getattr(self, key)) is not None
        }
        return configure(model, given)

    def open(
        self,
        split: str | None,
        purpose: Any,
        config: dict[str, Any],
        num_classes: int | None,
        seed: int = 0,
        boxes: str | None = None,
    ) -> ImageData | StreamData:
        from ..data import load_dataset

        return load_dataset(
            self.data,
            split,
            config,
            purpose=purpose,
            on_error="skip" if self.skip_bad else "raise",
            num_classes=num_classes,
            root=str(self.root) if self.root else None,
            class_map=str(self.class_map) if self.class_map else None,
            crop_pct=self.crop_pct,
            seed=seed,
            boxes=boxes,
        )

    def open_labelled(
        self, split: str | None, config: dict[str, Any], model: nn.Module, screen: Screen, free: bool = False
    ) -> ImageData | StreamData:
        """Data to evaluate on; ``free`` for a metric of the user's, or for features: no labels are needed, nor classes.

        Raises:
            DataError: it has no labels; ModelError: the model has no classes.
        """
        if free:
            return self.open(split, "evaluation", config, None)
        classes = declared_classes(model)
        if classes == 0:
            raise ModelError(
                "the model has no classifier to evaluate. Give one: --model-arg num_classes=N; or compare "
                "its features with those of another: --reference MODEL"
            )
        data = self._labelled(self.open(split, "evaluation", config, classes))
        if classes and data.num_classes and data.num_classes != classes and self.class_map is None:
            screen.warn(
                f"{_place(data)} has {data.num_classes} classes and the model {classes} outputs; class i is "
                "taken for output i. If the model numbers them differently, give --class-map"
            )
        return data

    def open_named(self, split: str | None, config: dict[str, Any]) -> ImageData | StreamData:
        """Labelled data whose classes are asked for by their names.

        Raises:
            DataError: it has no labels.
        """
        return self._labelled(self.open(split, "evaluation", config, None))

    def open_boxes(
        self, split: str | None, config: dict[str, Any], model: nn.Module, form: str, class_names: Path | None
    ) -> ImageData | StreamData:
        """Data with boxes, numbered as the labels of a detector are; without labels where it has none.

        Raises:
            DataError: a category that the model has no label for.
        """
        data = self.open(split, "evaluation", config, None, boxes=form)
        source: Any = getattr(data, "source", None)
        if hasattr(source, "number"):
            named: Any = getattr(model.config, "label2id", None) or {}
            source.number(named, read_lines(class_names) if class_names else None)
        else:
            data.labelled = False  # class numbers are no boxes
        return data

    def _labelled(self, data: ImageData | StreamData) -> ImageData | StreamData:
        if not data.labelled:
            raise DataError(f"{_place(data)} has no labels to evaluate against. Choose another --split")
        return data


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that hold something."""
    from ..storage.reader import read_text

    return [line.strip() for line in read_text(file, error=DataError).splitlines() if line.strip()]


#: How images are read, of DATA that is yet to be named.
ReadingOf = Callable[[str], Reading]


def declared_classes(model: nn.Module) -> int | None:
    """The number of the model's classes, if it says; 0 where it has no classifier."""
    from ..models.libraries import said_classes

    return said_classes(model)


def report_skipped(screen: Screen, skipped: dict[str, str], show: int = 5) -> None:
    """Name the images that were left out, the first few of them, and count all."""
    if skipped:
        names = [f"{name} ({cause})" for name, cause in skipped.items()]
        screen.warn(f"{len(skipped)} images could not be read and were left out: {some(names, count=show)}")


def check_input_file(path: Path | None, option: str) -> None:
    """Refuse a file that is to be read and is not there."""
    if path is not None and not path.is_file():
        raise DataError(f"there is no file {path}. Correct {option}")


def _place(data: ImageData | StreamData) -> str:
    return f"split {data.split!r} of {data.name}" if data.split else data.name
