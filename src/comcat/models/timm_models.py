"""timm: ``timm.create_model(name, **args)``, with pretrained weights of its registry or of a Hub repository."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import timm
from torch import Tensor, nn

from ..errors import CheckpointError, ModelError
from ..storage.reader import read_json
from .library import Library, Wanted
from .source import Source
from .timm_arguments import allowed, behaviour, check_args, recorded, structure
from .unfilled import building
from .weights import check_fits, check_proportion, fill, is_large, read_checkpoint, size_of

#: What of timm's ``pretrained_cfg`` a user of the small model still needs: the data config and the classes.
_CONFIG_KEYS = (
    "input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes", "pool_size", "first_conv",
    "classifier", "label_names", "label_descriptions", "license", "origin_url", "tag",
)  # fmt: skip
_FIT = "give the architecture's arguments with --model-arg, e.g. --model-arg img_size=32"
#: Names of weight files that are no pickles.
_WEIGHTS = ("model.safetensors", "open_clip_model.safetensors")


class TimmModels(Library):
    """``args`` are those of ``timm.create_model``."""

    name: ClassVar = "timm"
    advice: ClassVar = "pass model_args={...} with the arguments that timm.create_model was given"

    # -- a description -------------------------------------------------------------------------------------------

    def owns(self, model: nn.Module) -> bool:
        name = _pretrained_cfg(model).get("architecture")
        return bool(name) and timm.is_model(name)

    def describe(self, model: nn.Module) -> Source | None:
        name = _pretrained_cfg(model)["architecture"]
        return Source(name, recorded(model, name) or {})

    def check(self, source: Source) -> None:
        if not timm.is_model(source.name):  # nor anything that would lead to the network
            raise CheckpointError(
                f"timm has no architecture '{source.name}'; upgrade timm, or the description was edited"
            )
        check_args(source.name, source.args, CheckpointError)

    def make(self, source: Source) -> nn.Module:
        model = timm.create_model(source.name, pretrained=False, **source.args)
        if source.config:
            model.pretrained_cfg = model.default_cfg = {**(model.pretrained_cfg or {}), **source.config}
        return model

    def following(self, source: Source, model: nn.Module, dense: bool) -> Source:
        known = allowed(source.name)
        if source.args.get("features_only"):
            return source
        there, built = behaviour(model), source.build(meta=True)
        here = behaviour(built)
        if dense:
            there, here = {**structure(model), **there}, {**structure(built), **here}
        changed = {k: v for k, v in there.items() if here.get(k) != v and (known is None or k in known)}
        if "global_pool" in changed:
            changed = _pooling(source, model, changed)
        return replace(source, args={**source.args, **changed}) if changed else source

    def decoded(self, args: Any) -> Any:
        """JSON turns tuples into lists; timm wants tuples back."""
        if isinstance(args, list):
            return tuple(self.decoded(item) for item in args)
        return {key: self.decoded(item) for key, item in args.items()} if isinstance(args, dict) else args

    # -- a model at hand -----------------------------------------------------------------------------------------

    def data_config(self, model: nn.Module) -> dict[str, Any]:
        config = _pretrained_cfg(model)
        return {key: config[key] for key in _CONFIG_KEYS if config.get(key) is not None}

    # -- opening -------------------------------------------------------------------------------------------------

    def reads(self, files: Mapping[str, Any]) -> bool:
        config = files.get("config.json", {})
        return "architecture" in config and "model_type" not in config

    def open_directory(self, folder: Path, wanted: Wanted) -> nn.Module:
        return self.open(replace(wanted, name=f"local-dir:{folder}"))

    def open(self, wanted: Wanted) -> nn.Module:
        name, args = wanted.name, wanted.args
        check_args(name, args)
        if ":" not in name and not timm.is_model(name.partition(".")[0]):
            close = difflib.get_close_matches(name, timm.list_models(), 3)
            hint = f"; did you mean {', '.join(close)}?" if close else "; see timm.list_models()"
            raise ModelError(f"timm has no model named '{name}'{hint}")
        tensors: dict[str, Tensor] | None = None
        if wanted.checkpoint is not None:
            tensors = timm.models.clean_state_dict(read_checkpoint(wanted.checkpoint))
        model = _create(wanted, tensors)
        if tensors is not None:
            fill(model, tensors, wanted.checkpoint, _FIT)
        if ":" not in name:
            model.comcat_source = Source((model.pretrained_cfg or {}).get("architecture") or name, args)
        return model


LIBRARY = TimmModels()


def _pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return config if isinstance(config, dict) else dict(config.to_dict())


def _pooling(source: Source, model: nn.Module, changed: dict[str, Any]) -> dict[str, Any]:
    """``changed`` so that what is built pools through the modules that the model has.

    For a ViT, the argument ``global_pool`` also chooses the place of the last norm, which ``reset_classifier``
    leaves where it was: then that is said too; or the argument is left out, and the attribute carried.
    """
    known = allowed(source.name)
    ways: list[dict[str, Any]] = [{}]
    if known is not None and "fc_norm" in known:
        ways.append({"fc_norm": not isinstance(getattr(model, "fc_norm", None), nn.Identity)})
    for more in ways:
        built = replace(source, args={**source.args, **changed, **more}).build(meta=True)
        if all(_standing(model, name) == _standing(built, name) for name in ("norm", "fc_norm", "attn_pool")):
            return {**changed, **more}
    return {name: value for name, value in changed.items() if name != "global_pool"}


def _standing(model: nn.Module, name: str) -> bool:
    """Whether the model has such a module, and it does something."""
    return not isinstance(getattr(model, name, None), (nn.Identity, type(None)))


# -- opening ----------------------------------------------------------------------------------------------------------


def _create(wanted: Wanted, tensors: Mapping[str, Tensor] | None) -> Any:
    name, args = wanted.name, wanted.args
    pretrained = wanted.pretrained and tensors is None
    try:
        source, _, place = name.partition(":")
        if place and pretrained:
            _check_source(source, place)
        if args or place or tensors is not None:
            _check_size(name, args, tensors, wanted.checkpoint)
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


def _check_size(name: str, args: dict[str, Any], tensors: Mapping[str, Tensor] | None, checkpoint: Path | None) -> None:
    """Raise ModelError before a model is built that does not fit its checkpoint, or is out of all proportion."""
    try:
        model = _shapes(name, args)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        with contextlib.suppress(NotImplementedError, RuntimeError):
            _shapes(name, {})
            raise ModelError(f"'{name}' cannot be built with {args}: {error}") from error
        return  # one of the few architectures that look at numbers while they are built
    if tensors is not None:
        check_fits(model, tensors, checkpoint, _FIT)
    if is_large(model):
        own = _shapes((model.pretrained_cfg or {}).get("architecture") or name, {})
        there = 0 if tensors is None else size_of(tensors.values())
        check_proportion(name, args, model, max(there, size_of([*own.parameters(), *own.buffers()])))


def _shapes(name: str, args: dict[str, Any]) -> Any:
    """The architecture without memory."""
    with building():
        return timm.create_model(name, pretrained=False, **args)


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
