"""transformers: an architecture that it exports and its configuration; directories of ``save_pretrained``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ComcatError, ModelError
from ..storage.reader import read_json, read_tensors
from ..wording import some
from . import transformers_config as configs
from .library import Library, Wanted
from .source import Source
from .transformers_images import data_config
from .transformers_text import has_own_projection, tokenizer_of, whole_class
from .weights import check_proportion, read_checkpoint, size_of

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


class TransformersModels(Library):
    """``name`` is a class, ``args`` its ``config`` as a dictionary and the ``attention`` of its parts: eager, sdpa.

    ``pooling`` is False where its last layer, a pooler, was left out, as of DINO's weights; it is no setting of a
    configuration.
    """

    name: ClassVar = "transformers"
    advice: ClassVar = "its configuration must be the one that it was built from"
    weights: ClassVar = (_WEIGHTS, _INDEX, "model-*-of-*.safetensors")

    # -- a description -------------------------------------------------------------------------------------------

    def owns(self, model: nn.Module) -> bool:
        return type(model).__module__.startswith("transformers.models.") and hasattr(model, "config")

    def describe(self, model: nn.Module) -> Source | None:
        import transformers

        if getattr(transformers, type(model).__name__, None) is not type(model):
            return None  # a part of a model, or a class that somebody derived
        config: Any = model.config
        args: dict[str, Any] = {"config": configs.plain(config), "attention": configs.attention(config)}
        if _may_pool(type(model)) and getattr(model, "pooler", None) is None:
            args["pooling"] = False
        return Source(type(model).__name__, args, library=self.name)

    def following(self, source: Source, model: nn.Module, dense: bool) -> Source:
        """The configuration is the model's own, and changes with it."""
        now = self.describe(model)
        return source if now is None else replace(source, name=now.name, args=now.args)

    def check(self, source: Source) -> None:
        what = f"the configuration of '{source.name}'"
        data, chosen = source.args.get("config"), source.args.get("attention", {})
        unknown = set(source.args) - {"config", "attention", "pooling"}
        if not isinstance(data, dict) or not isinstance(chosen, dict) or unknown:
            raise CheckpointError(f"{what} is damaged: a model of transformers has 'config' and 'attention'")
        if not all(value in configs.ATTENTION for value in chosen.values()):
            raise CheckpointError(f"{what} asks for an attention that is neither of {', '.join(configs.ATTENTION)}")
        cls = configs.model_class(source.name, CheckpointError)
        if source.args.get("pooling", True) is not True and not (source.args["pooling"] is False and _may_pool(cls)):
            raise CheckpointError(f"{what} is damaged: {source.name} has no pooler that could be left out")
        configs.check(data, what, CheckpointError)
        configs.configured(cls, data, what, CheckpointError)

    def make(self, source: Source) -> nn.Module:
        cls = configs.model_class(source.name)
        with torch.device("cpu"):  # a configuration computes with numbers
            config = configs.configured(cls, source.args["config"], f"the configuration of '{source.name}'")
        configs.set_attention(config, source.args.get("attention", {}))
        model: nn.Module = cls(config, **_pooling(source))
        return model

    def filled(self, source: Source, tensors: dict[str, Tensor], place: Path) -> nn.Module:
        """transformers reads the names of its older versions too, and still writes them."""
        self.check(source)
        cls = configs.model_class(source.name)
        config = configs.configured(cls, source.args["config"], f"the configuration of '{source.name}'")
        model: nn.Module = _filled(cls, config, tensors, place, False, _pooling(source))
        return model

    # -- a model at hand -----------------------------------------------------------------------------------------

    def num_classes(self, model: nn.Module) -> int | None:
        name = type(model).__name__
        if "ForImageClassification" in name:
            return int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
        return None if "For" in name else 0

    def data_config(self, model: nn.Module) -> dict[str, Any]:
        config: Any = model.config
        named = dict(sorted((getattr(config, "id2label", None) or {}).items()))
        own = any(name != f"LABEL_{number}" for number, name in named.items())
        return {"label_names": tuple(named.values())} if own and self.num_classes(model) else {}

    # -- images and text -----------------------------------------------------------------------------------------

    def both_towers(self, files: Mapping[str, Any]) -> dict[str, Any] | None:
        name = whole_class(files["config.json"])
        return None if name is None else {"architecture": name}

    def tokenizer(self, model: nn.Module, folder: Path | None, name: str) -> Callable[[list[str]], Any]:
        return tokenizer_of(model, folder, name)

    def tower_is_projected(self, model: nn.Module) -> bool:
        return has_own_projection(model)

    # -- opening -------------------------------------------------------------------------------------------------

    def reads(self, files: Mapping[str, Any]) -> bool:
        return isinstance(files.get("config.json", {}).get("model_type"), str)

    def open(self, wanted: Wanted) -> nn.Module:
        raise ModelError(
            f"'transformers/{wanted.name}' names no weights; give a Hub repository as ORG/NAME, or a directory that "
            "save_pretrained has written"
        )

    def open_directory(self, folder: Path, wanted: Wanted) -> nn.Module:
        """The model in float32; a dual encoder as its image tower, unless ``architecture`` names another class."""
        what = f"the model configuration '{folder / 'config.json'}'"
        data = configs.settings(read_json(folder / "config.json", what="model configuration", error=ModelError))
        configs.check(data, what)
        args = dict(wanted.args)
        if "num_classes" in args:  # as timm calls them
            args["num_labels"] = args.pop("num_classes")
        cls, data = _architecture(data, args.pop("architecture", None), what, "num_labels" in args)
        data = _overridden(data, args, cls, what)
        config = configs.configured(cls, data, what)
        source = Source(cls.__name__, {"config": configs.plain(config)}, library=self.name)
        tensors = None
        if wanted.checkpoint is not None:
            tensors = read_checkpoint(wanted.checkpoint)
        elif wanted.pretrained:
            tensors = _read_weights(folder)
        if tensors and _may_pool(cls) and not any("pooler." in name for name in tensors):
            source.args["pooling"] = False
        try:
            shapes = source.build(meta=True)
        except CheckpointError as error:
            raise ModelError(str(error)) from error
        check_proportion(cls.__name__, f"the configuration in '{folder}'", shapes, size_of((tensors or {}).values()))
        pooling = _pooling(source)
        model = (
            cls(config, **pooling)
            if tensors is None
            else _filled(cls, config, tensors, folder, "num_labels" in args, pooling)
        )
        images = data_config(folder, config)
        if "input_size" in images and any("image_size" in key for key in args):
            del images["input_size"]
        model.comcat_source = replace(source, config=images)
        filled: nn.Module = model.eval()
        return filled


