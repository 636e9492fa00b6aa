"""Small random video and audio denoisers of diffusers, one entry for each class: configuration and inputs."""

from __future__ import annotations

from typing import Any

import torch

from small_denoisers_image import UNET, B, Inputs, grid, mask, steps, t, x

WAN = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
       "out_channels": 4, "text_dim": 13, "freq_dim": 8, "ffn_dim": 16, "num_layers": 1, "cross_attn_norm": True,
       "rope_max_seq_len": 16}  # fmt: skip
HUNYUAN = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 3, "attention_head_dim": 10, "num_layers": 1,
           "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 13, "rope_axes_dim": (2, 4, 4),
           "num_refiner_layers": 1}  # fmt: skip
COG = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 2,
       "text_embed_dim": 13, "num_layers": 1, "sample_width": 4, "sample_height": 4, "sample_frames": 1,
       "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 5}  # fmt: skip
LTX2 = {"in_channels": 4, "out_channels": 4, "patch_size": 1, "patch_size_t": 1, "num_attention_heads": 2,
        "attention_head_dim": 8, "cross_attention_dim": 16, "audio_in_channels": 4, "audio_out_channels": 4,
        "audio_num_attention_heads": 2, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8,
        "num_layers": 1, "caption_channels": 13, "rope_double_precision": False}  # fmt: skip


def video(text: int = 13, **more: Any) -> dict[str, Any]:
    """(batch, channels, frames, height, width) beside text."""
    return {"hidden_states": x(4, 2, 4, 4), "encoder_hidden_states": x(5, text), "timestep": steps(), **more}


def _hunyuan(**more: Any) -> dict[str, Any]:
    return {"hidden_states": x(4, 1, 2, 3), "encoder_hidden_states": x(5, 13), "timestep": t(),
            "encoder_attention_mask": mask(5), **more}  # fmt: skip


