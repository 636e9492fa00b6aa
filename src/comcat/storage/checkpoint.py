"""Saving a compressed model and loading it back: ``model.safetensors`` and ``comcat.json``.

The JSON holds the architecture (its library, name and arguments, and attributes set since), the plan, the report, and
the size and SHA-256 of the tensors and of itself. Loading builds the small model from these alone: no original weights,
no network, no pickle; and nothing is allocated before the shapes of both files agree.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..compression import Compression
from ..errors import CheckpointError, ModelError, PlanError
from ..hosts import find_layers
from ..layers.base import check_finite
from ..models.hub import PREFIX, fetch
from ..models.libraries import NAMES, library
from ..models.source import Source, describe
from ..models.traits import buffers, restore_attributes
from ..models.wrappers import check_plain
from ..nn import SMALL
from ..planning.plan import Plan
from .atomic import CONFIG_NAME, atomic_directory, read_whole, tensor_bytes
from .description import FORMAT, Description, description_digest, read_description
from .reader import TENSOR_LIMIT, parse_tensors, read_bytes
from .rebuilt import changed, check_same, standing
from .ties import assign, tied

TENSORS_NAME = "model.safetensors"
#: A dense architecture may take this many bytes, or this many times those of its compressed tensors.
_MOST_BYTES, _MOST_TIMES = 2 << 30, 100


def save(
    model: nn.Module, path: str | Path, *, overwrite: bool = False, model_args: dict[str, Any] | None = None
) -> None:
    """Write a model to a directory that :func:`load` reads, and check that it does.

    The files are written beside ``path`` and renamed in one step, after the model has been rebuilt from them: with
    bitwise the same tensors, the same modules and attributes (dropout rates and the like), and the same output on a
    random image, or on the example that the model was compressed with, to rounding
    (:data:`comcat.storage.rebuilt.ROUNDING`).

    Args:
        model: a model from :func:`comcat.compress` or :func:`load`, trained further or not; or a dense model of timm,
            transformers, torchvision or open_clip, or a denoiser of diffusers.
        path: directory to make; one that holds something is refused unless ``overwrite``.
        model_args: the arguments of the architecture (of ``timm.create_model``, of torchvision's builder, open_clip's
            ``model_cfg``), needed only where they cannot be read off.

    Raises:
        CheckpointError: the directory is in use, the disk is full, or the architecture cannot be rebuilt; what
            differs is named.
        ModelError: the model holds NaN or infinite weights.
    """
    _check_path(path)
    check_plain(model)
    made = getattr(model, "comcat", None)
    plan, report, source = (made.plan, made.report, made.source) if made else (Plan({}), None, describe(model))
    if source is None:
        raise CheckpointError(
            "the model does not come from timm.create_model, nor is it one that comcat could rebuild when "
            f"loading; it knows those of {', '.join(NAMES)}"
        )
    check_finite(model)
    if made is None and any(isinstance(module, SMALL) for module in model.modules()):
        raise CheckpointError(
            "the model holds small layers but not the plan that made them: it is a part of a compressed model, or "
            "`comcat` was removed from it; compress the model itself, before it is wrapped, and save that"
        )
    plan = standing(plan, model)
    source = source.following(model) if model_args is None else replace(source, args=dict(model_args))
    source = source.current(model)
    advice = library(source.library).advice
    names = tied(model)
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items() if name not in names}
    with atomic_directory(path, overwrite) as directory:
        try:
            content = tensor_bytes(state, {"format": "pt"})
            parse_tensors(content, "the model")  # dtypes that no model here has are refused before anything is written
        except RuntimeError as error:  # tensors that share memory
            raise CheckpointError(_shared(" ".join(str(error).split())[:300])) from error
        architecture = {"library": source.library, "name": source.name, "args": source.args, "config": source.config}
        architecture["attributes"] = _carried(model, source, plan, advice)
        wide = _wide_buffers(model)
        if wide:
            architecture["wide_buffers"] = wide
        config: dict[str, Any] = {
            "comcat_format": 1 if source.library == "timm" and not wide else FORMAT,
            "comcat_version": __version__,
            "architecture": architecture,
            "plan": plan.as_dict(),
            "report": report.to_dict() if report else None,
            "tensors": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()},
        }
        try:
            config["tensors"]["description"] = description_digest(config)
            description = json.dumps(config, indent=1)
        except TypeError as error:
            raise CheckpointError(f"model_args must be plain data that JSON can hold: {error}") from error
        (directory / TENSORS_NAME).write_bytes(content)
        (directory / CONFIG_NAME).write_text(description + "\n", encoding="utf-8")
        try:
            again = load(directory)
        except CheckpointError as error:
            raise CheckpointError(f"the model cannot be rebuilt from its architecture ({error}); {advice}") from error
        check_same(model, again, advice, None if made is None else made.example)


def _shared(detail: str) -> str:
    return (
        "the model has layers that share weights in a way that its architecture does not, so that it cannot be rebuilt "
        f"when loading; save its state_dict() instead ({detail})"
    )


def _carried(model: nn.Module, source: Source, plan: Plan, advice: str) -> dict[str, dict[str, Any]]:
    """Attributes that the architecture's arguments do not bring back, by module."""
    try:
        built = source.build(meta=True)
        _shrink(built, plan, "the description")
    except CheckpointError as error:
        raise CheckpointError(f"the model cannot be rebuilt from its architecture ({error}); {advice}") from error
    attributes = changed(model, built, advice)
    there, here = tied(model), tied(built)
    for name in [*there, *here]:
        if there.get(name) != here.get(name):
            other = there.get(name) or here.get(name)
            raise CheckpointError(_shared(f"'{name}' and '{other}' are one tensor in only one of them"))
    return attributes