LIBRARY = TransformersModels()


def _architecture(data: dict[str, Any], asked: Any, what: str, classify: bool) -> tuple[Any, dict[str, Any]]:
    """The class to build and its part of the configuration."""
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = data["model_type"]
    if kind not in CONFIG_MAPPING_NAMES:
        import transformers

        raise ModelError(
            f"{what} is of the type '{kind}', which transformers {transformers.__version__} does not know; upgrade "
            "transformers if it is a newer one. Code that a repository brings along is never run"
        )
    named = [name for name in data.get("architectures") or [] if isinstance(name, str)]
    classifiers: list[str] = _names(auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(kind))
    base = _names(auto.MODEL_FOR_IMAGE_MAPPING_NAMES.get(kind) or auto.MODEL_MAPPING_NAMES.get(kind))
    if asked is None and classify and not set(named) & set(classifiers):
        named = classifiers
    name = asked or next((name for name in [*named, *base] if name), None)
    cls = configs.model_class(name)
    tower = None if asked else _image_tower(cls, data)
    if tower is not None:
        warnings.warn(
            f"{cls.__name__} needs text beside images: its image tower {tower.__name__} is opened; name another class "
            "with --model-arg architecture=NAME",
            stacklevel=2,
        )
        inner = {"model_type": tower.config_class.model_type, **data["vision_config"]}
        if "projection_dim" in data:  # the outer one is what a dual encoder is built with
            inner["projection_dim"] = data["projection_dim"]
        return tower, inner
    if "pixel_values" not in _parameters(cls):
        raise ModelError(
            f"{what} is that of {cls.__name__}, which takes no images (pixel_values); comcat works on vision models"
        )
    return cls, data


