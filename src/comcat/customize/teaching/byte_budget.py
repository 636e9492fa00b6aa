"""Training under a budget of bytes: at first all components learn, then those that are worth most are kept.

What is kept is decided once, in the middle of the run, by :mod:`comcat.customize.shrinking.worth` on the run's own
photos and captions; the other half of the steps mends what is left. The rank that the run begins with is the largest
that a head can end with.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...errors import TrainingError
from ...progress import Progress
from ...training.process import on_main
from ..adapter.attached import Adapter
from ..files.adapter_file import header
from ..files.encoding import file_content
from ..files.layer_factors import PARTS, alive, by_layer
from ..files.numbers import Storage
from ..shrinking.choosing import Sizes, choose
from ..shrinking.cutting import cut
from ..shrinking.worth import measure
from .material import Note
from .trainer import AdapterTrainer

#: When components are chosen, as a share of the steps.
WHEN = 0.5
#: Batches on which they are measured, each a forward and a backward pass.
PROBES = 32
#: Bytes left free for what the file says of the run: before it, and when components are chosen.
_BEFORE, _MARGIN = 512, 96


@dataclass(frozen=True)
class ByteBudget:
    """How large the file may be.

    Attributes:
        max_bytes: of the whole file; storage: of its numbers.
    """

    max_bytes: int
    storage: Storage = "float16"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check(self, handle: Adapter, steps: int, note: Note) -> bool:
        """Whether anything has to go; ``handle``: new, with what the file will say of it in its ``info``.

        Raises:
            CheckpointError: not even one component fits; the bytes of the smallest file follow.
            TrainingError: there are too few steps to choose in between.
        """
        if steps < 2:
            raise TrainingError("max_bytes needs at least 2 steps: components are chosen in the middle of the run")
        about, state = header(handle, self.storage), handle.state_dict()
        whole = len(file_content(about, state))
        if whole <= self.max_bytes - _BEFORE:
            note(
                f"all components fit into {self.max_bytes:,} bytes ({whole:,} as {self.storage}), so none has to go; "
                "begin with a higher rank to use them"
            )
            return False
        Sizes(about, state).check(self.max_bytes, _BEFORE)
        return True

    def apply(self, handle: Adapter, trainer: AdapterTrainer, progress: Progress | None) -> None:
        """Keep what is worth most; all processes end with the same."""

        def choose_on_main() -> dict[str, torch.Tensor]:
            worths = measure(handle, trainer.probes(PROBES), PROBES, trainer.config.seed, progress)
            sizes = Sizes(header(handle, self.storage), handle.state_dict())
            cut(handle, worths, choose(worths, sizes, self.max_bytes - _MARGIN))
            return {name: tensor.cpu() for name, tensor in handle.state_dict().items()}

        state = on_main(trainer.accelerator, choose_on_main)
        with torch.no_grad():
            for name, parameter in handle.named_parameters():
                parameter.copy_(state[name])
        trainer.optimizer.state.clear()  # the moments were those of other columns

    def summary(self, handle: Adapter) -> dict[str, Any]:
        """For the file: the budget, and how many components are left."""
        state, kept = handle.state_dict(), 0
        for (component, layer), added in handle.layers.items():
            own = by_layer(state, component, layer)
            kept += sum(int(alive(own, part, added.rank).sum()) for part in PARTS)
        return {"max_bytes": self.max_bytes, "components": kept}
