"""Options of ``comcat compress`` for the denoiser of a pipeline, which stand together in one object."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from . import options as opt

if TYPE_CHECKING:
    from ..denoisers.distill_config import DistillConfig

DENOISER = "Denoiser of a pipeline"
Command = TypeVar("Command", bound=Callable[..., None])


def _o(text: str, metavar: str | None = None, **more: Any) -> Any:
    return opt.Option(help=text, metavar=metavar, rich_help_panel=DENOISER, show_default=False, **more)


@dataclass(frozen=True)
class Denoising:
    """What is compressed of a pipeline, how the pictures are drawn in which it is calibrated, and its distillation.

    Attributes:
        component: None where MODEL is no pipeline.
        pictures: of every prompt; steps, guidance, resolution: None for the pipeline's own.
        share: of the denoiser's calls that is kept.
        distill_steps: None without distillation.
    """

    component: Annotated[
        str | None,
        _o(
            "MODEL is a text-to-image pipeline of diffusers, of which this is compressed; calibrated on --prompts "
            "(texts, or a file with one a line) in its own sampling loop.",
            "unet|transformer",
        ),
    ] = None
    pictures: Annotated[int, _o("Pictures of every prompt; 4.", "N", min=1)] = 4
    steps: Annotated[int | None, _o("Sampling steps; the pipeline's own.", "N", min=1)] = None
    guidance: Annotated[float | None, _o("Guidance scale; the pipeline's own.", "X")] = None
    share: Annotated[float, _o("Share of the times that is recorded; 0.2.", "F")] = 0.2
    resolution: Annotated[int | None, _o("Pixels a side; the model's own.", "N", min=8)] = None
    variant: Annotated[str | None, _o("Variant of the weights, e.g. fp16.", "NAME")] = None
    distill_steps: Annotated[
        int | None, _o("Updates on what the dense one predicts; none. --resume continues them.", "N", min=1)
    ] = None
    distill_batch: Annotated[int, _o("Recorded examples of each; 32.", "N", min=1)] = 32
    distill_lr: Annotated[float, _o("Learning rate; 3e-4.", "X")] = 3e-4

    def distillation(self, seed: int) -> DistillConfig | None:
        """Its settings, or None without."""
        from ..denoisers.distill_config import DistillConfig

        if self.distill_steps is None:
            return None
        return DistillConfig(steps=self.distill_steps, batch_size=self.distill_batch, lr=self.distill_lr, seed=seed)

    def given(self) -> list[str]:
        """The options that are not as they are by themselves."""
        return [f"--{f.name.replace('_', '-')}" for f in fields(self) if getattr(self, f.name) != f.default]


def denoises(function: Command) -> Command:
    """Give a command these options in place of its parameter ``denoising``, which gets them together."""
    own = inspect.signature(function, eval_str=True)
    hints = inspect.get_annotations(Denoising, eval_str=True)
    options = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(Denoising)
    ]
    parameters: list[inspect.Parameter] = []
    for parameter in own.parameters.values():
        parameters += options if parameter.name == "denoising" else [parameter]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]

    @functools.wraps(function)
    def run(**given: Any) -> None:
        function(denoising=Denoising(**{f.name: given.pop(f.name) for f in fields(Denoising)}), **given)

    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


def read_texts(given: list[str] | None) -> tuple[str, ...]:
    """Prompts of the options: what is a file there is read, one prompt a line.

    Raises:
        DataError: it cannot be read.
    """
    from .generate_command import read_prompts

    texts: list[str] = []
    for one in given or []:
        path = Path(one)
        texts += read_prompts(None, path) if _is_file(path) else [one]
    return tuple(texts)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # longer than a name may be
        return False
