"""The outputs of chosen blocks, caught while the model runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import TrainingError
from ..hosts import find_layers


def block_names(teacher: nn.Module, indices: tuple[int, ...]) -> list[str]:
    """The names of the blocks with these indices, which may be negative; a block is the parent of a layer.

    Raises:
        ModelError: the teacher has no layers. TrainingError: there is no such block.
    """
    blocks = find_layers(teacher).blocks()
    for index in indices:
        if not -len(blocks) <= index < len(blocks):
            raise TrainingError(
                f"feature_blocks names block {index}, but the teacher has {len(blocks)}: 0 to {len(blocks) - 1}, "
                "or negative from the end"
            )
    return list(dict.fromkeys(blocks[index] for index in indices))


class Features:
    """Catches the outputs of named submodules: ``features.take()`` after a forward pass.

    Gradient checkpointing runs blocks once more in the backward pass; by then the outputs have been taken, and what
    comes later is dropped with the next forward pass.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self._caught: dict[str, Tensor] = {}
        self._handles = [model.get_submodule(n).register_forward_hook(self._hook(n)) for n in names]

    def _hook(self, name: str) -> Any:
        def catch(module: nn.Module, args: Any, output: Tensor) -> None:
            self._caught[name] = output

        return catch

    def take(self) -> dict[str, Tensor]:
        """The outputs of the last forward pass by name; they are forgotten here."""
        caught, self._caught = self._caught, {}
        return caught

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
