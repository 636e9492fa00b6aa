"""Saving a compressed model and loading it back: ``model.safetensors`` and ``comcat.json``.

The JSON holds the architecture (a timm name and arguments), the plan, the report and the size and SHA-256 of the
tensors. Loading builds the small model from these alone: no original weights, no network, no pickle.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from torch import Tensor, nn

from ._version import __version__
from .compress import Compression, Report
from .errors import CheckpointError, ModelError, PlanError
from .files import CONFIG_NAME, atomic_directory, tensor_bytes
from .hosts import find_sites
from .modes import evaluating
from .plain import check_plain
from .plan import Plan
from .profile import default_input_size
from .skeleton import empty_modules
from .source import Source, describe

FORMAT = 1
TENSORS_NAME = "model.safetensors"
_INNER = {"tensors": {"bytes", "sha256"}, "architecture": {"library", "name", "args", "config"}}
_FIELDS = {"comcat_format", "comcat_version", "architecture", "plan", "report", "tensors"}


def save(
    model: nn.Module, path: str | Path, *, overwrite: bool = False, model_args: dict[str, Any] | None = None
) -> None:
    """Write a model to a directory that :func:`load` reads, and check that it does.

    The files are written beside ``path`` and renamed in one step, after the model has been rebuilt from them and has
    given bitwise the same output on a random image.

    Args:
        model: a model from :func:`comcat.compress` or :func:`load`, trained further or not; or a dense timm model.
        path: directory to make; one that holds something is refused unless ``overwrite``.
        model_args: the arguments given to ``timm.create_model``, needed only where they cannot be read off.

    Raises:
        CheckpointError: the directory is in use, the disk is full, or the architecture cannot be rebuilt.
    """
    check_plain(model)
    made = getattr(model, "comcat", None)
    plan, report, source = (made.plan, made.report, made.source) if made else (Plan({}), None, describe(model))
    if source is None:
        raise CheckpointError("the model does not come from timm.create_model, so it could not be rebuilt when loading")
    if model_args is not None:
        source = Source(source.name, dict(model_args), source.config)
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    with atomic_directory(path, overwrite) as directory:
        try:
            content = tensor_bytes(state, {"format": "pt"})
        except RuntimeError as error:  # tensors that share memory
            raise CheckpointError(f"the tensors cannot be written: {error}") from error
        config = {
            "comcat_format": FORMAT,
            "comcat_version": __version__,
            "architecture": {"library": "timm", "name": source.name, "args": source.args, "config": source.config},
            "plan": plan.as_dict(),
            "report": report.to_dict() if report else None,
            "tensors": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()},
        }
        try:
            description = json.dumps(config, indent=1)
        except TypeError as error:
            raise CheckpointError(f"model_args must be plain data that JSON can hold: {error}") from error
        (directory / TENSORS_NAME).write_bytes(content)
        (directory / CONFIG_NAME).write_text(description + "\n")
        _check_rebuilt(model, directory)


def _check_rebuilt(model: nn.Module, directory: Path) -> None:
    """Raise CheckpointError unless what was written computes exactly what ``model`` computes."""
    advice = "pass model_args={...} with the arguments that timm.create_model was given"
    try:
        again = load(directory)
    except CheckpointError as error:
        raise CheckpointError(f"the model cannot be rebuilt from its architecture ({error}); {advice}") from error
    parameter = next(model.parameters())
    again = again.to(parameter.device)
    image = torch.rand(1, *default_input_size(model), generator=torch.Generator().manual_seed(0))
    image = image.to(parameter.device, parameter.dtype)
    with torch.no_grad(), evaluating(model), evaluating(again):
        if not _same(model(image), again(image)):
            raise CheckpointError(f"the rebuilt model computes something else; {advice}")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def load(path: str | Path) -> nn.Module:
    """Rebuild a saved model, in evaluation mode, on the CPU, in the dtype it was saved in.

    Raises:
        CheckpointError: not a comcat directory, of a newer version, damaged, or inconsistent; the message says which.
    """
    path = Path(path)
    config = _read_config(path)
    state = _read_tensors(path, config["tensors"])
    architecture = config["architecture"]
    try:
        source = Source(architecture["name"], _tuples(architecture["args"]), _tuples(architecture["config"]))
        plan = Plan.from_dict(config["plan"])
        report = Report.from_dict(config["report"]) if config["report"] else None
    except (KeyError, TypeError, AttributeError, PlanError) as error:
        raise CheckpointError(f"'{path / CONFIG_NAME}' is damaged: {error}") from error
    model = source.build()
    _shrink(model, plan, path)
    _check_shapes(model, state, path)
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())  # buffers that are not saved follow the parameters
    model.load_state_dict(state, strict=True, assign=True)
    model.comcat = Compression(plan, report, source)  # type: ignore[assignment]
    return model.eval()


def _shrink(model: nn.Module, plan: Plan, path: Path) -> None:
    if not plan.layers:
        return
    try:
        inventory = find_sites(model)
        plan.check(inventory)
    except (PlanError, ModelError) as error:
        raise CheckpointError(f"'{path / CONFIG_NAME}' contradicts its architecture: {error}") from error
    for name, choice in plan.layers.items():
        for module_name, module in empty_modules(inventory[name], choice).items():
            model.set_submodule(module_name, module)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_NAME
    if not file.is_file():
        raise CheckpointError(f"'{path}' is not a model saved by comcat: it has no {CONFIG_NAME}")
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{file}' cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("comcat_format"), int):
        raise CheckpointError(f"'{file}' is not a comcat model description")
    if config["comcat_format"] > FORMAT:
        raise CheckpointError(
            f"'{file}' has format {config['comcat_format']} (written by comcat {config.get('comcat_version')}), this "
            f"version reads up to {FORMAT}; upgrade comcat"
        )
    unknown, missing = sorted(set(config) - _FIELDS), sorted(_FIELDS - set(config))
    for name, fields in _INNER.items():
        inner = config.get(name)
        there = set(inner) if isinstance(inner, dict) else set()
        missing += [f"{name}.{field}" for field in sorted(fields - there)] if name in config else []
    if unknown or missing:
        said = [f"{what} fields {', '.join(names)}" for what, names in (("unknown", unknown), ("no", missing)) if names]
        raise CheckpointError(f"'{file}' has {' and '.join(said)}; it was edited or written by another tool")
    return config


def _read_tensors(path: Path, expected: dict[str, Any]) -> dict[str, Tensor]:
    file = path / TENSORS_NAME
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"'{file}' cannot be read: {error.strerror}") from error
    if len(content) != expected["bytes"]:
        raise CheckpointError(
            f"'{file}' has {len(content):,} bytes instead of {expected['bytes']:,}: it is truncated or was replaced; "
            "copy the model again"
        )
    if hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise CheckpointError(
            f"the content of '{file}' does not match its checksum: it was damaged or changed; copy the model again"
        )
    try:
        return tensors_from_bytes(content)
    except SafetensorError as error:
        raise CheckpointError(f"'{file}' is not a safetensors file: {error}") from error


def _check_shapes(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in [*wanted, *state]:
        there = tuple(state[name].shape) if name in state else None
        if there != wanted.get(name):
            raise CheckpointError(
                f"the ranks in '{path / CONFIG_NAME}' contradict the tensors: '{name}' should be {wanted.get(name)} "
                f"but is {there}"
            )


def _tuples(value: Any) -> Any:
    """JSON turns tuples into lists; timm wants tuples back."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value
