"""Measured sensitivities: what a cut of one part of one layer does to the model's own output.

One part of one layer is cut to a few levels at a time and the divergence from the dense output is measured on a
small sample of calibration images. Blocks before the cut need not run again: their recorded output is replayed, which
is checked against a full pass first and abandoned where the model does not allow it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.statistics import Calibration
from ..errors import ModelError
from ..evaluation.outputs import Forward, Outputs, divergence
from ..layers.base import Choice, Inventory, Layer
from ..layers.factors import Factors
from ..models.batches import Batch, calling
from ..models.running import explained
from ..nn.swap import swapped


class _Skip(nn.Module):
    """Stands in for a block whose output will be overwritten by a later :class:`_Replay`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


class _Replay(nn.Module):
    """Returns a recorded output instead of computing one."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        assert self.output is not None
        return self.output


class Prober:
    """Measures the divergence of a changed model from the dense one.

    Args:
        model: the model to change; it is used in evaluation mode and left as it was.
        sample: what it is called with, or (n, C, H, W) images; batch_size: how many at a time.
        kind: of the outputs, which says how they are compared (see :mod:`comcat.evaluation.outputs`); None infers it.
        forward: how the model is called, see :class:`~comcat.evaluation.outputs.Outputs`.

    Attributes:
        reference: the dense outputs, tensors (n, ...).
    """

    def __init__(
        self,
        model: nn.Module,
        sample: Batch | Tensor,
        kind: str | None = None,
        batch_size: int = 64,
        forward: Forward | None = None,
    ) -> None:
        parameter = next(model.parameters())
        self.model = model
        self.outputs = Outputs(model, kind, forward=calling(forward))
        made = Batch.of_images(sample) if isinstance(sample, Tensor) else sample
        self.batches = list(made.to(parameter.device, parameter.dtype).split(batch_size))
        self.blocks: list[str] = []
        self.recorded: dict[str, list[Tensor]] = {}
        self.reference = self._outputs()

    @torch.no_grad()
    def _outputs(self, replay: _Replay | None = None, recorded: list[Any] | None = None) -> tuple[Tensor, ...]:
        outputs = []
        for i, batch in enumerate(self.batches):
            if replay is not None and recorded is not None:
                replay.output = recorded[i]
            with explained(batch.pixels):
                outputs.append(self.outputs.run(batch))
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))

    def divergence(self, outputs: tuple[Tensor, ...]) -> float:
        """How far ``outputs`` are from the dense ones, in the unit of their kind."""
        assert self.outputs.kind is not None
        return divergence(self.outputs.kind, self.reference, outputs)

    def record(self, inventory: Inventory) -> None:
        """Record the outputs of the dense blocks for replay.

        A block is the parent of a layer. Replay is kept for the blocks at which it reproduces the output exactly.
        """
        candidates = inventory.blocks()
        recorded: dict[str, list[Tensor]] = {name: [] for name in candidates}
        handles = [
            self.model.get_submodule(name).register_forward_hook(
                lambda module, args, out, name=name: recorded[name].append(out)
            )
            for name in candidates
        ]
        try:
            outputs = self._outputs()
        finally:
            for handle in handles:
                handle.remove()
        self.blocks, self.recorded = [], {}
        whole = [n for n in candidates if len(recorded[n]) == len(self.batches)]
        if len(whole) == len(candidates) and all(isinstance(o, Tensor) for n in whole for o in recorded[n]):
            self.blocks, self.recorded = whole, recorded
            if not all(self._exact(i, outputs) for i in range(len(whole))):
                self.blocks, self.recorded = [], {}

    def _exact(self, last: int, outputs: tuple[Tensor, ...]) -> bool:
        try:
            replayed = self._replayed(last)
        except ModelError:  # what skipped blocks pass on has another shape than what they would return
            return False
        return all(torch.equal(ours, theirs) for ours, theirs in zip(replayed, outputs, strict=True))

    def _replayed(self, last: int) -> tuple[Tensor, ...]:
        """Outputs when the blocks up to and including ``last`` are replayed."""
        replay = _Replay()
        stand_ins: dict[str, nn.Module] = {name: _Skip() for name in self.blocks[:last]}
        stand_ins[self.blocks[last]] = replay
        with swapped(self.model, stand_ins):
            return self._outputs(replay, self.recorded[self.blocks[last]])

    def measure(self, layer: Layer, factors: Factors[Any], choice: Choice) -> float:
        """Divergence with ``layer`` at ``choice`` and everything else dense."""
        block = layer.name.rpartition(".")[0]
        if not layer.in_block and self.blocks:
            before = len(self.blocks) - 1
        else:
            before = self.blocks.index(block) - 1 if block in self.blocks else -1
        with swapped(self.model, factors.build(choice)):
            return self.divergence(self._replayed(before) if before >= 0 else self._outputs())

    def measure_all(self, modules: Mapping[str, nn.Module]) -> float:
        """Divergence with all these modules in place."""
        with swapped(self.model, modules):
            return self.divergence(self._outputs())


def sample_size(macs: int, images: int) -> int:
    """How many images to probe with: all of a small model's, fewer of a large one's, 32 at least.

    2e11 MACs per measurement keep a ViT-S at 224 px, some 300 measurements, to minutes on two cores.
    """
    return min(images, max(32, int(2e11 / max(macs, 1))))


def probe_key(layer: Layer, part: str, width: int) -> str:
    """Key of one measurement in ``Calibration.probes``."""
    return f"{layer.name}/{part}/{width}"


def probe_sample(calibration: Calibration, macs: int) -> Batch:
    """What to probe with."""
    return calibration.sample[: sample_size(macs, len(calibration.sample))]
