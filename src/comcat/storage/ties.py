"""Weights that a model has under several names, because its architecture ties them: one tensor in the file."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def tied(model: nn.Module) -> dict[str, str]:
    """Every further name in the state dictionary -> the first name of the same parameter or buffer."""
    saved = set(model.state_dict(keep_vars=True))
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        if name in saved and first.setdefault(id(tensor), name) != name:
            found[name] = first[id(tensor)]
    return found


def assign(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The tensors of ``state``, which holds each once, become the model's; what was tied is tied again."""
    names = tied(model)
    model.load_state_dict({**state, **{name: state[first] for name, first in names.items()}}, strict=True, assign=True)
    for name, first in names.items():
        owner, _, leaf = name.rpartition(".")
        place, _, origin = first.rpartition(".")
        for kind in ("_parameters", "_buffers"):
            tensors = getattr(model.get_submodule(place), kind)
            if origin in tensors:
                getattr(model.get_submodule(owner), kind)[leaf] = tensors[origin]
