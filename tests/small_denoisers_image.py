"""Small random image denoisers of diffusers, one entry for each class: configuration and inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

B = 2
Inputs = Callable[[], dict[str, Any]]


def x(*shape: int, batch: int = B) -> Tensor:
    """Noise (batch, *shape), the same at every call."""
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def t(value: float = 0.7) -> Tensor:
    return torch.full((B,), value, dtype=torch.float64)


def steps(value: int = 7) -> Tensor:
    return torch.full((B,), value)


def mask(tokens: int, kept: int = 3) -> Tensor:
    """Of the first text some tokens are padding."""
    found = torch.ones(B, tokens, dtype=torch.bool)
    found[0, kept:] = False
    return found


def grid(*sizes: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(size) for size in sizes]).double()


def batched(places: Tensor) -> Tensor:
    return places.unsqueeze(0).expand(B, -1, -1)


def flux_inputs(channels: int = 4, text: int = 13, pooled: int | None = None, **more: Any) -> dict[str, Any]:
    found = {"hidden_states": x(6, channels), "encoder_hidden_states": x(5, text), "timestep": t()}
    found |= {"img_ids": grid(1, 2, 3), "txt_ids": torch.zeros(5, 3, dtype=torch.float64)}
    return found | ({} if pooled is None else {"pooled_projections": x(pooled)}) | more


FLUX = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 10,
        "num_attention_heads": 3, "joint_attention_dim": 13}  # fmt: skip
ROPE = (2, 4, 4)
UNET = {"sample_size": 4, "block_out_channels": (10, 20), "norm_num_groups": 5, "layers_per_block": 1}
SPATIAL = {"sample_size": 4, "patch_size": 2, "in_channels": 4, "num_attention_heads": 3, "attention_head_dim": 4,
           "num_layers": 1}  # fmt: skip
SIZES = {"original_size": torch.tensor([[32, 32]] * B), "target_size": torch.tensor([[32, 32]] * B),
         "crop_coords": torch.tensor([[0, 0]] * B)}  # fmt: skip

IMAGE_MODELS: dict[str, tuple[dict[str, Any], Inputs]] = {
    "FluxTransformer2DModel": (
        {**FLUX, "pooled_projection_dim": 11, "axes_dims_rope": ROPE},
        lambda: flux_inputs(pooled=11),
    ),
    "ChromaTransformer2DModel": (
        {**FLUX, "axes_dims_rope": ROPE, "approximator_num_channels": 8, "approximator_hidden_dim": 16,
         "approximator_layers": 1},
        lambda: flux_inputs(attention_mask=torch.cat([mask(5), torch.ones(B, 6, dtype=torch.bool)], 1)),
    ),
    "BriaTransformer2DModel": ({**FLUX, "axes_dims_rope": ROPE, "pooled_projection_dim": None}, flux_inputs),
    "BriaFiboTransformer2DModel": (
        {**FLUX, "joint_attention_dim": 14, "axes_dims_rope": ROPE, "pooled_projection_dim": None,
         "text_encoder_dim": 7},
        lambda: flux_inputs(text=14, text_encoder_layers=[x(5, 7), x(5, 7)]),
    ),
    "OvisImageTransformer2DModel": ({**FLUX, "out_channels": 4, "axes_dims_rope": ROPE}, flux_inputs),
    "LongCatImageTransformer2DModel": (
        {**FLUX, "axes_dims_rope": ROPE, "pooled_projection_dim": 11}, lambda: flux_inputs(guidance=t()),
    ),
    "Flux2Transformer2DModel": (
        {**FLUX, "axes_dims_rope": (2, 2, 2, 4), "timestep_guidance_channels": 8},
        lambda: flux_inputs(img_ids=batched(grid(1, 2, 3, 1)), txt_ids=batched(grid(1, 1, 1, 5)), guidance=t()),
    ),
    "Flux3Transformer2DModel": (
        {"in_channels": 4, "cond_in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
         "num_attention_heads": 3, "joint_attention_dim": 13, "timestep_channels": 8, "axes_dims_rope": (2, 2, 2, 2)},
        lambda: flux_inputs(img_ids=grid(1, 2, 3, 1), txt_ids=grid(1, 1, 1, 5)),
    ),
    "QwenImageTransformer2DModel": (
        {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 1, "attention_head_dim": 10,
         "num_attention_heads": 3, "joint_attention_dim": 13, "axes_dims_rope": ROPE},
        lambda: {"hidden_states": x(6, 16), "encoder_hidden_states": x(5, 13), "timestep": t(),
                 "encoder_hidden_states_mask": mask(5), "img_shapes": [(1, 2, 3)] * B},
    ),
    "QwenImage21Transformer2DModel": (
        {"in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 10, "num_attention_heads": 3,
         "context_in_dim": 13, "axes_dims_rope": ROPE},
        lambda: {"hidden_states": x(8, 4), "encoder_hidden_states": x(5, 13), "timestep": t(),
                 "img_shapes": [[(1, 2, 4)]] * B, "img_mask": torch.tensor([[False] * 5 + [True] * 2] * B),
                 "encoder_hidden_states_mask": torch.ones(B, 5, dtype=torch.bool)},
    ),
    "NucleusMoEImageTransformer2DModel": (
        {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 1, "attention_head_dim": 10,
         "num_attention_heads": 3, "joint_attention_dim": 13, "axes_dims_rope": ROPE, "moe_enabled": False,
         "capacity_factors": [8.0]},
        lambda: {"hidden_states": x(6, 16), "encoder_hidden_states": x(5, 13), "timestep": t(),
                 "encoder_hidden_states_mask": mask(5), "img_shapes": [(1, 2, 3)] * B},
    ),
    "ZImageTransformer2DModel": (
        {"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 30, "n_layers": 1,
         "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 13, "axes_dims": [2, 4, 4],
         "axes_lens": [64, 16, 16]},
        lambda: {"x": list(x(4, 1, 4, 4)), "cap_feats": list(x(5, 13)), "t": t()},
    ),
    "Lumina2Transformer2DModel": (
        {"sample_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 1,
         "num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2,
         "axes_dim_rope": (4, 2, 2), "axes_lens": (16, 16, 16), "cap_feat_dim": 13},
        lambda: {"hidden_states": x(4, 4, 4), "encoder_hidden_states": x(5, 13), "timestep": t(),
                 "encoder_attention_mask": mask(5)},
    ),
    "LuminaNextDiT2DModel": (
        {"sample_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 1,
         "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 16, "cross_attention_dim": 13,
         "learn_sigma": False},
        lambda: {"hidden_states": x(4, 4, 4), "encoder_hidden_states": x(5, 13), "timestep": t(),
                 "encoder_mask": mask(5), "image_rotary_emb": x(16, 4, batch=16), "cross_attention_kwargs": {}},
    ),
    "SanaTransformer2DModel": (
        {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 5,
         "num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 5,
         "cross_attention_dim": 10, "caption_channels": 13, "sample_size": 4},
        lambda: {"hidden_states": x(4, 4, 4), "encoder_hidden_states": x(5, 13), "timestep": steps(),
                 "encoder_attention_mask": mask(5)},
    ),
    "SD3Transformer2DModel": (
        {**SPATIAL, "num_layers": 2, "joint_attention_dim": 13, "caption_projection_dim": 12, "out_channels": 4,
         "pooled_projection_dim": 11, "pos_embed_max_size": 4, "qk_norm": "rms_norm", "dual_attention_layers": (0,)},
        lambda: {"hidden_states": x(4, 4, 4), "encoder_hidden_states": x(5, 13), "timestep": t(),
                 "pooled_projections": x(11)},
    ),
    "AuraFlowTransformer2DModel": (
        {"sample_size": 4, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
         "attention_head_dim": 5, "num_attention_heads": 3, "joint_attention_dim": 13, "caption_projection_dim": 15,
         "out_channels": 4, "pos_embed_max_size": 16},
        lambda: {"hidden_states": x(4, 4, 4), "encoder_hidden_states": x(5, 13), "timestep": t()},
    ),
    "HunyuanImageTransformer2DModel": (
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 3, "attention_head_dim": 10, "num_layers": 1,
         "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 13, "rope_axes_dim": (4, 6)},
        lambda: {"hidden_states": x(4, 2, 3), "encoder_hidden_states": x(5, 13), "timestep": t(),
                 "encoder_attention_mask": mask(5)},
    ),
    "HunyuanDiT2DModel": (
        {**SPATIAL, "num_attention_heads": 2, "attention_head_dim": 8, "hidden_size": 16, "cross_attention_dim": 16,
         "cross_attention_dim_t5": 16, "pooled_projection_dim": 4, "text_len": 5, "text_len_t5": 4,
         "activation_fn": "gelu-approximate"},
        lambda: {"hidden_states": x(4, 4, 4), "timestep": t(7), "encoder_hidden_states": x(5, 16),
                 "text_embedding_mask": mask(5).double(), "encoder_hidden_states_t5": x(4, 16),
                 "text_embedding_mask_t5": mask(4).double(), "image_meta_size": x(6), "style": torch.zeros(B).long(),
                 "image_rotary_emb": [grid(2, 2).new_ones(4, 8), grid(2, 2).new_zeros(4, 8)]},
    ),
    "HiDreamImageTransformer2DModel": (
        {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
         "attention_head_dim": 8, "num_attention_heads": 3, "caption_channels": [13, 11], "text_emb_dim": 7,
         "num_routed_experts": 2, "num_activated_experts": 2, "axes_dims_rope": (4, 2, 2), "max_resolution": (4, 4),
         "llama_layers": (0, 1), "force_inference_output": True},
        lambda: {"hidden_states": x(4, 4, 4), "encoder_hidden_states_t5": x(5, 13),
                 "encoder_hidden_states_llama3": x(B, 5, 11), "pooled_embeds": x(7), "timesteps": steps()},
    ),
    "CogView3PlusTransformer2DModel": (
        {"patch_size": 2, "in_channels": 4, "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 3,
         "out_channels": 4, "text_embed_dim": 13, "time_embed_dim": 8, "condition_dim": 2, "pos_embed_max_size": 4,
         "sample_size": 4},
        lambda: {"hidden_states": x(4, 4, 4), "encoder_hidden_states": x(5, 13), "timestep": steps(), **SIZES},
    ),
    "CogView4Transformer2DModel": (
        {"patch_size": 2, "in_channels": 4, "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 3,
         "out_channels": 4, "text_embed_dim": 13, "time_embed_dim": 8, "condition_dim": 4},
        lambda: {"hidden_states": x(4, 4, 4), "encoder_hidden_states": x(5, 13), "timestep": steps(), **SIZES},
    ),
    "GlmImageTransformer2DModel": (
        {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 8,
         "num_attention_heads": 3, "text_embed_dim": 13, "time_embed_dim": 16, "condition_dim": 8,
         "prior_vq_quantizer_codebook_size": 16},
        lambda: {"hidden_states": x(4, 4, 4), "encoder_hidden_states": x(5, 13), "timestep": steps(),
                 "prior_token_id": steps().unsqueeze(1).expand(B, 4),
                 "prior_token_drop": torch.zeros(B, dtype=torch.bool),
                 "target_size": torch.full((B, 2), 4.0).double(), "crop_coords": torch.zeros(B, 2).double()},
    ),
    "ErnieImageTransformer2DModel": (
        {"hidden_size": 30, "num_attention_heads": 3, "num_layers": 1, "ffn_hidden_size": 16, "in_channels": 4,
         "out_channels": 4, "patch_size": 1, "text_in_dim": 13, "rope_axes_dim": (2, 4, 4)},
        lambda: {"hidden_states": x(4, 2, 3), "timestep": t(), "text_bth": x(5, 13),
                 "text_lens": torch.tensor([3, 5])},
    ),
    "Ideogram4Transformer2DModel": (
        {"in_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 3,
         "intermediate_size": 16, "adaln_dim": 8, "llm_features_dim": 13, "mrope_section": (2, 1, 1)},
        lambda: {"hidden_states": x(9, 4), "encoder_hidden_states": x(9, 13), "timestep": t(),
                 "position_ids": torch.cat([grid(3, 1, 1), grid(1, 2, 3)]).long().unsqueeze(0).expand(B, -1, -1),
                 "segment_ids": torch.ones(B, 9).long(),
                 "indicator": torch.cat([torch.full((B, 3), 3), torch.full((B, 6), 2)], 1)},
    ),
    "Krea2Transformer2DModel": (
        {"in_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 16, "timestep_embed_dim": 8, "text_hidden_dim": 14,
         "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 1,
         "text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
         "axes_dims_rope": (4, 2, 2)},
        lambda: {"hidden_states": x(6, 4), "encoder_hidden_states": x(5, 2, 14), "timestep": t(),
                 "position_ids": torch.cat([torch.zeros(5, 3).double(), grid(1, 2, 3)])},
    ),
    "JoyImageEditTransformer3DModel": (
        {"patch_size": [1, 2, 2], "in_channels": 4, "hidden_size": 30, "num_attention_heads": 3, "text_dim": 13,
         "num_layers": 1, "rope_dim_list": [2, 4, 4]},
        lambda: {"hidden_states": x(4, 1, 4, 4), "encoder_hidden_states": x(5, 13), "timestep": t()},
    ),
    "JoyImageEditPlusTransformer3DModel": (
        {"patch_size": [1, 2, 2], "in_channels": 4, "hidden_size": 30, "num_attention_heads": 3, "text_dim": 13,
         "num_layers": 1, "rope_dim_list": [2, 4, 4]},
        lambda: {"hidden_states": x(2, 4, 1, 2, 2), "encoder_hidden_states": x(5, 13), "timestep": t(),
                 "shape_list": [[(1, 1, 1), (1, 1, 1)]] * B},
    ),
    "OmniGenTransformer2DModel": (
        {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 32,
         "num_layers": 1, "pad_token_id": 0, "vocab_size": 100, "in_channels": 4, "time_step_dim": 4,
         "rope_scaling": {"long_factor": [1] * 4, "short_factor": [1] * 4}},
        lambda: {"hidden_states": x(4, 4, 4), "timestep": t(), "input_ids": torch.arange(5).expand(B, -1),
                 "input_img_latents": [], "input_image_sizes": {},
                 "attention_mask": torch.ones(B, 10, 10), "position_ids": torch.arange(10).expand(B, -1)},
    ),
    "PRXTransformer2DModel": (
        {"in_channels": 4, "patch_size": 2, "context_in_dim": 13, "hidden_size": 24, "num_heads": 3, "depth": 1,
         "axes_dim": [4, 4]},
        lambda: {"hidden_states": x(4, 4, 4), "encoder_hidden_states": x(5, 13), "timestep": t(),
                 "attention_mask": mask(5)},
    ),
    "BriaFibo2Transformer2DModel": (
        {"in_channels": 4, "dim": 30, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 3, "cap_feat_dim": 13,
         "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 2, "max_num_gist_tokens": 4,
         "gist_step": 1, "gist_min_text_len": 2, "gist_max_text_len": 8, "axes_dims": (2, 4, 4),
         "axes_lens": (64, 16, 16)},
        lambda: {"hidden_states": x(4, 4, 4), "encoder_hidden_states": x(2, 5, 13), "timestep": t()},
    ),
    "PixArtTransformer2DModel": (
        {**SPATIAL, "out_channels": 8, "cross_attention_dim": 12, "caption_channels": 7, "norm_num_groups": 1,
         "use_additional_conditions": False},
        lambda: {"hidden_states": x(4, 4, 4), "encoder_hidden_states": x(5, 7), "timestep": steps(),
                 "encoder_attention_mask": mask(5).double(),
                 "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "DiTTransformer2DModel": (
        {**SPATIAL, "out_channels": 8, "num_embeds_ada_norm": 8, "norm_num_groups": 1},
        lambda: {"hidden_states": x(4, 4, 4), "timestep": steps(), "class_labels": steps(3)},
    ),
    "Transformer2DModel": (
        {"num_attention_heads": 3, "attention_head_dim": 5, "in_channels": 10, "norm_num_groups": 5,
         "cross_attention_dim": 7},
        lambda: {"hidden_states": x(10, 4, 4), "encoder_hidden_states": x(5, 7)},
    ),
    "DreamLiteTransformer2DModel": (
        {"num_attention_heads": 3, "attention_head_dim": 5, "in_channels": 10, "norm_num_groups": 5,
         "cross_attention_dim": 7, "num_kv_heads": 1},
        lambda: {"hidden_states": x(10, 4, 4), "encoder_hidden_states": x(5, 7)},
    ),
    "DreamLiteUNetModel": (
        {"sample_size": 4, "block_out_channels": (10, 20), "norm_num_groups": 5, "layers_per_block": 1,
         "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 7,
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2},
        lambda: {"sample": x(4, 4, 4), "timestep": steps(), "encoder_hidden_states": x(5, 7)},
    ),
    "DualTransformer2DModel": (
        {"num_attention_heads": 3, "attention_head_dim": 5, "in_channels": 10, "norm_num_groups": 5,
         "cross_attention_dim": 7},
        lambda: {"hidden_states": x(10, 4, 4), "encoder_hidden_states": x(77 + 257, 7)},
    ),
    "PriorTransformer": (
        {"num_attention_heads": 3, "attention_head_dim": 4, "num_layers": 1, "embedding_dim": 7, "num_embeddings": 5,
         "additional_embeddings": 4},
        lambda: {"hidden_states": x(7), "timestep": 2, "proj_embedding": x(7), "encoder_hidden_states": x(5, 7)},
    ),
    "UNet2DConditionModel": (
        {**UNET, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 7,
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2},
        lambda: {"sample": x(4, 4, 4), "timestep": steps(), "encoder_hidden_states": x(5, 7),
                 "encoder_attention_mask": mask(5)},
    ),
    "UNet2DModel": (
        {**UNET, "in_channels": 3, "out_channels": 3, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 5},
        lambda: {"sample": x(3, 4, 4), "timestep": steps()},
    ),
    "UNetControlNetXSModel": (
        {"sample_size": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (4, 8),
         "cross_attention_dim": 7, "num_attention_heads": 2, "norm_num_groups": 4, "ctrl_block_out_channels": [2, 4],
         "ctrl_num_attention_heads": 2, "ctrl_max_norm_num_groups": 2,
         "ctrl_conditioning_embedding_out_channels": (2, 2)},
        lambda: {"sample": x(4, 4, 4), "timestep": steps(), "encoder_hidden_states": x(5, 7),
                 "controlnet_cond": x(3, 8, 8)},
    ),
    "Kandinsky3UNet": (
        {"in_channels": 4, "time_embedding_dim": 8, "groups": 2, "attention_head_dim": 4, "layers_per_block": 1,
         "block_out_channels": (8, 8, 8, 8), "cross_attention_dim": 8, "encoder_hid_dim": 13},
        lambda: {"sample": x(4, 8, 8), "timestep": steps(), "encoder_hidden_states": x(5, 13),
                 "encoder_attention_mask": mask(5)},
    ),
    "UVit2DModel": (
        {"hidden_size": 12, "cond_embed_dim": 6, "micro_cond_encode_dim": 2, "micro_cond_embed_dim": 10,
         "encoder_hidden_size": 13, "vocab_size": 20, "codebook_size": 16, "in_channels": 12,
         "block_out_channels": 12, "num_res_blocks": 1, "num_hidden_layers": 1, "num_attention_heads": 3,
         "intermediate_size": 16, "block_num_heads": 3, "sample_size": 4},
        lambda: {"input_ids": torch.arange(16).view(4, 4).expand(B, -1, -1), "encoder_hidden_states": x(5, 13),
                 "pooled_text_emb": x(6), "micro_conds": x(5)},
    ),
    "StableCascadeUNet": (
        {"in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8, "patch_size": 1,
         "conditioning_dim": 12, "block_out_channels": (8, 12), "num_attention_heads": (0, 3),
         "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
         "down_blocks_repeat_mappers": (1, 1), "up_blocks_repeat_mappers": (1, 1),
         "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock"),
                                   ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")),
         "clip_text_in_channels": 7, "clip_text_pooled_in_channels": 7, "clip_image_in_channels": 7, "clip_seq": 2,
         "switch_level": (False,)},
        lambda: {"sample": x(4, 4, 4), "timestep_ratio": t(), "clip_text_pooled": x(1, 7), "clip_text": x(5, 7),
                 "clip_img": x(1, 7)},
    ),
}  # fmt: skip
