"""Tiny random models of transformers: dimensions are different primes where the architecture allows."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

from conftest import randomize

TOWER = {
    "hidden_size": 15,
    "num_attention_heads": 3,
    "intermediate_size": 17,
    "num_hidden_layers": 2,
    "image_size": 14,
    "patch_size": 7,
}
TEXT = {**TOWER, "num_hidden_layers": 1, "vocab_size": 23, "max_position_embeddings": 11}
TEXT = {key: value for key, value in TEXT.items() if key not in ("image_size", "patch_size")}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 10, "depths": [2, 1], "num_heads": [2, 5], "window_size": 2}
RESNET = {"embedding_size": 4, "hidden_sizes": [4, 4, 7, 7], "depths": [1, 1, 1, 1], "out_features": ["stage4"]}
DETR = {
    "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 11, "decoder_ffn_dim": 13, "num_queries": 5, "use_timm_backbone": False,
}  # fmt: skip

HOSTS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**TOWER, num_labels=11)),
    "vit features": lambda: tf.ViTModel(tf.ViTConfig(**TOWER)),
    "vit without pooler": lambda: tf.ViTModel(tf.ViTConfig(**TOWER), add_pooling_layer=False),
    "dinov2": lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**{**TOWER, "mlp_ratio": 2}, num_labels=11)),
    "dinov3": lambda: tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**{**TOWER, "hidden_size": 24})),
    "clip image tower": lambda: tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**TOWER, projection_dim=13)),
    "clip": lambda: tf.CLIPModel(tf.CLIPConfig(vision_config=TOWER, text_config=TEXT, projection_dim=13)),
    "siglip": lambda: tf.SiglipModel(tf.SiglipConfig(vision_config=TOWER, text_config=TEXT)),
    "swin": lambda: tf.SwinForImageClassification(tf.SwinConfig(**SWIN, num_labels=11)),
    "convnext": lambda: tf.ConvNextForImageClassification(
        tf.ConvNextConfig(hidden_sizes=[3, 5, 7, 11], depths=[1, 1, 1, 1], num_labels=11, image_size=32)
    ),
    "detr": lambda: tf.DetrForObjectDetection(tf.DetrConfig(backbone_config=tf.ResNetConfig(**RESNET), **DETR)),
    "mae": lambda: tf.ViTMAEForPreTraining(
        tf.ViTMAEConfig(
            **TOWER,
            decoder_hidden_size=12,
            decoder_num_attention_heads=2,
            decoder_num_hidden_layers=1,
            decoder_intermediate_size=7,
        )
    ),
}


def make(name: str = "vit", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A randomized model in evaluation mode."""
    return randomize(HOSTS[name](), seed).to(dtype).eval()
