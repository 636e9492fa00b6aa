"""What the benchmark scripts share: the CIFAR-10 teacher and its data, fast accuracy, tables and JSON."""

from __future__ import annotations

import argparse
import functools
import io
import json
import platform
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.layers import LayerNorm
from timm.models.eva import Eva
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

import comcat

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark takes."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", type=Path, help="also write the figures to this file")
    return p


def teacher(shared: Path, name: str = "vit_cifar10") -> nn.Module:
    """A ViT trained on CIFAR-10 (see the README beside the checkpoints), in float32."""
    made, weights = json.loads((shared / f"teachers/{name}.json").read_text()), shared / f"teachers/{name}.safetensors"
    if "timm" in made:
        return comcat.load_model(made["timm"]["name"], weights, made["timm"]["args"]).eval()
    model = Eva(**made["args"], norm_layer=functools.partial(LayerNorm, eps=1e-5))
    model.load_state_dict(load_file(weights))
    return model.eval()


def cifar10(shared: Path, split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Normalized images (n, 3, 32, 32) and labels (n,) of a parquet split, in file order."""
    table = pq.read_table(shared / f"data/cifar10/{split}.parquet")
    table = table if limit is None else table.slice(0, limit)
    images = [pil_to_tensor(Image.open(io.BytesIO(cell["bytes"]))) for cell in table["img"].to_pylist()]
    pixels = torch.stack(images).float() / 255
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    return (pixels - mean) / std, torch.tensor(table["label"].to_pylist())


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, amp: bool = False, batch_size: int = 50) -> float:
    """Top-1 in percent, in float32 or under bfloat16 autocast."""
    model.eval()
    hits = 0
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            hits += int((model(x).argmax(-1) == y).sum())
    return 100 * hits / len(labels)


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    t = torch.tensor(values)
    return f"{t.mean():.2f}" + (f" ±{t.std():.2f}" if len(values) > 1 else "")


def write(path: Path | None, results: dict[str, Any]) -> None:
    """Write the figures and what they were measured with."""
    if path is None:
        return
    versions = {"torch": torch.__version__, "comcat": comcat.__version__, "python": platform.python_version()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"versions": versions, "threads": torch.get_num_threads(), **results}, indent=1) + "\n")
