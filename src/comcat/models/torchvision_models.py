"""torchvision: a builder of its classification models by name, or the classes of its ViT and Swin with their sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torchvision.models as zoo
from torch import Tensor, nn

from ..errors import CheckpointError, ComcatError, ModelError
from .library import Library, Wanted
from .source import Source
from .timm_arguments import check_value
from .weights import check_proportion, fill, read_checkpoint, size_of

#: Arguments of the builders that belong to an architecture.
_ARGS = frozenset({
    "num_classes", "image_size", "input_size", "dropout", "attention_dropout", "stochastic_depth_prob",
    "representation_size",
})  # fmt: skip
#: Classes that can be built with sizes of one's own.
_CLASSES = {
    "VisionTransformer": _ARGS - {"input_size", "stochastic_depth_prob"}
    | {"patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim"},
    "SwinTransformer": _ARGS - {"image_size", "input_size", "representation_size"}
    | {"patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio"},
}
_MOST_LAYERS = 1000


class TorchvisionModels(Library):
    """``name`` is a builder such as ``vit_b_16``, or one of the two classes; ``args`` are its arguments."""

    name: ClassVar = "torchvision"
    advice: ClassVar = "pass model_args={...} with the arguments that the model was built with"

    def owns(self, model: nn.Module) -> bool:
        return type(model).__module__.startswith("torchvision.models.")

    def describe(self, model: nn.Module) -> Source | None:
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        classes = {"num_classes": self.num_classes(model)}
        for name in _builders(type(model).__module__):
            source = Source(name, classes, library=self.name)
            if {key: tensor.shape for key, tensor in source.build(meta=True).state_dict().items()} == shapes:
                return source
        if type(model) is zoo.VisionTransformer:
            return Source("VisionTransformer", _vit(model), library=self.name)
        if type(model) is zoo.SwinTransformer:
            return Source("SwinTransformer", _swin(model), library=self.name)
        return None

    def check(self, source: Source) -> None:
        _check(source.name, source.args, CheckpointError)

    def make(self, source: Source) -> nn.Module:
        model: nn.Module
        if source.name in _CLASSES:
            model = getattr(zoo, source.name)(**source.args)
        else:
            model = zoo.get_model_builder(source.name)(weights=None, **source.args)
        return model

    def num_classes(self, model: nn.Module) -> int | None:
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        return linears[-1].out_features if linears else 0

    def open(self, wanted: Wanted) -> nn.Module:
        name, args = wanted.name, wanted.args
        _check(name, args, ModelError)
        source = Source(name, args, library=self.name)
        try:
            shapes = source.build(meta=True)
        except CheckpointError as error:
            raise ModelError(str(error)) from error
        tensors = None if wanted.checkpoint is None else read_checkpoint(wanted.checkpoint)
        check_proportion(name, args, shapes, size_of((tensors or {}).values()))
        if tensors is None and wanted.pretrained:
            tensors = _download(name)
        model = self.make(source)
        if tensors is not None:
            place = wanted.checkpoint or Path(f"the weights of {name}")
            fill(model, tensors, place, "give the architecture's arguments with --model-arg, e.g. num_classes=10")
        config = _data_config(name, tensors is not None and wanted.checkpoint is None)
        if "image_size" in args or "input_size" in args:
            config.pop("input_size", None)
        model.comcat_source = replace(source, config=config)  # type: ignore[assignment]
        return model.eval()


LIBRARY = TorchvisionModels()


def _builders(module: str) -> Iterator[str]:
    """Builders of the classification models that are defined in ``module``."""
    for name in zoo.list_models(module=zoo):
        if zoo.get_model_builder(name).__module__ == module:
            yield name


def _check(name: str, args: dict[str, Any], error: type[ComcatError]) -> None:
    known = _CLASSES.get(name, _ARGS)
    if name not in _CLASSES and name not in zoo.list_models(module=zoo):
        raise error(f"torchvision has no classification model {name[:60]!r}; see torchvision.models.list_models()")
    for key, value in args.items():
        if key not in known:
            raise error(f"torchvision cannot build '{name}' with {key!r}, which is no argument of its architecture")
        check_value(key, value, error)
        if key == "num_layers" and isinstance(value, int) and value > _MOST_LAYERS:
            raise error(f"the argument {key} is {value}; no architecture has more than {_MOST_LAYERS} layers")


def _vit(model: Any) -> dict[str, Any]:
    layers = model.encoder.layers
    names = ("image_size", "patch_size", "hidden_dim", "mlp_dim", "dropout", "attention_dropout", "representation_size")
    heads = layers[0].num_heads if len(layers) else 1
    read = {name: getattr(model, name) for name in names}
    return {**read, "num_layers": len(layers), "num_heads": heads, "num_classes": LIBRARY.num_classes(model)}


def _swin(model: Any) -> dict[str, Any]:
    stem = model.features[0][0]
    stages: list[Any] = [
        stage for stage in model.features if isinstance(stage, nn.Sequential) and hasattr(stage[0], "attn")
    ]
    first = stages[0][0]
    rates = [block.stochastic_depth.p for stage in stages for block in stage]
    hidden, width = first.mlp[0].out_features, first.mlp[0].in_features
    return {
        "patch_size": list(stem.kernel_size),
        "embed_dim": stem.out_channels,
        "depths": [len(stage) for stage in stages],
        "num_heads": [stage[0].attn.num_heads for stage in stages],
        "window_size": list(first.attn.window_size),
        "mlp_ratio": (hidden + 0.5) / width if int(width * (hidden / width)) != hidden else hidden / width,
        "stochastic_depth_prob": max(rates),
        "num_classes": LIBRARY.num_classes(model),
    }


def _data_config(name: str, pretrained: bool) -> dict[str, Any]:
    """How the builder's best weights want their images, and, where these are loaded, the names of their classes."""
    if name in _CLASSES:
        return {}
    best: Any = zoo.get_model_weights(name).DEFAULT
    made = best.transforms()
    crop, resize = made.crop_size[0], made.resize_size[0]
    config = {
        "mean": tuple(made.mean),
        "std": tuple(made.std),
        "interpolation": made.interpolation.value,
        "crop_pct": crop / resize,
        "crop_mode": "center",
        "input_size": (3, crop, crop),
    }
    return {**config, "label_names": tuple(best.meta["categories"])} if pretrained else config


def _download(name: str) -> dict[str, Tensor]:
    """The best weights that torchvision has, from the network or its cache, read without running code in them."""
    from huggingface_hub import constants

    best: Any = None if name in _CLASSES else zoo.get_model_weights(name).DEFAULT
    if best is None:
        raise ModelError(f"there are no pretrained weights of '{name}'; give --checkpoint FILE.safetensors")
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(best.url).name
    if constants.HF_HUB_OFFLINE and not cached.is_file():
        raise ModelError(
            f"cannot load the weights of 'torchvision/{name}': HF_HUB_OFFLINE is set and '{cached}' is not there; "
            "allow the network, or give --checkpoint FILE.safetensors"
        )
    try:
        tensors: dict[str, Tensor] = best.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # whatever the network raises
        raise ModelError(
            f"cannot load the weights of 'torchvision/{name}': {type(error).__name__}: {error}; check the network, or "
            "give --checkpoint FILE.safetensors"
        ) from error
    return tensors
