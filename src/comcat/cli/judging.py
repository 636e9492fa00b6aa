"""How a command scores a model: by its classes, by prompts, by boxes, by features, or by the user's own metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import DataError, ModelError
from .console import Screen
from .inputs import Reading, check_input_file, declared_classes
from .prompting import Prompting

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..data.loading import ImageData, StreamData


@dataclass(frozen=True)
class Judging:
    """The options.

    Attributes:
        metric: ``module:function``; boxes: their form in the data; class_names: a file; outputs: their kind, where it
            is said.
    """

    metric: str | None = None
    prompting: Prompting | None = None
    boxes: str = "xywh"
    class_names: Path | None = None
    outputs: str | None = None

    def check(self) -> None:
        """What can be checked before a model is there: the metric, which is executed, and files.

        Raises:
            MetricError, DataError.
        """
        self.function()
        check_input_file(self.class_names, "--class-names")

    def function(self) -> Callable[..., Any] | None:
        from ..evaluation.metric import load_metric

        return load_metric(self.metric) if self.metric else None


class Judge:
    """Scores of one model, and of others like it, on the images of a split.

    Args:
        name: of the model, as it was typed.
        compared: whether there is another model to compare with.

    Attributes:
        data: the images; kind: of the outputs, where it is known before a model has run.

    Raises:
        DataError: the images have not got what is compared with. ModelError: nor has the model.
    """

    def __init__(
        self,
        options: Judging,
        reading: Reading,
        split: str | None,
        model: nn.Module,
        name: str,
        device: torch.device,
        screen: Screen,
        compared: bool,
    ) -> None:
        from ..evaluation.tasks import is_detector

        config = reading.configure(model)
        self.metric, self.zero_shot = options.function(), None
        self.kind = options.outputs or ("features" if compared and declared_classes(model) == 0 else None)
        detects = self.kind is None and self.metric is None and options.prompting is None and is_detector(model)
        if options.class_names is not None and options.prompting is None and not detects:
            raise typer.BadParameter("belongs to --prompts, --templates and detectors", param_hint="--class-names")
        self.data: ImageData | StreamData
        if options.prompting is not None:
            self.kind = "classes"
            self.data = reading.open_named(split, config)
            self.zero_shot = options.prompting.open(name, self.data, options.class_names, device, screen)
        elif detects:
            self.kind = "detections"
            self.data = reading.open_boxes(split, config, model, options.boxes, options.class_names)
            if not self.data.labelled and not compared:
                raise DataError(
                    f"{self.data.name} has no boxes to evaluate against (a column objects with bbox and category); "
                    "choose other data, or compare with what another model detects: --reference MODEL"
                )
        else:
            free = self.metric is not None or self.kind == "features"
            self.data = reading.open_labelled(split, config, model, screen, free)

    def arguments(self, reference: nn.Module | None) -> dict[str, Any]:
        """For :func:`comcat.evaluate`; ``reference`` is the truth where there are no labels."""
        if self.metric is not None:
            return {"evaluate": self.metric}
        if self.zero_shot is not None:
            return {"zero_shot": self.zero_shot}
        if self.kind == "detections" and self.data.labelled:
            reference = None
        return {"outputs": self.kind, "reference": reference}

    def call(self, model: nn.Module) -> Any:
        """How ``model`` is called; None for ``model(images)``."""
        return None if self.zero_shot is None else self.zero_shot.classifier(model)


def refuse_text(model: nn.Module) -> None:
    """Raise ModelError for a whole model of images and text: images calibrate nothing of its text tower."""
    from ..models.dual_encoder import has_text_tower

    if has_text_tower(model):
        option = "architecture" if hasattr(model, "config") else "towers"
        raise ModelError(
            f"{type(model).__name__} has a text tower, of which images tell nothing; leave --model-arg {option} out to "
            "reduce its image tower alone, or use --data-free; in Python, comcat.calibrate takes batches of images and "
            "tokens"
        )
