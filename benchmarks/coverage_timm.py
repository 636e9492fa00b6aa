"""timm's models with attention, for ``coverage.py``."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import Tensor, nn

from coverage import ATTENTION, Case

#: Classes that are called attention and have no softmax over scores of queries and keys.
NOT_SOFTMAX: dict[str, str] = {
    "XCA": "scores between channels (cross-covariance)",
    "CrossCovarianceAttn": "scores between channels (cross-covariance)",
    "davit.ChannelAttention": "scores between channels",
    "ChannelAttentionV2": "scores between channels",
    "FactorAttnConvRelPosEnc": "linear attention: the softmax is over the keys alone",
    "LinearSelfAttention": "separable: one score per token",
    "EfficientAdditiveAttention": "additive: one score per token",
    "nextvit.ConvAttention": "a grouped convolution",
    "csatv2.SpatialAttention": "a single channel: no width to reduce",
    "SplitAttn": "weights of branches",
    "SelectiveKernelAttn": "weights of branches",
    "LiteMLA": "linear: ReLU in place of a softmax",
    "LambdaLayer": "linear: lambdas in place of scores",
    "BatNonLocalAttn": "bilinear transforms of rows and columns",
    "BilinearAttnTransform": "bilinear transforms of rows and columns",
}

#: Arguments that make a model small, tried in turn; the first that leaves its classes as they are and runs is taken.
_SMALL: list[dict[str, Any]] = [
    *({"depth": 2, "embed_dim": 96, "num_heads": 3, "img_size": size} for size in (64, 56)),
    {"depth": 2, "embed_dim": 96, "num_heads": 3},
    *({"depth": 2, "img_size": size} for size in (64, 56)),
    {"depth": 2},
    {"embed_dim": (32, 64, 96, 128), "depths": (1, 1, 1, 1), "stem_width": 32, "img_size": 64},
    {"embed_dim": (32, 64, 96, 128), "depths": (1, 1, 1, 1), "stem_width": 32},
    {"embed_dim": 48, "depths": (2, 2, 2, 2), "num_heads": (2, 2, 4, 4), "window_size": 4, "img_size": 128},
    {"img_size": 64},
    {},
]

#: The modules of timm that define models with attention; the others were built once to see that they have none.
_FAMILIES = [
    "beit", "byoanet", "byobnet", "cait", "coat", "convit", "cpubone", "crossvit", "csatv2", "davit",
    "deepseek_vit", "deit", "edgenext", "efficientformer", "efficientformer_v2", "efficientvit_mit",
    "efficientvit_msra", "eva", "fastvit", "gcvit", "gemma4_vit", "hiera", "hieradet_sam2", "iformer", "levit",
    "lowformer", "maxxvit", "metaformer", "mobilenetv3", "mobilenetv5", "mobilevit", "mvitv2", "naflexvit", "nest",
    "nextvit", "pit", "pvt_v2", "qwen3_vit", "resnest", "shvit", "sknet", "swiftformer", "swin_transformer",
    "swin_transformer_v2", "swin_transformer_v2_cr", "tiny_vit", "tnt", "twins", "visformer", "vision_transformer",
    "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam", "vitamin", "volo", "xcit",
]  # fmt: skip


def families() -> list[str]:
    """The modules of timm that define models with attention."""
    return _FAMILIES


def cases(family: str) -> Iterator[Case]:
    """Small models first."""
    groups: dict[Any, list[tuple[int, str]]] = {}
    for name in timm.list_models(module=family):
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = timm.create_model(name)
        if not any(ATTENTION.search(type(module).__name__) for module in model.modules()):
            continue
        count = sum(parameter.numel() for parameter in model.parameters())
        groups.setdefault(signature(model), []).append((count, name))
    for members in sorted(groups.values(), key=min):
        _, smallest = min(members)
        yield Case([name for _, name in sorted(members)], lambda name=smallest: build(name))  # type: ignore[misc]


def signature(model: nn.Module) -> Any:
    """The classes of a model, with the parts, parameters and flags of each."""
    return frozenset(
        (
            type(module).__qualname__,
            tuple(key for key, child in module._modules.items() if child is not None and not key.isdigit()),
            tuple(key for key, one in module._parameters.items() if one is not None),
            tuple((key, one) for key, one in vars(module).items() if type(one) is bool and key != "training"),
        )
        for module in model.modules()
    )


def build(name: str) -> tuple[nn.Module, Tensor]:
    """As small as its arguments allow, and with no more than two equal blocks one after the other."""
    with torch.device("meta"):
        classes = _classes(timm.create_model(name))
    for arguments in _SMALL:
        with contextlib.suppress(Exception), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            with torch.device("meta"):
                model = timm.create_model(name, num_classes=11, **arguments)
            size = next(n for n in _sizes(model, arguments) if runs(model, torch.empty(2, 3, n, n, device="meta")))
            if _classes(model) == classes:
                break
    made = timm.create_model(name, num_classes=11, **arguments)
    made.pretrained_cfg["input_size"] = (3, size, size)
    images = torch.randn(2, 3, size, size)
    return shortened(made, images), images


def _sizes(model: Any, arguments: dict[str, Any]) -> list[int]:
    return [arguments["img_size"]] if "img_size" in arguments else [64, 96, 128, model.pretrained_cfg["input_size"][-1]]


def runs(model: nn.Module, images: Tensor) -> bool:
    """Whether images of this size pass."""
    with contextlib.suppress(Exception), torch.no_grad():
        model.eval()(images)
        return True
    return False


def shortened(model: nn.Module, images: Tensor) -> nn.Module:
    """Without the third and later of equal blocks, where the model runs so."""
    before = {name: dict(module._modules) for name, module in model.named_modules()}
    for module in list(model.modules()):
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            seen: dict[Any, int] = {}
            for key, child in list(module._modules.items()):
                kind = tuple(tuple(p.shape) for p in child.parameters()) if child is not None else ()
                seen[kind] = seen.get(kind, 0) + bool(kind)
                if seen[kind] > 2:
                    del module._modules[key]
    if not runs(model, images):
        for name, module in model.named_modules():
            module._modules.update(before.get(name, {}))
    return model


def _classes(model: nn.Module) -> set[str]:
    return {type(module).__qualname__ for module in model.modules()}
