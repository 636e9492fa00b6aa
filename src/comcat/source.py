"""Where a model's architecture comes from: the timm name and arguments that build it again without weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn

from .errors import CheckpointError
from .profile import default_input_size

#: What of timm's ``pretrained_cfg`` a user of the small model still needs: the data config and the classes.
_CONFIG_KEYS = (
    "input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes", "pool_size", "first_conv",
    "classifier", "label_names", "label_descriptions", "license", "origin_url", "tag",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """``timm.create_model(name, **args)`` builds the dense architecture; ``config`` is its data config."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The dense architecture with fresh weights."""
        if not timm.is_model(self.name):  # nor anything that would lead to the network
            raise CheckpointError(
                f"timm has no architecture '{self.name}'; upgrade timm, or the description was edited"
            )
        try:
            model = timm.create_model(self.name, pretrained=False, **self.args)
        except (RuntimeError, TypeError, ValueError, AssertionError, KeyError) as error:
            raise CheckpointError(f"timm cannot build '{self.name}' with {self.args}: {error}") from error
        if self.config:
            model.pretrained_cfg = model.default_cfg = {**(model.pretrained_cfg or {}), **self.config}
        return model


def describe(model: nn.Module) -> Source | None:
    """The source of a dense model: recorded when comcat loaded it, else read off a timm model; None if it is neither.

    What is read off is compared with the architecture's defaults; :func:`comcat.save` checks that it is enough.
    """
    recorded = getattr(model, "comcat_source", None)
    config = getattr(model, "pretrained_cfg", None) or {}
    config = config if isinstance(config, dict) else config.to_dict()
    kept = {key: config[key] for key in _CONFIG_KEYS if config.get(key) is not None}
    # The registry's entry describes the pretrained model; what the model at hand says goes first.
    kept["input_size"] = default_input_size(model)
    if isinstance(getattr(model, "num_classes", None), int):
        kept["num_classes"] = model.num_classes
    if isinstance(recorded, Source):
        return Source(recorded.name, recorded.args, kept)
    name = config.get("architecture")
    if not name or not timm.is_model(name):
        return None
    with torch.device("meta"):
        default = timm.create_model(name, pretrained=False)
    there, base = _arguments(model), _arguments(default)
    args = {key: value for key, value in there.items() if base.get(key) != value}
    return Source(name, args, kept)


def _arguments(model: nn.Module) -> dict[str, Any]:
    """Constructor arguments that can be read off a timm ViT or Swin."""
    args: dict[str, Any] = {}
    for key in ("num_classes", "embed_dim", "global_pool"):
        value = getattr(model, key, None)
        if isinstance(value, (int, str)):
            args[key] = value
    embed = getattr(model, "patch_embed", None)
    if embed is not None:
        for key in ("img_size", "patch_size"):
            value = getattr(embed, key, None)
            if isinstance(value, (int, tuple)):
                args[key] = value
        projection = getattr(embed, "proj", None)
        if isinstance(projection, nn.Conv2d):
            args["in_chans"] = projection.in_channels
            if hasattr(model, "layers"):
                args["embed_dim"] = projection.out_channels
    stages = [stage.blocks for stage in getattr(model, "layers", []) if hasattr(stage, "blocks")]
    if stages:
        args["depths"] = tuple(len(blocks) for blocks in stages)
        args["num_heads"] = tuple(blocks[0].attn.num_heads for blocks in stages)
        args["window_size"] = getattr(stages[0][0], "window_size", None)
        first = stages[0][0]
    elif len(getattr(model, "blocks", [])):
        first = model.blocks[0]  # type: ignore[index]
        args["depth"] = len(model.blocks)  # type: ignore[arg-type]
        args["num_heads"] = getattr(getattr(first, "attn", None), "num_heads", None)
    else:
        return args
    fc1 = getattr(getattr(first, "mlp", None), "fc1", None)
    if isinstance(fc1, nn.Linear):
        width, hidden = fc1.in_features, fc1.out_features
        # timm truncates the product of width and ratio
        args["mlp_ratio"] = hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width
    return args
