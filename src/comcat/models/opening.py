"""Getting a model from what a user types: a timm or hub name, a saved directory, a name and a checkpoint."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..storage.atomic import CONFIG_NAME
from ..storage.checkpoint import load
from ..storage.reader import read_json, read_tensors
from ..wording import some
from .arguments import check_args
from .source import Source
from .versions import check_versions

#: A model may take this many bytes, or this many times those of its checkpoint or of the bare architecture.
_MOST_BYTES, _MOST_TIMES = 1 << 30, 2
#: Names of weight files that are no pickles.
_WEIGHTS = ("model.safetensors", "open_clip_model.safetensors")


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
        ModelError: timm or PyTorch is too old to be safe; unknown name, arguments that the architecture does not take
            or that make it huge, weights that cannot be had, or a checkpoint that does not fit (the differing tensors
            are named).
        CheckpointError: a saved directory that is damaged.
    """
    check_versions()
    args = dict(model_args or {})
    check_args(name, args)
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
    tensors = None if checkpoint is None else _read_checkpoint(Path(checkpoint))
    model = _create(name, pretrained and checkpoint is None, args, tensors, checkpoint)
    if tensors is not None:
        _fill(model, tensors, checkpoint)
    architecture = (model.pretrained_cfg or {}).get("architecture") or name
    if ":" not in name:
        model.comcat_source = Source(architecture, args)
    return model


def _create(
    name: str,
    pretrained: bool,
    args: dict[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
    checkpoint: str | Path | None = None,
) -> Any:
    try:
        source, _, place = name.partition(":")
        if place and pretrained:
            _check_source(source, place)
        if args or place or tensors is not None:
            _check_size(name, args, tensors, checkpoint)
        return timm.create_model(name, pretrained=pretrained, **args)
    except ModelError:
        raise
    except (TypeError, AssertionError) as error:
        raise ModelError(f"'{name}' cannot be built with {args}: {error}") from error
    except Exception as error:
        # Hub clients raise their transport's own exceptions, which differ between versions.
        what = "the pretrained weights of " if pretrained else ""
        fix = "; check the network, or give --checkpoint FILE.safetensors" if pretrained else ""
        raise ModelError(f"cannot load {what}'{name}': {type(error).__name__}: {error}{fix}") from error


def _check_size(
    name: str, args: dict[str, Any], tensors: Mapping[str, Tensor] | None, checkpoint: str | Path | None
) -> None:
    """Raise ModelError before a model is built that does not fit its checkpoint, or is out of all proportion."""
    try:
        model = _shapes(name, args)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        with contextlib.suppress(NotImplementedError, RuntimeError):
            _shapes(name, {})
            raise ModelError(f"'{name}' cannot be built with {args}: {error}") from error
        return  # one of the few architectures that look at numbers while they are built
    if tensors is not None:
        _check_fits(model, tensors, checkpoint)
    there = 0 if tensors is None else _bytes(tensors.values())
    needed = _bytes([*model.parameters(), *model.buffers()])
    if needed <= _MOST_BYTES:
        return
    own = _shapes((model.pretrained_cfg or {}).get("architecture") or name, {})
    usual = max(there, _bytes([*own.parameters(), *own.buffers()]))
    if needed > _MOST_TIMES * usual:
        raise ModelError(
            f"'{name}' with {args} would take {needed:,} bytes, far beyond the {usual:,} of the architecture or its "
            "checkpoint; choose a larger architecture, or correct the arguments"
        )


def _shapes(name: str, args: dict[str, Any]) -> Any:
    """The architecture without memory."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return timm.create_model(name, pretrained=False, **args)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _check_source(source: str, place: str) -> None:
    """Raise ModelError unless a directory or Hub repository brings safetensors and describes no more than a model.

    What its config.json says goes to ``timm.create_model``, which would follow addresses and paths in it.
    """
    config: Any
    if source == "local-dir":
        folder = Path(place)
        config = read_json(folder / "config.json", what="model configuration", error=ModelError)
        there = any((folder / name).is_file() for name in _WEIGHTS)
    elif source == "hf-hub":
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        repository, _, revision = place.partition("@")
        revision = revision or None  # type: ignore[assignment]
        file = hf_hub_download(repository, "config.json", revision=revision)
        config, there = read_json(file, what="model configuration", error=ModelError), False
        for name in _WEIGHTS:
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(repository, name, revision=revision)
                there = True
                break
    else:
        raise ModelError(f"'{source}:' is no source of models; there are hf-hub: and local-dir:")
    if not there:
        raise ModelError(
            f"'{source}:{place}' holds no {_WEIGHTS[0]}; pickled weights can run code when read and are never opened"
        )
    config = config if isinstance(config, dict) else {}
    args, described = config.get("model_args") or {}, config.get("pretrained_cfg") or config
    if not isinstance(args, dict) or not isinstance(described, dict):
        raise ModelError(f"the model configuration of '{source}:{place}' is damaged")
    check_args(str(config.get("architecture")), args)
    led = [key for key in ("url", "file", "hf_hub_id", "hf_hub_filename", "state_dict") if described.get(key)]
    if led:
        raise ModelError(f"the model configuration of '{source}:{place}' leads elsewhere by {led[0]!r}; remove it")


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"checkpoint '{path}' does not exist")
    if path.suffix != ".safetensors":
        raise ModelError(
            f"checkpoint '{path}' is not a .safetensors file; pickled checkpoints can run code when read and are never "
            "opened: convert it once with safetensors.torch.save_file"
        )
    tensors: dict[str, Tensor] = timm.models.clean_state_dict(
        read_tensors(path, what="checkpoint", error=ModelError)[1]
    )
    return tensors


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], checkpoint: str | Path | None) -> None:
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError:
        _check_fits(model, tensors, checkpoint)
        raise


def _check_fits(model: nn.Module, tensors: Mapping[str, Tensor], checkpoint: str | Path | None) -> None:
    there = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if there != wanted:
        raise ModelError(f"checkpoint '{checkpoint}' does not fit the model: {_difference(wanted, there)}")
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() != tensors[key].is_floating_point():
            raise ModelError(
                f"checkpoint '{checkpoint}' does not fit the model: {key} is of dtype {tensors[key].dtype}"
            )


def _difference(wanted: dict[str, tuple[int, ...]], there: dict[str, tuple[int, ...]]) -> str:
    """The first few tensors that are missing, unknown or of another shape."""
    missing = [key for key in wanted if key not in there]
    unknown = [key for key in there if key not in wanted]
    shapes = [f"{k} is {there[k]}, not {wanted[k]}" for k in wanted if k in there and there[k] != wanted[k]]
    found = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    said = [f"{len(names)} tensors {what} ({some(names, count=2)})" for what, names in found if names]
    return "; ".join(said) + "; give the architecture's arguments with --model-arg, e.g. --model-arg img_size=32"