def _wide_buffers(model: nn.Module) -> list[str]:
    """Buffers that are not saved and stayed in float32 beside shorter parameters, such as rotary frequencies."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    short = len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16}
    return [name for name, tensor in buffers(model).items() if short and tensor.dtype == torch.float32]


def load(path: str | Path, *, revision: str | None = None) -> nn.Module:
    """Rebuild a saved model, in evaluation mode, on the CPU, in the dtype it was saved in.

    Args:
        path: a directory from :func:`save`, or ``hf-hub:ORG/NAME`` for a repository of the Hub from
            :func:`comcat.push`, or for its copy in the Hub's cache.
        revision: branch, tag or commit of the repository.

    Raises:
        CheckpointError: not a comcat directory, of a newer version, damaged, or inconsistent; or a repository that is
            not there or cannot be reached. The message says which.
    """
    _check_path(path)
    if str(path).startswith(PREFIX):
        path = _fetched(str(path).removeprefix(PREFIX), revision)
    elif revision is not None:
        raise CheckpointError(f"'{path}' is a directory, which has no revisions; a repository is hf-hub:ORG/NAME")
    with torch.inference_mode(False), torch.device("cpu"):  # whatever the caller has set
        return _load(Path(path))


def _fetched(repository: str, revision: str | None) -> Path:
    """The directory of a repository's model in the Hub's cache."""
    folder = fetch(repository, (CONFIG_NAME, TENSORS_NAME), revision, CheckpointError)
    if not (folder / CONFIG_NAME).exists():
        raise CheckpointError(
            f"the repository '{repository}' is no model saved by comcat: it has no {CONFIG_NAME}; models of other "
            "libraries are opened with comcat.load_model"
        )
    return folder


def _check_path(path: str | Path) -> None:
    if "\0" in str(path):
        raise CheckpointError(f"{str(path)!r} is no path: it holds a NUL character")


def _load(path: Path) -> nn.Module:
    config, state, size = read_whole(path, lambda: _read(path))
    name = f"'{path / CONFIG_NAME}'"
    try:
        architecture = config.architecture
        args = library(architecture.library).decoded(architecture.args)
        source = Source(architecture.name, args, _tuples(architecture.config), architecture.library)
        plan = Plan.from_dict(config.plan)
    except PlanError as error:
        raise CheckpointError(f"{name} is damaged: {error}") from error
    _check_shapes(source, plan, state, size, name)
    config.check_digest(name)
    model = source.build()
    _shrink(model, plan, name)
    restore_attributes(model, architecture.attributes)
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        there = buffers(model)
        wide = {key: there[key].clone() for key in architecture.wide_buffers if key in there}
        model.to(dtypes.pop())  # buffers that are not saved follow the parameters, but for these
        for key, tensor in wide.items():
            owner, _, leaf = key.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = tensor
    assign(model, state)
    model.comcat = Compression(plan, config.report, source)  # type: ignore[assignment]
    return model.eval()


def _read(path: Path) -> tuple[Description, dict[str, Tensor], int]:
    config = read_description(path)
    return config, *_read_tensors(path, config)


def _shrink(model: nn.Module, plan: Plan, name: str) -> None:
    if not plan.layers:
        return
    try:
        inventory = find_layers(model)
        plan.check(inventory)
    except (PlanError, ModelError) as error:
        raise CheckpointError(f"{name} contradicts its architecture: {error}") from error
    with torch.random.fork_rng(devices=[]):
        for layer, choice in plan.layers.items():
            for module_name, module in inventory[layer].empty(choice).items():
                model.set_submodule(module_name, module)


def _read_tensors(path: Path, config: Description) -> tuple[dict[str, Tensor], int]:
    """The tensors, and their file's size in bytes."""
    file = path / TENSORS_NAME
    content = read_bytes(file, limit=TENSOR_LIMIT)
    expected = config.tensors
    if len(content) != expected.bytes:
        raise CheckpointError(
            f"'{file}' has {len(content):,} bytes instead of {expected.bytes:,}: it is truncated or was replaced; "
            "copy the model again"
        )
    if hashlib.sha256(content).hexdigest() != expected.sha256:
        raise CheckpointError(
            f"the content of '{file}' does not match its checksum: it was damaged or changed; copy the model again"
        )
    return parse_tensors(content, f"'{file}'")[1], len(content)


def _check_shapes(source: Source, plan: Plan, state: dict[str, Tensor], size: int, name: str) -> None:
    """Raise CheckpointError unless the description, built without memory, needs exactly these tensors."""
    model = source.build(meta=True)
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    needed = sum(t.numel() * t.element_size() for t in tensors)
    _shrink(model, plan, name)
    names = tied(model)
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key not in names}
    for key in [*wanted, *state]:
        there = tuple(state[key].shape) if key in state else None
        if there != wanted.get(key):
            raise CheckpointError(
                f"the ranks in {name} contradict the tensors: '{key}' should be {wanted.get(key)} but is {there}"
            )
    floats = {key: tensor.is_floating_point() for key, tensor in model.state_dict().items()}
    for key, tensor in state.items():
        if tensor.is_floating_point() != floats[key]:
            raise CheckpointError(f"{name} contradicts the tensors: '{key}' is of dtype {tensor.dtype}")
    if needed > max(_MOST_BYTES, _MOST_TIMES * size):
        raise CheckpointError(f"{name} describes a model of {needed:,} bytes, too many for its tensors of {size:,}")


def _tuples(value: Any) -> Any:
    """JSON turns tuples into lists; the words of timm are tuples."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value
