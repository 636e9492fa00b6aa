"""Getting a model from what a user types: a timm or hub name, a saved directory, a name and a checkpoint."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from torch import nn

from .checkpoint import load
from .errors import ModelError
from .files import CONFIG_NAME
from .source import Source


def load_model(
    name: str,
    checkpoint: str | Path | None = None,
    model_args: dict[str, Any] | None = None,
    pretrained: bool = True,
) -> nn.Module:
    """Build a model and give it weights.

    Args:
        name: a directory saved by comcat; or a timm name, ``hf-hub:...`` or ``local-dir:...``.
        checkpoint: a safetensors file for the architecture ``name``; without it, timm's pretrained weights.
        model_args: further arguments of ``timm.create_model``, e.g. ``{"img_size": 32}``.
        pretrained: whether to load pretrained weights where no checkpoint is given.

    Raises:
        ModelError: unknown name, arguments that the architecture does not take, weights that cannot be had, or a
            checkpoint that does not fit (the differing tensors are named).
        CheckpointError: a saved directory that is damaged.
    """
    args = dict(model_args or {})
    if Path(name).is_dir():
        if checkpoint is not None or args:
            raise ModelError(f"'{name}' is a saved model: it takes neither a checkpoint nor model arguments")
        return load(name)
    if Path(name).exists() or ("/" in name and ":" not in name):
        raise ModelError(
            f"'{name}' is neither a directory saved by comcat (with {CONFIG_NAME}) nor a timm name; a Hub model is "
            f"written 'hf-hub:{name}'"
        )
    if ":" not in name and not timm.is_model(name.partition(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; see timm.list_models()"
        raise ModelError(f"timm has no model named '{name}'{hint}")
    if checkpoint is not None:
        _check_readable(checkpoint)
    model = _create(name, pretrained and checkpoint is None, args)
    if checkpoint is not None:
        _load_checkpoint(model, Path(checkpoint))
    architecture = (model.pretrained_cfg or {}).get("architecture") or name
    if ":" not in name:
        model.comcat_source = Source(architecture, args)
    return model


def _create(name: str, pretrained: bool, args: dict[str, Any]) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained, **args)
    except (TypeError, AssertionError) as error:
        raise ModelError(f"'{name}' cannot be built with {args}: {error}") from error
    except Exception as error:
        # Hub clients raise their transport's own exceptions, which differ between versions.
        what = "the pretrained weights of " if pretrained else ""
        fix = "; check the network, or give --checkpoint FILE.safetensors" if pretrained else ""
        raise ModelError(f"cannot load {what}'{name}': {type(error).__name__}: {error}{fix}") from error


def _check_readable(path: str | Path) -> None:
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"checkpoint '{path}' does not exist")
    if path.suffix != ".safetensors":
        raise ModelError(
            f"checkpoint '{path}' is not a .safetensors file; pickled checkpoints can run code when read and are never "
            "opened: convert it once with safetensors.torch.save_file"
        )


def _load_checkpoint(model: nn.Module, path: Path) -> None:
    try:
        with safe_open(str(path), framework="pt") as file:
            there = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        timm.models.load_checkpoint(model, str(path), strict=True)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"checkpoint '{path}' cannot be read: {error}; it is damaged or not safetensors") from error
    except (RuntimeError, KeyError) as error:
        wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        raise ModelError(f"checkpoint '{path}' does not fit the model: {_difference(wanted, there)}") from error


def _difference(wanted: dict[str, tuple[int, ...]], there: dict[str, tuple[int, ...]]) -> str:
    """The first few tensors that are missing, unknown or of another shape."""
    missing = [key for key in wanted if key not in there]
    unknown = [key for key in there if key not in wanted]
    shapes = [f"{k} is {there[k]}, not {wanted[k]}" for k in wanted if k in there and there[k] != wanted[k]]
    found = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    said = [
        f"{len(names)} tensors {what} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
        for what, names in found
        if names
    ]
    return "; ".join(said) + "; give the architecture's arguments with --model-arg, e.g. --model-arg img_size=32"
