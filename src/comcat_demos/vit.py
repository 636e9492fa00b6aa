"""The embedded demo: a small vision transformer that learns the handwritten digits shipped with scikit-learn.

1 797 scans of 8 x 8 pixels, enlarged to 16 x 16; three quarters train, one quarter tests. Training is offline
and takes half a minute on two cores.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from comcat.errors import ComcatError
from comcat.progress import Progress

ARCHITECTURE = "vit_tiny_patch16_224"
#: 17 tokens, 6 blocks of width 96 with 3 heads of 32: 0.68 M parameters.
MODEL_ARGS: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
    "num_classes": 10,
}
SIZE = 16
EPOCHS, RATE = 20, 6e-3


def write_digits(folder: Path, seed: int = 0) -> None:
    """Write the digits as PNG files: ``folder/{train,test}/{0..9}/*.png``, split by class at random.

    Raises:
        ComcatError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as e:
        raise ComcatError("the demo needs another package. Install it: pip install scikit-learn") from e
    from PIL import Image

    digits = load_digits()
    train, _ = train_test_split(
        np.arange(len(digits.target)), test_size=0.25, random_state=seed, stratify=digits.target
    )
    is_train = np.isin(np.arange(len(digits.target)), train)
    for split in ("train", "test"):
        for digit in range(10):
            (folder / split / str(digit)).mkdir(parents=True)
    for i, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        image = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        image.save(folder / ("train" if is_train[i] else "test") / str(digit) / f"{i:04d}.png")


def build(seed: int = 0) -> nn.Module:
    """The untrained model, with the same weights for the same seed."""
    from comcat.models.opening import load_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return load_model(ARCHITECTURE, model_args=MODEL_ARGS, pretrained=False)


def train(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    epochs: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Train in place: one-cycle learning rate, label smoothing, small random shifts and turns.

    Muon for the block matrices and AdamW for the rest: on data this small it needs a quarter of the epochs.

    Args:
        images: (N, C, H, W), normalized; labels: (N,).
        progress: called as ``progress("train", epochs done, epochs)``.
    """
    epochs = epochs or EPOCHS
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=RATE, weight_decay=0.05),
        torch.optim.Muon(matrices, lr=RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    ]
    steps = math.ceil(len(images) / batch_size) * epochs
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, RATE, steps, pct_start=0.15, cycle_momentum=False) for o in optimizers
    ]
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for epoch in range(epochs):
            for batch in torch.randperm(len(images)).split(batch_size):
                logits = model(_jitter(images[batch]))
                loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.1)
                model.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                for schedule in schedules:
                    schedule.step()
            if progress:
                progress("train", epoch + 1, epochs)
    model.eval()


def _jitter(images: torch.Tensor) -> torch.Tensor:
    """Turn by up to 0.2 rad, scale by up to 10 %, shift by up to 1.6 pixels, each image differently."""
    n = len(images)
    angle = (torch.rand(n) * 2 - 1) * 0.2
    scale = 1 + (torch.rand(n) * 2 - 1) * 0.1
    cos, sin = angle.cos() * scale, angle.sin() * scale
    shift = (torch.rand(n, 2) * 2 - 1) * 0.2
    matrix = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(n, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