def _may_pool(cls: Any) -> bool:
    """Whether a class can be built with and without a pooler."""
    return "add_pooling_layer" in inspect.signature(cls.__init__).parameters


def _pooling(source: Source) -> dict[str, bool]:
    """What its class is called with, beside the configuration."""
    return {} if source.args.get("pooling", True) else {"add_pooling_layer": False}


def _names(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _image_tower(cls: Any, data: dict[str, Any]) -> Any:
    """The class of the same family that is its image encoder, with the projection if there is one."""
    import transformers

    if _takes_images_alone(cls) or not isinstance(data.get("vision_config"), dict):
        return None
    family = cls.__name__.removesuffix("Model")
    for name in (f"{family}VisionModelWithProjection", f"{family}VisionModel"):
        tower = getattr(transformers, name, None)
        if tower is not None and _takes_images_alone(tower):
            return tower
    return None


def _parameters(cls: Any) -> list[str]:
    return list(inspect.signature(cls.forward).parameters)[1:]


def _takes_images_alone(cls: Any) -> bool:
    parameters = _parameters(cls)
    return parameters[:1] == ["pixel_values"] and "input_ids" not in parameters


def _overridden(data: dict[str, Any], args: dict[str, Any], cls: Any, what: str) -> dict[str, Any]:
    known = {*configs.configured(cls, data, what).to_dict(), "num_labels", "image_size"}
    for key in args:
        if key not in known or key in ("model_type", "architectures", "dtype"):
            raise ModelError(
                f"{cls.__name__} cannot be built with {key!r}, which is no setting of its configuration; leave it out"
            )
    made = {**data, **args}
    if "num_labels" in args:
        made = {key: value for key, value in made.items() if key not in ("id2label", "label2id")}
    configs.check(made, f"{cls.__name__} with {args}")
    return made


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the directory's safetensors files."""
    names = [_WEIGHTS] if (folder / _WEIGHTS).is_file() else []
    if not names and (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX, what="list of weight files", error=ModelError)
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ModelError(f"the list of weight files '{folder / _INDEX}' is damaged")
        names = sorted(set(places.values()))
        wrong = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if wrong:
            raise ModelError(f"the list of weight files '{folder / _INDEX}' leads elsewhere: {wrong[0][:60]!r}")
    if not names:
        pickles = sorted({path.name for pattern in _PICKLES for path in folder.glob(pattern)})
        raise ModelError(
            f"'{folder}' holds no {_WEIGHTS}"
            + (
                f", but {some(pickles)}: pickled weights can run code when read and are never opened. Where you trust "
                "them, load them with transformers and write them with save_pretrained"
                if pickles
                else " nor any other weights; download them, or give --checkpoint FILE.safetensors"
            )
        )
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors.update(read_tensors(folder / name, what="weights", error=ModelError)[1])
    return tensors


def _filled(
    cls: Any,
    config: Any,
    tensors: dict[str, Tensor],
    folder: Path,
    new_classifier: bool,
    pooling: Mapping[str, bool],
) -> Any:
    """The model with these weights, in whatever version's names they are.

    Raises:
        ModelError: some are missing or of another shape; but for a classifier of other classes, which begins anew.
    """
    try:
        with _quiet():
            model, found = cls.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **pooling,
            )
    except ComcatError:
        raise
    except Exception as error:
        raise ModelError(f"the weights of '{folder}' cannot be read into {cls.__name__}: {error}") from error
    missing = {*found["missing_keys"], *(entry[0] for entry in found["mismatched_keys"])}
    if new_classifier:
        inner = f"{cls.base_model_prefix}."
        missing = {name for name in missing if name.startswith(inner)}
    if missing:
        raise ModelError(
            f"the weights of '{folder}' do not fit {cls.__name__}: {len(missing)} tensors are missing or of another "
            f"shape ({some(sorted(missing), count=2)}); correct its configuration, or name the class that they are of "
            "with --model-arg architecture=NAME"
        )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and reports of transformers: what matters is raised."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
