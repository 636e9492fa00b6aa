"""How far exported files are from PyTorch in float32, dense and with half the parameters, in every format here.

    python benchmarks/export_parity.py --shared SHARED [--json results/export_parity.json] [--models vit] [--to onnx]

The CIFAR-10 teachers are compared on test images, all others have random weights and are compared on random ones:
timm's DeiT-S and Swin-T as they are; models of the other libraries in small, since a file takes as long to write as
it has operators, and layers are alike: a width of 192, two layers, images of 112 pixels, or two stages of two layers.

Every file takes any batch where its format does. In float32, files of models that resize their position embeddings are
written for images of any size besides, and compared on another size than they were traced with. Results are added to
those that the JSON file holds, so that formats in an environment of their own come to the same table; a cell that is
there is measured again with ``--again``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import comcat
from comcat.exporting.formats import FORMAT_NAMES, file_format
from common import cifar10, parser, teacher, write

#: Those that resize their position embeddings.
ANY_SIZE = ("timm ViT of any size", "transformers ViT", "transformers DINOv2", "transformers SigLIP tower")


def models(shared: Path) -> dict[str, Callable[[], nn.Module]]:
    return {
        "vit_cifar10": lambda: teacher(shared),
        "rope_cifar10": lambda: teacher(shared, "rope_cifar10"),
        "deit_small_patch16_224": lambda: timm.create_model("deit_small_patch16_224"),
        "swin_tiny_patch4_window7_224": lambda: timm.create_model("swin_tiny_patch4_window7_224"),
        "timm ViT of any size": lambda: timm.create_model("vit_tiny_patch16_224", depth=2, dynamic_img_size=True),
        "transformers ViT": lambda: _transformers("ViTForImageClassification"),
        "transformers DINOv2": lambda: _transformers("Dinov2ForImageClassification"),
        "transformers SigLIP tower": lambda: _transformers("SiglipVisionModel"),
        "transformers Swin": _transformers_swin,
        "torchvision ViT": _torchvision_vit,
        "torchvision Swin": _torchvision_swin,
        "open_clip image tower": _open_clip,
    }


def _transformers(name: str) -> nn.Module:
    import transformers

    cls: Any = getattr(transformers, name)
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 2}
    mlp = {"mlp_ratio": 4} if "Dinov2" in name else {"intermediate_size": 768}
    made: nn.Module = cls(cls.config_class(**sizes, **mlp, image_size=112, patch_size=16))
    return made


def _transformers_swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"embed_dim": 48, "depths": [2, 2], "num_heads": [2, 4]}
    return SwinForImageClassification(SwinConfig(**sizes, image_size=112, patch_size=4, window_size=7))


def _torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    made: nn.Module = VisionTransformer(112, 16, 2, 3, 192, 768)
    nn.init.normal_(made.heads.head.weight, std=0.02)  # zeros, so that all images have the same outputs
    return made


def _torchvision_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    made: nn.Module = SwinTransformer([4, 4], 48, [2, 2], [2, 4], [7, 7])
    return made


def _open_clip() -> nn.Module:
    import open_clip

    tower = {"image_size": 112, "patch_size": 16, "layers": 2, "width": 192, "head_width": 64}
    text = {"layers": 1, "width": 64, "heads": 1, "vocab_size": 100, "context_length": 8}
    made: nn.Module = open_clip.CLIP(embed_dim=192, vision_cfg=tower, text_cfg=text).visual
    return made


def installed() -> list[str]:
    """Formats whose packages are here."""
    return [name for name in FORMAT_NAMES if all(find_spec(one) for one in file_format(name).packages)]


def measured(model: nn.Module, to: str, precision: str, images: torch.Tensor | None, any_size: bool) -> dict[str, Any]:
    """The figures of a file, or why there is none."""
    target = file_format(to)
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = comcat.export(
                model,
                Path(folder) / f"file{target.suffix}",
                to,
                precision,
                dynamic_batch=target.dynamic_batch,
                dynamic_size=any_size,
                tolerance=1.0,
                images=images,
            )
        except comcat.ComcatError as error:
            return {"refused": str(error)}
    return {
        "bytes": report.bytes,
        "absolute": report.absolute,
        "relative": report.relative,
        "inputs": report.inputs,
        "images": report.images,
        "batches": report.batches,
        "real": report.real,
        "notes": report.notes,
    }


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--shared", type=Path, required=True, help="folder with teachers/ and data/cifar10/")
    p.add_argument("--models", nargs="*", help="beginnings of names; all by default")
    p.add_argument("--kinds", nargs="*", default=("dense", "compressed"))
    p.add_argument("--to", nargs="*", default=installed(), choices=FORMAT_NAMES)
    p.add_argument("--precisions", nargs="*", default=("fp32", "fp16", "bf16"))
    p.add_argument("--again", action="store_true", help="measure cells that the JSON file holds already")
    args = p.parse_args()
    known = json.loads(args.json.read_text())["results"] if args.json and args.json.is_file() else {}
    test, _ = cifar10(args.shared, "test", 64)
    for name, build in models(args.shared).items():
        if args.models and not name.startswith(tuple(args.models)):
            continue
        torch.manual_seed(0)
        dense = build().eval()
        small = comcat.compress(dense, comcat.plan(dense, comcat.Budget(params=0.5))).eval()
        for kind, model in (("dense", dense), ("compressed", small)):
            if kind not in args.kinds:
                continue
            for to in args.to:
                target = file_format(to)
                cells = known.setdefault(name, {}).setdefault(kind, {}).setdefault(to, {})
                wanted = [one for one in target.precisions if one in args.precisions]
                wanted += ["any size"] if "fp32" in wanted and target.dynamic_size and name in ANY_SIZE else []
                for cell in wanted if args.again else [one for one in wanted if one not in cells]:
                    precision, images = cell, test if "cifar" in name else None
                    if cell == "any size":
                        precision = "fp32"
                    cells[cell] = measured(model, to, precision, images, cell == "any size")
                    said = cells[cell].get("refused") or cells[cell]["relative"]
                    print(f"{name:30} {kind:10} {to:10} {cell:8}  {said}", flush=True)
                    write(args.json, {"results": known})


if __name__ == "__main__":
    main()
