"""A run's state between memory and a checkpoint, alike for one process, DDP and FSDP.

PyTorch's ``torch.distributed.checkpoint.state_dict`` gathers full tensors under the plain model's names on the main
process, and hands them out again from there.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from .process import agree, collect, on_main
from .state import Saved, restoring

if TYPE_CHECKING:
    from accelerate import Accelerator

Tensors = dict[str, Tensor]

#: What AdamW keeps of a parameter.
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}


class Trained:
    """Weights, the optimizer that trains them, and their average if there is one.

    Args:
        model, optimizer: as they are trained, wrapped or not.
        prefix: of its files in a checkpoint.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: Average | None = None,
        prefix: str = "",
    ) -> None:
        self._model, self._average, self._prefix = model, average, prefix
        self._optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._is_adamw = isinstance(self._optimizer, torch.optim.AdamW)  # of which it is known what it keeps
        self._load = StateDictOptions(full_state_dict=True, broadcast_from_rank0=accelerator.num_processes > 1)
        self._save = StateDictOptions(full_state_dict=True, cpu_offload=True)

    def weights(self) -> Tensors:
        """The full weights, averaged if there is an average, on every process."""
        with self._average.swapped() if self._average else nullcontext():
            return self._weights(StateDictOptions(full_state_dict=True))

    def take(self) -> tuple[dict[str, Tensors], dict[str, Any]]:
        """What a checkpoint holds of it; the tensors on the main process only."""
        model = self._weights(self._save)
        tensors = {"model": model}
        if self._average is not None:
            with self._average.swapped():
                tensors["average"] = self._weights(self._save)
        fresh = not self._optimizer.state
        state: Any = get_optimizer_state_dict(self._model, self._optimizer, options=self._save)
        if fresh:  # PyTorch has made a step of nothing to have something to show
            self._optimizer.state.clear()
        groups, moments = state.get("param_groups", []), {} if fresh else state.get("state", {})
        if self._is_adamw:
            fill_moments(moments, [name for group in groups for name in group["params"]], model)
        kept = {f"{name}.{key}": value for name, values in moments.items() for key, value in values.items()}
        tensors["optimizer"] = {key: value.clone() for key, value in kept.items() if isinstance(value, Tensor)}
        plain = {"optimizer": groups, "scalars": {k: v for k, v in kept.items() if not isinstance(v, Tensor)}}
        return self._named(tensors), self._named(plain)

    def _named(self, content: dict[str, Any]) -> dict[str, Any]:
        return {self._prefix + key: value for key, value in content.items()}

    def checked(self, saved: Saved) -> dict[str, Any]:
        """The optimizer's state that a checkpoint holds, as PyTorch takes it.

        Raises:
            ValueError, LookupError: weights, averages or moments are not such as training can leave. PyTorch takes any
                moments, and fails at the next step, or goes on with NaN.
        """
        state: dict[str, dict[str, Any]] = {}
        kept = {**saved.tensors[f"{self._prefix}optimizer"], **saved.plain[f"{self._prefix}scalars"]}
        for key, value in kept.items():
            parameter, _, entry = key.rpartition(".")
            state.setdefault(parameter, {})[entry] = value
        groups = self._groups(saved.plain[f"{self._prefix}optimizer"])
        names = [name for group in groups for name in group["params"]]
        model = saved.tensors[f"{self._prefix}model"]
        for stem in {f"{self._prefix}model", f"{self._prefix}average"} & set(saved.tensors):
            for name in names:
                tensor = saved.tensors[stem][name]
                if not tensor.is_floating_point() or not tensor.isfinite().all():
                    raise ValueError(f"'{name}' of its {stem} is no finite weight")
        if strange := set(state) ^ set(names):
            raise ValueError(f"its optimizer and its parameters differ in '{min(strange)}'")
        for name, values in state.items():
            if self._is_adamw:
                _check_moments(name, model[name], values)
        return {"state": state, "param_groups": groups}

    def _groups(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The optimizer's groups: which parameters as saved, how they learn from this run's settings."""
        own = self._optimizer.param_groups
        if [len(group["params"]) for group in found] != [len(group["params"]) for group in own]:
            raise ValueError("its optimizer has other groups of parameters")
        return [{**mine, "params": list(theirs["params"])} for mine, theirs in zip(own, found, strict=True)]

    def restore(self, saved: Saved, moments: Any) -> None:
        """Put back weights, average and ``moments``; empty but on the main process."""
        set_optimizer_state_dict(self._model, self._optimizer, moments, options=self._load)
        if self._average is not None:
            with self._average.swapped():
                self._set(saved.tensors.get(f"{self._prefix}average", {}))
        self._set(saved.tensors.get(f"{self._prefix}model", {}))

    def _weights(self, options: StateDictOptions) -> Tensors:
        # Copies: what is on the CPU already would go on changing.
        state: Any = get_model_state_dict(self._model, options=options)
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def _set(self, weights: Any) -> None:
        set_model_state_dict(self._model, weights, options=self._load)


class Snapshot:
    """Takes a run's state and puts it back: weights, optimizers, random numbers. All processes call it together."""

    def __init__(self, accelerator: Accelerator, *trained: Trained) -> None:
        self._accelerator, self._trained = accelerator, trained

    def take(self, step: int, plain: dict[str, Any]) -> Saved:
        """Everything a checkpoint holds, ``plain`` included; the tensors on the main process only."""
        tensors: dict[str, Tensors] = {}
        for trained in self._trained:
            more, said = trained.take()
            tensors |= more
            plain = {**plain, **said}
        own, said = randomness.get_state(self._accelerator.device)
        everyone = collect(self._accelerator, (own, said))
        tensors["random"] = {f"{i}.{name}": t for i, (own, _) in enumerate(everyone) for name, t in own.items()}
        scaler = self._accelerator.scaler
        scale = scaler.state_dict() if scaler is not None else None
        return Saved(step, tensors, {**plain, "random": [said for _, said in everyone], "scaler": scale})

    def restore(self, saved: Saved) -> None:
        """Put a checkpoint back, whose tensors only the main process needs to hold.

        Raises:
            TrainingError: it is not such as this run can have left.
        """
        moments: list[dict[str, Any]] = []

        def check() -> None:  # what is wrong on the main process must not leave the others waiting
            with restoring(saved):
                moments.extend(trained.checked(saved) for trained in self._trained)

        on_main(self._accelerator, check)
        for i, trained in enumerate(self._trained):
            main = self._accelerator.is_main_process
            trained.restore(saved if main else Saved(saved.step, {}, saved.plain), moments[i] if main else {})
        if self._accelerator.scaler is not None and saved.plain["scaler"]:
            self._accelerator.scaler.load_state_dict(saved.plain["scaler"])
        if saved.plain.get("random") is None:  # of a version that did not keep them where none are drawn from
            return
        index = self._accelerator.process_index
        shared: Tensors = agree(self._accelerator, dict(saved.tensors.get("random", {})))
        own = {name.partition(".")[2]: t for name, t in shared.items() if name.partition(".")[0] == str(index)}
        randomness.set_state(own, saved.plain["random"][index], self._accelerator.device)


def as_module(parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """A module that holds these parameters, under these names."""
    root = nn.Module()
    for name, parameter in parameters.items():
        module = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, parameter)
    return root


def fill_moments(moments: dict[str, dict[str, Any]], names: list[str], weights: Mapping[str, Tensor]) -> None:
    """Zeros for parameters that no gradient has reached, which have no moments: PyTorch takes these for damaged."""
    for name in names:
        if name not in moments:
            zeros = {"exp_avg": torch.zeros_like(weights[name]), "exp_avg_sq": torch.zeros_like(weights[name])}
            moments[name] = {"step": torch.zeros(()), **zeros}


def _check_moments(name: str, weight: Tensor, moments: dict[str, Any]) -> None:
    """Raise ValueError unless they are AdamW's moments of a weight of this shape."""
    if set(moments) != MOMENTS:
        raise ValueError(f"its optimizer has {sorted(moments)} of '{name}'")
    for key, tensor in moments.items():
        shape = () if key == "step" else tuple(weight.shape)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tuple(tensor.shape) != shape:
            raise ValueError(f"{key} of {name} in its optimizer does not fit")
        if not tensor.isfinite().all():
            raise ValueError(f"{key} of {name} in its optimizer is not finite")
        if key != "exp_avg" and tensor.numel() and float(tensor.min()) < 0:
            raise ValueError(f"{key} of {name} in its optimizer is below zero")
