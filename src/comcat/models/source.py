"""Where a model's architecture comes from: the timm name and arguments that build it again without weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import timm
import torch
from torch import nn

from ..errors import CheckpointError
from .arguments import allowed, behaviour, check_args, recorded, structure
from .profile import default_input_size
from .versions import check_versions

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

    def check(self) -> None:
        """Raise CheckpointError unless timm knows the architecture and it takes these arguments.

        Raises:
            ModelError: timm or PyTorch is too old to be safe.
        """
        check_versions()
        if not timm.is_model(self.name):  # nor anything that would lead to the network
            raise CheckpointError(
                f"timm has no architecture '{self.name}'; upgrade timm, or the description was edited"
            )
        check_args(self.name, self.args, CheckpointError)

    def build(self, meta: bool = False) -> nn.Module:
        """The dense architecture with fresh weights; with ``meta``, its shapes alone, which takes no memory.

        The generator of random numbers is left as it was.
        """
        self.check()
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
                model = timm.create_model(self.name, pretrained=False, **self.args)
        except Exception as error:  # whatever an architecture raises for arguments that do not go together
            raise CheckpointError(f"timm cannot build '{self.name}' with {self.args}: {error}") from error
        if self.config:
            model.pretrained_cfg = model.default_cfg = {**(model.pretrained_cfg or {}), **self.config}
        return model

    def following(self, model: nn.Module, dense: bool = False) -> Source:
        """This source with the arguments that have changed since, such as the classes or the image size.

        Args:
            dense: the model's layers are as the architecture builds them, so that their widths can be read off too.
        """
        known = allowed(self.name)
        if self.args.get("features_only"):
            return self
        there, built = behaviour(model), self.build(meta=True)
        here = behaviour(built)
        if dense:
            there, here = {**structure(model), **there}, {**structure(built), **here}
        changed = {k: v for k, v in there.items() if here.get(k) != v and (known is None or k in known)}
        if "global_pool" in changed:
            changed = self._pooling(model, changed)
        return replace(self, args={**self.args, **changed}) if changed else self

    def _pooling(self, model: nn.Module, changed: dict[str, Any]) -> dict[str, Any]:
        """``changed`` so that what is built pools through the modules that the model has.

        For a ViT, the argument ``global_pool`` also chooses the place of the last norm, which ``reset_classifier``
        leaves where it was: then that is said too; or the argument is left out, and the attribute carried.
        """
        known = allowed(self.name)
        ways: list[dict[str, Any]] = [{}]
        if known is not None and "fc_norm" in known:
            ways.append({"fc_norm": not isinstance(getattr(model, "fc_norm", None), nn.Identity)})
        for more in ways:
            built = replace(self, args={**self.args, **changed, **more}).build(meta=True)
            if all(_standing(model, name) == _standing(built, name) for name in ("norm", "fc_norm", "attn_pool")):
                return {**changed, **more}
        return {name: value for name, value in changed.items() if name != "global_pool"}


def _standing(model: nn.Module, name: str) -> bool:
    """Whether the model has such a module, and it does something."""
    return not isinstance(getattr(model, name, None), (nn.Identity, type(None)))


def describe(model: nn.Module) -> Source | None:
    """The source of a dense model: recorded when comcat or timm made it, else read off a timm model; None if neither.

    What is read off is compared with the architecture's defaults; :func:`comcat.save` checks that it is enough.
    """
    made = getattr(model, "comcat_source", None)
    config = getattr(model, "pretrained_cfg", None) or {}
    config = config if isinstance(config, dict) else config.to_dict()
    kept = {key: config[key] for key in _CONFIG_KEYS if config.get(key) is not None}
    # The registry's entry describes the pretrained model; what the model at hand says goes first.
    kept["input_size"] = default_input_size(model)
    if isinstance(getattr(model, "num_classes", None), int):
        kept["num_classes"] = model.num_classes
    if isinstance(made, Source):
        return Source(made.name, made.args, kept).following(model, dense=True)
    name = config.get("architecture")
    if not name or not timm.is_model(name):
        return None
    return Source(name, recorded(model, name) or {}, kept).following(model, dense=True)
