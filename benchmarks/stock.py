"""What one width per kind costs: stock plans, whose models need no comcat, against free ones, without training.

    python benchmarks/stock.py --shared SHARED [--json results/stock.json]

The CIFAR-10 teacher is a ViT of timm. timm's ViT has no argument for the width of its heads, so that its stock form
keeps attention dense; the same weights are also looked at as transformers' ViT, whose configuration has one. Mean and
standard deviation over calibration seeds; finished cells are kept in the JSON file.
"""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path

import torch
import transformers as tf
from torch import Tensor, nn

import comcat
from common import accuracy, cifar10, parser, spread, teacher, write

KEPT = (0.7, 0.5)

#: Row: (class of the model, method, one width per kind)
ROWS = {
    "free, spectrum": ("transformers", "spectrum", False),
    "free, uniform": ("transformers", "uniform", False),
    "stock, spectrum": ("transformers", "spectrum", True),
    "stock, uniform": ("transformers", "uniform", True),
    "stock, spectrum, FFN only (timm)": ("timm", "spectrum", True),
}
_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_OUTER = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
    "norm.weight": "vit.layernorm.weight",
    "norm.bias": "vit.layernorm.bias",
    "head.weight": "classifier.weight",
    "head.bias": "classifier.bias",
}


class Logits(nn.Module):
    """The logits alone, as the accuracy wants them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        return out if isinstance(out, Tensor) else out.logits


def as_transformers(model: nn.Module) -> nn.Module:
    """The weights of a timm ViT with a class token in transformers' ViT."""
    width, block = model.embed_dim, model.blocks[0]
    config = tf.ViTConfig(
        hidden_size=width,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size[0],
        num_labels=model.num_classes,
        layer_norm_eps=block.norm1.eps,
    )
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name in _OUTER:
            tensors[_OUTER[name]] = tensor
            continue
        _, layer, inner = name.split(".", 2)
        place, _, kind = inner.rpartition(".")
        if place == "attn.qkv":
            for role, part in zip("qkv", tensor.chunk(3), strict=True):
                tensors[f"vit.layers.{layer}.attention.{role}_proj.{kind}"] = part
        else:
            tensors[f"vit.layers.{layer}.{_NAMES[place]}.{kind}"] = tensor
    made = tf.ViTForImageClassification(config)
    made.load_state_dict(tensors)
    return made.eval()


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--shared", type=Path, required=True)
    p.add_argument("--calibration-images", type=int, default=512)
    p.add_argument("--test-images", type=int, default=2_000)
    p.add_argument("--seeds", type=int, default=3)
    args = p.parse_args()
    torch.manual_seed(0)
    own = teacher(args.shared)
    models = {"timm": comcat.prepare(own), "transformers": comcat.prepare(as_transformers(own))}
    train, _ = cifar10(args.shared, "train")
    images, labels = cifar10(args.shared, "test", args.test_images)
    done = json.loads(args.json.read_text())["cells"] if args.json and args.json.exists() else {}

    @functools.lru_cache(maxsize=2)
    def calibrated(kind: str, seed: int) -> comcat.Calibration:
        pick = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: args.calibration_images]
        return comcat.calibrate(models[kind], train[pick].split(128), fisher=True, seed=seed, held_out=0)

    def keep(key: str, figures: dict) -> None:
        done[key] = figures
        settings = {"calibration_images": args.calibration_images, "test_images": args.test_images}
        write(args.json, {**settings, "cells": done})

    for kind, ready in models.items():
        if f"dense | {kind}" not in done:
            keep(f"dense | {kind}", {"top1": accuracy(Logits(ready.model), images, labels)})
    for seed in range(args.seeds):
        for row, (kind, method, stock) in ROWS.items():
            for kept in KEPT:
                key = f"{row} | {kept} | {seed}"
                if key in done:
                    continue
                calibration, ready = calibrated(kind, seed), models[kind]
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "attention stays dense")
                    plan = comcat.plan(ready, comcat.Budget(params=kept), calibration, method, stock=stock)
                if stock:
                    made = comcat.export_stock(ready, plan, calibration)
                    small, settings = made.model, made.settings
                else:
                    small, settings = comcat.compress(ready, plan, calibration), {}
                params = sum(q.numel() for q in small.parameters())
                top1 = accuracy(Logits(small), images, labels)
                keep(key, {"top1": top1, "params": params, "settings": settings})
    print(f"dense {done['dense | timm']['top1']:.2f} (as transformers' ViT {done['dense | transformers']['top1']:.2f})")
    print(f"{'parameters kept':34}" + "".join(f"{kept:>16.0%}" for kept in KEPT))
    for row in ROWS:
        cells = [spread([done[f"{row} | {kept} | {seed}"]["top1"] for seed in range(args.seeds)]) for kept in KEPT]
        print(f"{row:34}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
