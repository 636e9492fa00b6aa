"""What ``comcat compress`` makes of a plan: a model that comcat loads, or one that the model's own library does."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import Screen, given_command

if TYPE_CHECKING:
    from torch import nn

    from ..calibration.statistics import Calibration
    from ..compression import Report
    from ..planning.plan import Plan
    from ..prepared import Prepared


class SmallModel:
    """A compressed model; attributes: the ``model`` and its ``report``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.report: Report = model.comcat.report  # type: ignore[union-attr, assignment]
        self.notes: list[str] = []

    def write(self, stage: Path) -> None:
        """Into the output directory, before it has its name."""
        import comcat

        comcat.save(self.model.cpu(), stage, overwrite=True)

    def loaded_by(self, target: Path) -> str:
        """What opens it in Python."""
        return f"comcat.load({str(target)!r})"


class StockModel(SmallModel):
    """One of the dense model's own class, for ``--stock``.

    Args:
        source: what the user named the dense model; a directory's ``preprocessor_config.json`` goes with the small one.
    """

    def __init__(
        self, prepared: Prepared, plan: Plan, calibration: Calibration | None, screen: Screen, source: str
    ) -> None:
        import comcat

        self.stock: Any = comcat.export_stock(prepared, plan, calibration, progress=screen.progress)
        self.model, self.report, self.notes = self.stock.model, self.stock.report, self.stock.notes
        file = Path(source) / "preprocessor_config.json"
        self.processor = file if file.is_file() else None

    def write(self, stage: Path) -> None:
        self.stock.write(stage, self.processor)

    def loaded_by(self, target: Path) -> str:
        if hasattr(self.model, "save_pretrained"):
            return f"transformers.{type(self.model).__name__}.from_pretrained({str(target)!r})"
        return f"timm.create_model({f'local-dir:{target}'!r}, pretrained=True)"


def made_with(model: nn.Module) -> dict[str, Any]:
    """What it takes to do it again: the command, the versions of the packages that ran, and the model's device."""
    from ..models.machine import device_name, versions

    device = next(model.parameters()).device
    return {"command": given_command(), "versions": versions(), "device": device_name(device)}


@contextmanager
def told(screen: Screen) -> Iterator[None]:
    """What the library warns a user of inside is shown as the command's own warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for text in dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning):
        screen.warn(text)
    for one in caught:
        if one.category is not UserWarning:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def make(
    stock: bool, prepared: Prepared, plan: Plan, calibration: Calibration | None, screen: Screen, source: str
) -> SmallModel:
    """The small model of a plan, stock or not."""
    import comcat

    made = (
        StockModel(prepared, plan, calibration, screen, source)
        if stock
        else SmallModel(comcat.compress(prepared, plan, calibration, progress=screen.progress))
    )
    for note in made.notes:
        screen.warn(note)
    return made
