"""What is exported: a model in float32, how it is called, its graph, and what its file is compared on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..errors import ExportError
from ..models.example import Example, example_for, of_any_size
from ..models.modes import copied
from ..models.preprocessing import said_config
from ..models.profile import default_input_size, image_size
from ..models.running import explained
from ..nn.low_rank_attention import unpadded
from ..progress import Progress
from ..wording import by
from .file_format import FileFormat
from .file_model import FileModel
from .flat_model import FlatModel
from .int8_choice import FloatChoice, Int8, diverging
from .parity import Deviation, arrays, batches_of, calls, compare, reference
from .quiet import quiet
from .resampling import products_for_resizing
from .tracing import Traced, blaming, check_takes, trace

#: Images of the example that an open batch is traced with; no batch of the parity check has so many.
_TRACED = 3


class ExportSubject:
    """A model that is exported, and what it is compared on.

    Attributes:
        flat: in float32 on the CPU, a copy.
        batch: images in every batch; None leaves their number open.
        size: (C, H, W); open_size: whether images of other sizes are taken too.
        config: what the model says of its images.
    """

    def __init__(
        self,
        model: nn.Module,
        target: FileFormat,
        precision: str,
        batch: int | None,
        size: Sequence[int] | None,
        open_size: bool,
    ) -> None:
        self.target, self.precision, self.batch, self.open_size = target, precision, batch, open_size
        self.size = image_size(size or default_input_size(model))
        self.config = said_config(model)
        with torch.inference_mode(False):
            self.copy = copied(model).cpu().float().eval().requires_grad_(False)
        self.example = example_for(self.copy, self.size, batch or _TRACED, seed=0)
        if open_size:
            self.example = of_any_size(self.example, self.copy)
        with explained(self.example.pixels), quiet():
            self.flat = FlatModel(self.copy, self.example)

    def choice(self, images: torch.Tensor | None, progress: Progress) -> FloatChoice:
        """What stays float, to be chosen on these images."""
        if images is None:
            raise ExportError("int8 needs images to calibrate on: give images (--data)")
        if len(self.flat.input_names) > 1:
            names = ", ".join(self.flat.input_names)
            raise ExportError(f"int8 files are of models that take images alone, and this one takes {names}")
        return FloatChoice(self.copy, images, self.target.by_token, progress)

    def divergence(self, file: Path, int8: Int8) -> float:
        """Of the file's outputs from the model's, on the calibration images."""
        made = FileModel(file, self.target, self.precision, self.flat.output_names, self.batch, self.copy)
        return diverging(self.copy, made, int8.images)

    def trace(self, int8: Int8 | None = None) -> Traced:
        """The graph that the format is written from."""
        dtype = self.target.traced_dtype(self.precision)
        flat = self.flat if dtype == torch.float32 else self.flat.cast(dtype)
        if int8 is not None:
            flat = self.target.quantized(flat, int8)
        with quiet(), nullcontext() if self.target.pads_heads else unpadded():
            traced = trace(flat, self.example.images, self.batch is None, self.open_size, self.target.bounded)
            if self.open_size:
                check_takes(traced, flat.given(self._other_size(traced)))
        return traced if self.target.antialiases else replace(traced, program=products_for_resizing(traced.program))

    def compared(
        self, traced: Traced, file: Path, pixels: torch.Tensor | None
    ) -> tuple[Deviation | None, tuple[int, ...]]:
        """How far the outputs of the file are from the model's, and the batches that show it."""
        batches = batches_of(self.batch)
        examples = calls(self.copy, self.size, batches, pixels, self.config)
        if self.open_size:
            examples.append(self._other_size(traced))
            batches += (1,)
        wanted = reference(self.flat, examples)
        with quiet(), blaming(traced.program, self.target.title, "run"):
            run = self.target.opened(file, self.precision)
            if run is None:
                return None, batches
            got = [run(batch) for batch in arrays(self.flat, examples)]
        return compare(self.flat.output_names, wanted, got), batches

    def _other_size(self, traced: Traced) -> Example:
        """A call of the model with images of another size, along every axis that the graph leaves open."""
        channels, height, width = self.size
        axes = next(shape[-2:] for shape in traced.inputs.values() if any(isinstance(n, str) for n in shape[1:]))
        for higher, wider in ((32, 64), (64, 32), (height, width)):  # multiples of usual patches, and of any
            sizes = {"height": height + higher, "width": width + wider}
            size = channels, *(sizes[axis] if isinstance(axis, str) else axis for axis in axes)
            example = example_for(self.copy, size, 1, seed=9)
            with suppress(ExportError):
                reference(self.flat, [example])
                return example
        raise ExportError(
            f"the model takes no images but those of {by(self.size)}: leave dynamic_size out (--dynamic-size); models "
            "of timm take others with dynamic_img_size=True (--model-arg)"
        )