VIDEO_MODELS: dict[str, tuple[dict[str, Any], Inputs]] = {
    "WanTransformer3DModel": (WAN, video),
    "WanVACETransformer3DModel": (
        {**WAN, "in_channels": 4, "num_layers": 2, "vace_layers": [0], "vace_in_channels": 6},
        lambda: video(control_hidden_states=x(6, 2, 4, 4)),
    ),
    "SkyReelsV2Transformer3DModel": (WAN, video),
    "ChronoEditTransformer3DModel": ({**WAN, "rope_temporal_skip_len": 8}, video),
    "AnyFlowTransformer3DModel": (
        {**WAN, "gate_value": 0.25, "deltatime_type": "r"},
        lambda: video(hidden_states=x(2, 4, 4, 4), timestep=t(500).unsqueeze(1).expand(B, 2),
                      r_timestep=t(250).unsqueeze(1).expand(B, 2)),
    ),
    "AnyFlowFARTransformer3DModel": (
        {**WAN, "compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3, "gate_value": 0.25, "deltatime_type": "r"},
        lambda: video(hidden_states=x(2, 4, 4, 4), timestep=t(500).unsqueeze(1).expand(B, 2),
                      r_timestep=t(250).unsqueeze(1).expand(B, 2), chunk_partition=[1, 1]),
    ),
    "HeliosTransformer3DModel": (
        {**{k: v for k, v in WAN.items() if k != "rope_max_seq_len"}, "rope_dim": (4, 4, 4),
         "has_multi_term_memory_patch": False, "guidance_cross_attn": False, "zero_history_timestep": False,
         "is_amplify_history": False},
        lambda: video(indices_hidden_states=torch.ones(B, 2)),
    ),
    "WanAnimateTransformer3DModel": (
        {**{k: v for k, v in WAN.items() if k != "in_channels"}, "in_channels": 12, "latent_channels": 4,
         "image_dim": 8, "added_kv_proj_dim": 24, "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4,
         "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
         "inject_face_latents_blocks": 1, "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}},
        lambda: {"hidden_states": x(12, 2, 4, 4), "timestep": steps(), "encoder_hidden_states": x(512, 13),
                 "encoder_hidden_states_image": x(3, 8), "pose_hidden_states": x(4, 1, 4, 4),
                 "face_pixel_values": x(3, 5, 16, 16)},
    ),
    "HunyuanVideoTransformer3DModel": (
        {**HUNYUAN, "num_single_layers": 1, "pooled_projection_dim": 7, "guidance_embeds": True},
        lambda: _hunyuan(pooled_projections=x(7), guidance=t()),
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        {**HUNYUAN, "num_single_layers": 1, "pooled_projection_dim": 7, "guidance_embeds": True,
         "has_image_proj": True, "image_proj_dim": 11, "has_clean_x_embedder": True},
        lambda: _hunyuan(pooled_projections=x(7), guidance=t(), image_embeds=x(3, 11),
                         indices_latents=torch.zeros(1).long()),
    ),
    "HunyuanVideo15Transformer3DModel": (
        {**HUNYUAN, "text_embed_2_dim": 11, "image_embed_dim": 7, "target_size": 4, "task_type": "t2v",
         "mlp_ratio": 2.0},
        lambda: _hunyuan(encoder_hidden_states_2=x(4, 11), encoder_attention_mask_2=mask(4),
                         image_embeds=torch.zeros(B, 3, 7).double()),
    ),
    "LTXVideoTransformer3DModel": (
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
         "cross_attention_dim": 16, "num_layers": 1, "caption_channels": 13},
        lambda: {"hidden_states": x(12, 4), "encoder_hidden_states": x(5, 13), "timestep": steps(),
                 "encoder_attention_mask": mask(5), "num_frames": 2, "height": 2, "width": 3},
    ),
    "LTX2VideoTransformer3DModel": (
        LTX2,
        lambda: {"hidden_states": x(12, 4), "audio_hidden_states": x(5, 4), "encoder_hidden_states": x(5, 13),
                 "audio_encoder_hidden_states": x(5, 13), "timestep": t(700), "encoder_attention_mask": mask(5),
                 "audio_encoder_attention_mask": mask(5), "num_frames": 2, "height": 2, "width": 3,
                 "audio_num_frames": 5, "fps": 25.0},
    ),
    "CogVideoXTransformer3DModel": (
        {**COG, "use_rotary_positional_embeddings": False},
        lambda: {"hidden_states": x(1, 4, 4, 4), "encoder_hidden_states": x(5, 13), "timestep": steps()},
    ),
    "ConsisIDTransformer3DModel": (
        {**COG, "cross_attn_interval": 1, "is_kps": False, "is_train_face": False},
        lambda: {"hidden_states": x(1, 4, 4, 4), "encoder_hidden_states": x(5, 13), "timestep": steps()},
    ),
    "CosmosTransformer3DModel": (
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
         "mlp_ratio": 2, "text_embed_dim": 13, "adaln_lora_dim": 4, "max_size": (4, 8, 8), "patch_size": (1, 2, 2),
         "rope_scale": (2.0, 1.0, 1.0), "extra_pos_embed_type": "learnable"},
        lambda: {"hidden_states": x(4, 1, 4, 4), "timestep": steps(), "encoder_hidden_states": x(5, 13), "fps": 30,
                 "padding_mask": torch.zeros(1, 1, 4, 4).double()},
    ),
    "Cosmos3OmniTransformer": (
        {"head_dim": 6, "hidden_act": "relu2", "hidden_size": 12, "intermediate_size": 24, "latent_channel": 2,
         "latent_patch_size": 1, "num_attention_heads": 2, "num_hidden_layers": 1, "num_key_value_heads": 1,
         "patch_latent_dim": 2, "qk_norm_for_text": False, "rope_axes_dim": [1, 1, 1], "vocab_size": 32},
        lambda: {"input_ids": torch.tensor([1, 2]), "text_indexes": torch.tensor([0, 1]),
                 "position_ids": torch.zeros(3, 6).long(), "und_len": 2, "sequence_length": 6,
                 "vision_tokens": [x(2, 1, 2, 2, batch=1)], "vision_token_shapes": [(1, 2, 2)],
                 "vision_sequence_indexes": torch.arange(2, 6), "vision_mse_loss_indexes": torch.arange(2, 6),
                 "vision_timesteps": torch.ones(4).double(), "vision_noisy_frame_indexes": [torch.tensor([0])]},
    ),
    "AllegroTransformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 6, "in_channels": 4, "out_channels": 4, "num_layers": 1,
         "cross_attention_dim": 12, "sample_width": 4, "sample_height": 4, "sample_frames": 2,
         "caption_channels": 13},
        lambda: video(encoder_attention_mask=mask(5).double(), attention_mask=torch.ones(B, 2, 4, 4).double()),
    ),
    "EasyAnimateTransformer3DModel": (
        {"attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 4, "mmdit_layers": 1, "num_layers": 1,
         "out_channels": 4, "patch_size": 2, "sample_height": 8, "sample_width": 8, "text_embed_dim": 13,
         "time_embed_dim": 8},
        lambda: video(hidden_states=x(4, 1, 4, 4)),
    ),
    "MochiTransformer3DModel": (
        {"patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
         "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 13, "time_embed_dim": 4,
         "max_sequence_length": 5},
        lambda: video(encoder_attention_mask=mask(5)),
    ),
    "LatteTransformer3DModel": (
        {"sample_size": 4, "num_layers": 1, "patch_size": 2, "attention_head_dim": 4, "num_attention_heads": 3,
         "caption_channels": 7, "in_channels": 4, "cross_attention_dim": 12, "out_channels": 8,
         "attention_bias": True, "norm_elementwise_affine": False, "video_length": 2},
        lambda: {"hidden_states": x(4, 2, 4, 4), "encoder_hidden_states": x(5, 7), "timestep": steps()},
    ),
    "Kandinsky5Transformer3DModel": (
        {"in_visual_dim": 4, "in_text_dim": 13, "in_text_dim2": 7, "time_dim": 8, "out_visual_dim": 4,
         "patch_size": (1, 2, 2), "model_dim": 24, "ff_dim": 16, "num_text_blocks": 1, "num_visual_blocks": 1,
         "axes_dims": (4, 4, 4)},
        lambda: {"hidden_states": x(1, 4, 4, 4), "encoder_hidden_states": x(5, 13), "timestep": t(),
                 "pooled_projections": x(7), "visual_rope_pos": [torch.arange(1), torch.arange(2), torch.arange(2)],
                 "text_rope_pos": torch.arange(5)},
    ),
    "Kandinsky6Transformer3DModel": (
        {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 13, "in_text_dim2": 7, "time_dim": 8,
         "model_dim": 24, "ff_dim": 16, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 4, 4),
         "visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4},
        lambda: {"hidden_states": x(1, 4, 4, 4), "encoder_hidden_states": x(5, 13), "timestep": t(),
                 "pooled_projections": x(7)},
    ),
    "Kandinsky6SRTransformer3DModel": (
        {"in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 8, "model_dim": 24, "ff_dim": 16,
         "num_visual_blocks": 1, "axes_dims": (4, 4, 4)},
        lambda: {"hidden_states": x(1, 4, 4, 4), "timestep": t()},
    ),
    "MotifVideoTransformer3DModel": (
        {"in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
         "num_single_layers": 1, "num_decoder_layers": 0, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 13,
         "image_embed_dim": 4, "rope_axes_dim": (4, 4, 4), "enable_text_cross_attention_dual": True,
         "enable_text_cross_attention_single": True},
        lambda: video(hidden_states=x(9, 1, 2, 3), encoder_attention_mask=mask(5)),
    ),
    "MiniMaxH3Transformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 24, "num_layers": 1,
         "num_refiner_layers": 1, "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 6, "patch_size": (1, 2, 2),
         "text_dim": 8, "freq_dim": 8, "time_embed_hidden_dim": 24, "time_embed_dim": 16, "rope_freq_dim": 2},
        dict,
    ),
    "SanaVideoTransformer3DModel": (
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
         "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24,
         "caption_channels": 13, "sample_size": 4, "patch_size": (1, 2, 2), "rope_max_seq_len": 16},
        lambda: video(encoder_attention_mask=mask(5)),
    ),
    "SanaWMTransformer3DModel": (
        {"in_channels": 4, "num_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "softmax_every_n": 2,
         "linear_head_dim": 12, "chunk_plucker_channels": 4, "chunk_plucker_post_attn_blocks": 0, "image_size": 4,
         "caption_channels": 13},
        lambda: video(timestep=t(), encoder_attention_mask=mask(5)),
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (
        {**LTX2, "num_layers": 1},
        dict,
    ),
    "UNet3DConditionModel": (
        {**UNET, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "cross_attention_dim": 7,
         "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "attention_head_dim": 5},
        lambda: {"sample": x(4, 2, 4, 4), "timestep": steps(), "encoder_hidden_states": x(5, 7)},
    ),
    "I2VGenXLUNet": (
        {"sample_size": 32, "block_out_channels": (64, 64), "norm_num_groups": 8, "layers_per_block": 1,
         "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "cross_attention_dim": 8,
         "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "num_attention_heads": 32},
        lambda: {"sample": x(4, 2, 4, 4), "timestep": steps(), "fps": steps(4), "image_latents": x(4, 2, 4, 4),
                 "image_embeddings": x(8), "encoder_hidden_states": x(5, 8)},
    ),
    "UNetMotionModel": (
        {**UNET, "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "cross_attention_dim": 7,
         "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "num_attention_heads": 2,
         "motion_num_attention_heads": 2},
        lambda: {"sample": x(4, 2, 4, 4), "timestep": steps(), "encoder_hidden_states": x(5, 7, batch=2 * B)},
    ),
    "UNetSpatioTemporalConditionModel": (
        {"block_out_channels": (32, 64), "cross_attention_dim": 7, "num_attention_heads": 2, "in_channels": 4,
         "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), "layers_per_block": 1,
         "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "sample_size": 4,
         "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 12},
        lambda: {"sample": x(2, 4, 4, 4), "timestep": t(7), "encoder_hidden_states": x(1, 7),
                 "added_time_ids": x(3)},
    ),
    "TransformerTemporalModel": (
        {"num_attention_heads": 2, "attention_head_dim": 5, "in_channels": 10, "norm_num_groups": 5},
        lambda: {"hidden_states": x(10, 2, 2), "timestep": steps()},
    ),
    "AceStepTransformer1DModel": (
        {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "in_channels": 12, "audio_acoustic_hidden_dim": 4, "patch_size": 2,
         "sliding_window": 4},
        lambda: {"hidden_states": x(8, 4), "timestep": t(), "timestep_r": t(0.2), "context_latents": x(8, 8),
                 "encoder_hidden_states": x(5, 24)},
    ),
    "StableAudioDiTModel": (
        {"sample_size": 4, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4,
         "num_key_value_attention_heads": 2, "out_channels": 4, "cross_attention_dim": 16, "time_proj_dim": 8,
         "global_states_input_dim": 13, "cross_attention_input_dim": 7},
        lambda: {"hidden_states": x(4, 6), "timestep": t(), "encoder_hidden_states": x(5, 7),
                 "global_hidden_states": x(1, 13), "rotary_embedding": (x(4, batch=7), x(4, batch=7))},
    ),
    "LongCatAudioDiTTransformer": (
        {"dit_dim": 32, "dit_depth": 1, "dit_heads": 4, "dit_text_dim": 13, "latent_dim": 4, "text_conv": False},
        lambda: {"hidden_states": x(6, 4), "encoder_hidden_states": x(5, 13), "encoder_attention_mask": mask(5),
                 "attention_mask": torch.ones(B, 6, dtype=torch.bool), "timestep": t()},
    ),
    "MiniMaxMusic3Transformer1DModel": (
        {"in_channels": 4, "condition_dim": 13, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8,
         "ff_inner_dim": 32, "rotary_dim": 4, "fourier_embedding_dim": 8},
        lambda: {"hidden_states": x(4, 6), "encoder_hidden_states": x(6, 13), "timestep": t()},
    ),
    "StableAudio3DiTModel": (
        {"io_channels": 4, "embed_dim": 64, "depth": 1, "num_heads": 1, "cond_token_dim": 13, "global_cond_dim": 7,
         "local_add_cond_dim": 5, "timestep_features_dim": 8, "num_memory_tokens": 2},
        lambda: {"hidden_states": x(4, 6), "timestep": t(), "encoder_hidden_states": x(5, 13),
                 "global_hidden_states": x(7)},
    ),
    "WanAnimate2Transformer3DModel": (
        {"text_len": 5, "in_dim": 8, "dim": 24, "ffn_dim": 16, "freq_dim": 8, "text_dim": 13, "out_dim": 4,
         "num_heads": 2, "num_layers": 1},
        dict,
    ),
    "MiniMaxMusic3RVQDepthDecoder": (
        {"hidden_size": 24, "num_layers": 1, "num_attention_heads": 3, "intermediate_size": 16,
         "audio_vocab_size": 16, "num_codebooks": 4, "max_position_embeddings": 8},
        lambda: {"inputs_embeds": x(4, 24)},
    ),
    "T5FilmDecoder": (
        {"input_dims": 4, "targets_length": 6, "d_model": 24, "num_layers": 1, "num_heads": 3, "d_kv": 8,
         "d_ff": 16},
        lambda: {"encodings_and_masks": [(x(5, 24), mask(5).double())], "decoder_input_tokens": x(6, 4),
                 "decoder_noise_time": t()},
    ),
    "UNet1DModel": (
        {"in_channels": 2, "out_channels": 2, "sample_size": 16, "block_out_channels": (32, 32, 64),
         "extra_in_channels": 16},
        lambda: {"sample": x(2, 16), "timestep": steps()},
    ),
}  # fmt: skip

__all__ = ["VIDEO_MODELS", "grid"]
