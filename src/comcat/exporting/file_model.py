"""An exported file as a module, so that it is evaluated as any model is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..models.libraries import said_classes
from .file_format import FileFormat


class FileModel(nn.Module):
    """A file, called with images (B, C, H, W); it returns its output, or several by name.

    Args:
        names: of the outputs; batch: images in every batch of the file, None for any number.
        like: the model that it was written from, for what it says of its classes.

    Raises:
        ExportError: the file cannot run on this machine.
    """

    def __init__(
        self, path: Path, target: FileFormat, precision: str, names: Sequence[str], batch: int | None, like: nn.Module
    ) -> None:
        super().__init__()
        found = target.opened(path, precision)
        if found is None:
            raise ExportError(f"files of {target.title} do not run on this machine, and so cannot be evaluated here")
        self._run, self._names, self._batch = found, tuple(names), batch
        self.num_classes = said_classes(like)
        self.nothing = nn.Parameter(torch.empty(0), requires_grad=False)  # callers ask for dtype and device of one

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        """Batches that are too small for the file are filled up."""
        parts = [self._outputs(part) for part in images.split(self._batch or len(images))]
        outputs = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        return outputs[0] if len(outputs) == 1 else dict(zip(self._names, outputs, strict=True))

    def _outputs(self, images: Tensor) -> list[Tensor]:
        count = len(images)
        if self._batch is not None and count < self._batch:
            images = torch.cat([images, images[-1:].expand(self._batch - count, -1, -1, -1)])
        return [torch.from_numpy(array)[:count] for array in self._run([images.float().cpu().numpy()])]
