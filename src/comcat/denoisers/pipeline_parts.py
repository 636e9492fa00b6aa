"""Denoisers as parts of a pipeline: found by name, described with it, and put back when they are smaller."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..customize.adapter.components import DENOISERS
from ..errors import ModelError
from ..models.source import Source, describe, recorded_source
from ..storage.checkpoint import load

#: What a saved denoiser says of the pipeline that it belongs in: the name of its component.
PLACE = "component"


def component(pipe: Any, name: str | None = None) -> tuple[str, nn.Module]:
    """(Name, module) of a pipeline's denoiser.

    Args:
        name: of the component; by default the pipeline's ``unet`` or ``transformer``.

    Raises:
        ModelError: there is none of this name, or it is no denoiser; those that are there are named.
    """
    parts: dict[str, Any] = {key: part for key, part in pipe.components.items() if isinstance(part, nn.Module)}
    there = [key for key in parts if key.partition("_")[0] in DENOISERS]
    chosen = name or next(iter(there), None)
    kind = type(pipe).__name__
    if chosen is None:
        raise ModelError(f"{kind} has no denoiser: its components are {', '.join(parts)}")
    if chosen not in there:
        what = "has no component" if chosen not in parts else "does not denoise with its"
        raise ModelError(f"{kind} {what} '{chosen}'; compress its {' or '.join(there)}")
    return chosen, parts[chosen]


def described(name: str, model: nn.Module) -> Source | None:
    """How a denoiser is built again, with the place that it has in its pipeline."""
    found = describe(model)
    return None if found is None else replace(found, config={**found.config, PLACE: name})


def put(pipe: Any, small: nn.Module | str | Path, name: str | None = None) -> str:
    """Put a compressed denoiser in the place of the pipeline's own, on its device and in its dtype.

    Args:
        small: the model, or the directory that :func:`comcat.save` wrote it to.
        name: of the component; by default the one that it was made from.

    Returns:
        The name of the component.

    Raises:
        ModelError: it is no denoiser of such a pipeline; what differs is named.
        CheckpointError: the directory is damaged, or none of comcat's.
    """
    model = load(small) if isinstance(small, (str, Path)) else small
    source = recorded_source(model)
    said = source.config.get(PLACE) if source is not None else None
    chosen, dense = component(pipe, name or (said if isinstance(said, str) else None))
    what = f"'{small}'" if isinstance(small, (str, Path)) else f"the {type(model).__name__}"
    if type(model) is not type(dense):
        raise ModelError(
            f"{what} is a {type(model).__name__}, and the {chosen} of this {type(pipe).__name__} a "
            f"{type(dense).__name__}; give the pipeline that it was made from"
        )
    ours, theirs = (_configuration(one) for one in (model, dense))
    other = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if other:
        key = min(other)
        raise ModelError(
            f"{what} was made from another {chosen}: its {key} is {ours.get(key)!r}, that of the pipeline "
            f"{theirs.get(key)!r}; give the pipeline that it was made from"
        )
    parameter = next(dense.parameters())
    model.requires_grad_(parameter.requires_grad)
    setattr(pipe, chosen, nn.Module.to(model, parameter.device, parameter.dtype).train(dense.training))
    return chosen


def _configuration(model: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value

    return {key: plain(value) for key, value in dict(model.config).items() if not key.startswith("_")}
