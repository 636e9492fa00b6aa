"""torchvision's models with attention, for ``coverage.py``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from coverage import Case

NOT_SOFTMAX: dict[str, str] = {}
TOGETHER = True
_NAMES = {
    "vit": ["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"],
    "swin": ["swin_t", "swin_s", "swin_b"],
    "swin_v2": ["swin_v2_t", "swin_v2_s", "swin_v2_b"],
    "maxvit": ["maxvit_t"],
}


def families() -> list[str]:
    """What has attention."""
    return list(_NAMES)


def cases(family: str) -> Iterator[Case]:
    """One structure each."""
    yield Case(_NAMES[family], lambda: build(family))


def build(family: str) -> tuple[nn.Module, Tensor]:
    """A tiny model, with images that its windows do not divide."""
    if family == "vit":
        made: nn.Module = models.VisionTransformer(28, 7, 2, 3, 24, 40, num_classes=7)
        return made, torch.randn(3, 3, 28, 28)
    if family == "maxvit":
        return models.MaxVit((64, 64), 8, 2, [16, 16], [1, 1], 8, 0.0), torch.randn(3, 3, 64, 64)
    later = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if family == "swin_v2" else {}
    made = models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [3, 3], num_classes=7, **later)
    return made, torch.randn(3, 3, 40, 44)
