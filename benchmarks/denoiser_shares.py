"""What share of well-known denoisers' parameters lies in layers that can be made smaller; from their shapes alone.

Layers are recognised by their structure on the meta device, and count as far as small models of the same classes prove
them (tests/test_denoisers.py): where queries and keys are normalized, values and outputs alone.

    python benchmarks/denoiser_shares.py --json benchmarks/results/denoiser_shares.json
"""

from __future__ import annotations

from typing import Any

import diffusers

import common
from comcat.hosts import find_layers
from comcat.layers.attention import AttentionLayer
from comcat.models.unfilled import building

_DOWN, _UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Stable Diffusion 1.x": ("UNet2DConditionModel", {"cross_attention_dim": 768, "sample_size": 64}),
    "Stable Diffusion XL": (
        "UNet2DConditionModel",
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": (_DOWN[1], _DOWN[0], _DOWN[0]),
            "up_block_types": (_UP[0], _UP[0], _UP[1]),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "PixArt-Sigma": (
        "PixArtTransformer2DModel",
        {"sample_size": 128, "caption_channels": 4096, "use_additional_conditions": False},
    ),
    "Stable Diffusion 3": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "joint_attention_dim": 4096,
            "pos_embed_max_size": 192,
        },
    ),
    "FLUX.1": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "Sana 1.6B": ("SanaTransformer2DModel", {}),
    "Lumina 2": ("Lumina2Transformer2DModel", {}),
    "Wan 2.1 14B": ("WanTransformer3DModel", {}),
}
_PRODUCTS = ("to_q", "to_k", "add_q_proj", "add_k_proj")
#: Classes of what is recognised as an FFN that are proven to be one, or a pair of low-rank layers, on small models.
_PROVEN = (
    "FeedForward",
    "LuminaFeedForward",
    "TimestepEmbedding",
    "PixArtAlphaTextProjection",
    "Transformer2DModel",
)


def shares(cls: str, sizes: dict[str, Any]) -> dict[str, int]:
    """Parameters in all, of attention and of FFNs that can be reduced."""
    with building(meta=True):
        model = getattr(diffusers, cls)(**sizes)
    found = {"all": sum(p.numel() for p in model.parameters()), "attention": 0, "ffn": 0}
    for layer in find_layers(model).layers:
        attention = isinstance(layer, AttentionLayer)
        if not attention and type(layer.module).__name__ not in _PROVEN:
            continue
        normalized = attention and getattr(layer.module, "norm_q", None) is not None
        for path, linear in layer.linears.items():
            if not (normalized and path in _PRODUCTS):
                found["attention" if attention else "ffn"] += sum(p.numel() for p in linear.parameters())
    return found


def main() -> None:
    args = common.parser(__doc__).parse_args()
    rows = {name: shares(*made) for name, made in MODELS.items()}
    print(f"{'':<22} {'parameters':>12} {'attention':>10} {'FFN':>6} {'together':>9}")
    for name, row in rows.items():
        part = [100 * row[key] / row["all"] for key in ("attention", "ffn")]
        print(f"{name:<22} {row['all'] / 1e6:>10,.0f} M {part[0]:>8.1f} % {part[1]:>4.1f} % {sum(part):>7.1f} %")
    common.write(args.json, {"models": rows})


if __name__ == "__main__":
    main()
