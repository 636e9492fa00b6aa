"""A run's state between memory and a checkpoint, alike for one process, DDP and FSDP.

PyTorch's ``torch.distributed.checkpoint.state_dict`` gathers full tensors under the plain model's names on the main
process, and hands them out again from there.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from . import randomness
from .average import Average
from .process import agree, collect
from .state import Saved

if TYPE_CHECKING:
    from accelerate import Accelerator

Tensors = dict[str, Tensor]


class Snapshot:
    """Takes a run's state and puts it back. All processes call the same methods together.

    Args:
        model, optimizer: as they are trained, wrapped or not.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None
    ) -> None:
        self._accelerator, self._model, self._average = accelerator, model, average
        self._optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._load = StateDictOptions(
            full_state_dict=True,
            broadcast_from_rank0=accelerator.num_processes > 1,
        )
        self._save = StateDictOptions(full_state_dict=True, cpu_offload=True)

    def weights(self) -> Tensors:
        """The full weights, averaged if there is an average, on every process."""
        with self._average.swapped() if self._average else nullcontext():
            return self._weights(StateDictOptions(full_state_dict=True))

    def take(self, step: int, plain: dict[str, Any]) -> Saved:
        """Everything a checkpoint holds; the tensors on the main process only."""
        tensors: dict[str, Tensors] = {"model": self._weights(self._save)}
        if self._average is not None:
            with self._average.swapped():
                tensors["average"] = self._weights(self._save)
        state: Any = get_optimizer_state_dict(self._model, self._optimizer, options=self._save)
        moments = state.get("state", {}).items()
        tensors["optimizer"] = {f"{name}.{key}": t.clone() for name, values in moments for key, t in values.items()}
        own, said = randomness.get_state(self._accelerator.device)
        everyone = collect(self._accelerator, (own, said))
        tensors["random"] = {f"{i}.{name}": t for i, (own, _) in enumerate(everyone) for name, t in own.items()}
        scaler = self._accelerator.scaler
        return Saved(
            step,
            tensors,
            {
                **plain,
                "optimizer": state.get("param_groups", []),
                "random": [said for _, said in everyone],
                "scaler": scaler.state_dict() if scaler is not None else None,
            },
        )

    def restore(self, saved: Saved) -> None:
        """Put a checkpoint back; ``saved`` holds tensors on the main process at least."""
        main = self._accelerator.is_main_process
        state: dict[str, Any] = {}
        for name, tensor in saved.tensors.get("optimizer", {}).items():
            parameter, _, key = name.rpartition(".")
            state.setdefault(parameter, {})[key] = tensor
        moments: Any = {}
        if main:
            groups = self._groups(saved)
            names = [name for group in groups for name in group["params"]]
            _check(names, state, saved)
            self._fill(names, state, saved)
            moments = {"state": state, "param_groups": groups}
        set_optimizer_state_dict(self._model, self._optimizer, moments, options=self._load)
        if self._average is not None:
            with self._average.swapped():
                self._set(saved.tensors.get("average", {}) if main else {})
        self._set(saved.tensors.get("model", {}) if main else {})
        if self._accelerator.scaler is not None and saved.plain["scaler"]:
            self._accelerator.scaler.load_state_dict(saved.plain["scaler"])
        index = self._accelerator.process_index
        shared: Tensors = agree(self._accelerator, dict(saved.tensors.get("random", {})))
        own = {name.partition(".")[2]: t for name, t in shared.items() if name.partition(".")[0] == str(index)}
        randomness.set_state(own, saved.plain["random"][index], self._accelerator.device)

    def _groups(self, saved: Saved) -> list[dict[str, Any]]:
        """The optimizer's groups: which parameters as saved, how they learn from this run's settings."""
        own, found = self._optimizer.param_groups, saved.plain["optimizer"]
        if [len(group["params"]) for group in found] != [len(group["params"]) for group in own]:
            raise ValueError("its optimizer has other groups of parameters")
        return [{**mine, "params": list(theirs["params"])} for mine, theirs in zip(own, found, strict=True)]

    @staticmethod
    def _fill(names: list[str], state: dict[str, Any], saved: Saved) -> None:
        """Parameters that no gradient has reached have no moments, which PyTorch takes for a damaged checkpoint."""
        for name in names:
            weight = saved.tensors["model"][name]
            zeros = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
            state.setdefault(name, {"step": torch.zeros(()), **zeros})

    def _weights(self, options: StateDictOptions) -> Tensors:
        # Copies: what is on the CPU already would go on changing.
        state: Any = get_model_state_dict(self._model, options=options)
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def _set(self, weights: Any) -> None:
        set_model_state_dict(self._model, weights, options=self._load)


#: What AdamW keeps of a parameter.
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}


def _check(names: list[str], state: dict[str, Any], saved: Saved) -> None:
    """Raise ValueError unless weights, averages and moments are such as training can leave.

    PyTorch takes any moments, and fails at the next step, or goes on with NaN.
    """
    model = saved.tensors["model"]
    for stem in {"model", "average"} & set(saved.tensors):
        for name in names:
            tensor = saved.tensors[stem][name]
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                raise ValueError(f"'{name}' of its {stem} is no finite weight")
    for name, values in state.items():
        if name not in model or set(values) != MOMENTS:
            raise ValueError(f"its optimizer has {sorted(values)} of '{name}'")
        check_moments(name, model[name], values)


def check_moments(name: str, weight: Tensor, moments: dict[str, Tensor]) -> None:
    """Raise ValueError unless they are AdamW's moments of a weight of this shape."""
    for key, tensor in moments.items():
        shape = () if key == "step" else tuple(weight.shape)
        if not tensor.is_floating_point() or tuple(tensor.shape) != shape or not tensor.isfinite().all():
            raise ValueError(f"{key} of {name} in its optimizer does not fit")
        if key != "exp_avg" and tensor.numel() and float(tensor.min()) < 0:
            raise ValueError(f"{key} of {name} in its optimizer is below zero")
