"""What the rules of ``coverage_transformers.py`` do not know, by package: settings of tiny models."""

from __future__ import annotations

from typing import Any

#: The class that is built.
CLASSES = {
    "sam": "SamModel",
    "sam_hq": "SamHQModel",
    "sam2": "Sam2Model",
    "pi0": "PI0Model",
    "vjepa2": "VJEPA2Model",
    "sam3": "Sam3Model",
    "layoutlmv3": "LayoutLMv3ForSequenceClassification",
    "vilt": "ViltForQuestionAnswering",
    "florence2": "Florence2Model",
    "slanext": "SLANeXtVisionEncoder",
    "udop": "UdopEncoderModel",
}
#: Convolutions in front of a detector, as it would have them from elsewhere.
_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16, 24],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
_RESNET_VD = {
    "model_type": "rt_detr_resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16, 24],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
_HGNET = {
    "model_type": "hgnet_v2",
    "embedding_size": 8,
    "hidden_sizes": [12, 16, 20, 24],
    "depths": [1, 1, 1, 1],
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 12, 16, 20],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [12, 16, 20, 24],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
_DETR = {"backbone_config": {**_RESNET, "out_features": ["stage4"]}}
_RT_DETR = {
    "backbone_config": _RESNET_VD,
    "encoder_in_channels": [12, 16, 24],
    "decoder_in_channels": [32, 32, 32],
}
_D_FINE = {
    "backbone_config": _HGNET,
    "encoder_in_channels": [16, 20, 24],
    "decoder_in_channels": [32, 32, 32],
    "lqe_hidden_dim": 16,
}
_DOCUMENT = {
    **_D_FINE,
    "backbone_config": {**_HGNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
    "x4_feat_dim": 12,
}
#: Few points to match, with random weights.
_POINTS = {"keypoint_detector_config.max_keypoints": 20, "keypoint_detector_config.encoder_hidden_sizes": [8, 8, 8, 8]}
_SAM = {"prompt_encoder_config.image_embedding_size": 4, "vision_config.num_pos_feats": 16}
_SAM3 = {
    "vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    "vision_config.backbone_config.window_size": 2,
    "vision_config.backbone_config.global_attn_indexes": [1],
    "vision_config.backbone_config.pretrain_image_size": 32,
}
#: Entries of its configuration, by their paths.
ENTRIES: dict[str, dict[str, Any]] = {
    "mobilevit": {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 8, 12, 16, 20, 24]},
    "mobilevitv2": {"image_size": 256},
    "slanext": {"output_channels": 256},
    "pp_formulanet": {"output_channels": 256},
    "colqwen2": {
        "vlm_config.text_config.rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [1, 1, 2],
        },
    },
    "perceiver": {
        "num_latents": 5,
        "d_latents": 32,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 1,
    },
    "bridgetower": {"hidden_size": 64, "text_config.hidden_size": 64, "vision_config.hidden_size": 64},
    "sapiens2": {"num_hidden_layers": 4, "num_key_value_heads_per_layer": [4, 4, 2, 2]},
    "florence2": {
        "vision_config.image_size": 64,
        "vision_config.embed_dim": [16, 16, 16, 16],
        "vision_config.num_heads": [2, 2, 2, 2],
        "vision_config.num_groups": [2, 2, 2, 2],
    },
    "edgetam": {
        "vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "vision_config.backbone_config.architecture": "repvit_m1",
        "prompt_encoder_config.image_size": 64,
        "prompt_encoder_config.patch_size": 16,
        "mask_decoder_config.iou_head_hidden_dim": 32,
    },
    "shieldgemma2": {"mm_tokens_per_image": 4, "yes_token_index": 5, "no_token_index": 6},
    "hiera": {"patch_size": [7, 7]},
    "depth_anything": {"reassemble_hidden_size": 32},
    "prompt_depth_anything": {"reassemble_hidden_size": 32},
    "radio": {"patch_size": 16},
    "levit": {"image_size": 64, "patch_size": 16},
    **dict.fromkeys(["detr", "conditional_detr", "table_transformer", "dab_detr"], _DETR),
    "deformable_detr": {"backbone_config": {**_RESNET, "out_features": ["stage2", "stage3", "stage4"]}},
    **dict.fromkeys(["rt_detr", "rt_detr_v2"], _RT_DETR),
    **dict.fromkeys(["d_fine", "deimv2"], _D_FINE),
    "pp_doclayout_v2": {**_D_FINE, "class_thresholds": [0.0] * 99, "class_order": list(range(99))},
    "pp_doclayout_v3": _DOCUMENT,
    "pp_doclayout_v4": _DOCUMENT,
    **dict.fromkeys(["sam", "sam_hq"], _SAM),
    "sam2": {
        "vision_config.backbone_channel_list": [64, 32, 16, 8],
        "vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "vision_config.backbone_config.blocks_per_stage": [1, 1, 2, 1],
        "vision_config.backbone_config.global_attention_blocks": [3],
        "vision_config.backbone_config.hidden_size": 8,
        "vision_config.backbone_config.query_stride": [2, 2],
        "mask_decoder_config.iou_head_hidden_dim": 32,
        "prompt_encoder_config.image_size": 64,
        "prompt_encoder_config.patch_size": 16,
    },
    "zoedepth": {
        "backbone_config.num_hidden_layers": 4,
        "backbone_config.out_features": None,
        "backbone_config.out_indices": [1, 2, 3, 4],
        "bottleneck_features": 32,
        "backbone_config.stage_names": ["stem", "stage1", "stage2", "stage3", "stage4"],
    },
    "eomt": {"num_hidden_layers": 4, "num_blocks": 2},
    "eomt_dinov3": {"num_hidden_layers": 4, "num_blocks": 2},
    "llama4": {
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "intermediate_size": 128,
    },
    "mllama": {"num_global_layers": 1, "intermediate_layers_indices": [0, 1]},
    "x_clip": {
        "vision_config.mit_hidden_size": 32,
        "vision_config.mit_intermediate_size": 44,
        "vision_config.mit_num_attention_heads": 4,
        "prompt_num_attention_heads": 4,
    },
    "vjepa2": {
        "crop_size": 32,
        "pred_hidden_size": 32,
        "pred_num_attention_heads": 4,
        "pred_num_hidden_layers": 2,
        "num_pooler_layers": 1,
    },
    "swin2sr": {"patch_size": 1, "image_size": 16},
    "seggpt": {"intermediate_hidden_state_indices": [0, 1], "image_size": [64, 32], "merge_index": 0},
    "oneformer": {"mask_dim": 32},
    "lightglue": {
        "descriptor_dim": 32,
        "intermediate_size": 64,
        "keypoint_detector_config.descriptor_decoder_dim": 32,
        **_POINTS,
    },
    "efficientloftr": {
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 512,
        "num_attention_layers": 1,
    },
    "vitmatte": {
        "backbone_config": {
            "model_type": "vitdet",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 16,
            "pretrain_image_size": 32,
            "num_channels": 4,
            "out_features": ["stage2"],
        },
        "convstream_hidden_sizes": [8, 16, 24],
        "fusion_hidden_sizes": [32, 16, 16, 8],
    },
    "omdet_turbo": {
        "backbone_config": {
            "model_type": "swin",
            "embed_dim": 24,
            "depths": [1, 1, 1, 1],
            "num_heads": [3, 3, 3, 3],
            "window_size": 4,
            "image_size": 64,
            "patch_size": 2,
            "out_features": ["stage2", "stage3", "stage4"],
        },
        "encoder_in_channels": [48, 96, 192],
        "vision_features_channels": [32, 32, 32],
        "decoder_hidden_dim": 32,
        "decoder_num_heads": 4,
        "decoder_num_layers": 2,
        "decoder_dim_feedforward": 44,
        "encoder_dim_feedforward": 44,
        "text_projection_in_dim": 32,
        "text_projection_out_dim": 32,
        "class_embed_dim": 32,
        "task_encoder_hidden_dim": 44,
    },
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "input_size": 32, "max_2d_position_embeddings": 64},
    "cohere2_vision": {"alignment_intermediate_size": 64},
    "tvp": {"max_img_size": 64, "visual_prompt_size": 8},
    "sam3_tracker": {**_SAM3, "mask_decoder_config.iou_head_hidden_dim": 32},
    "sam3": _SAM3,
    "sam3_lite_text": _SAM3,
    "vilt": {"max_image_length": 16, "num_images": 1},
    "gemma4": {"position_embedding_size": 32},
    "molmo2": {"num_position_embeddings": 16},
    "superglue": {
        "keypoint_encoder_sizes": [8, 16],
        "gnn_layers_types": ["self", "cross"],
        "sinkhorn_iterations": 3,
        "keypoint_detector_config.descriptor_decoder_dim": 32,
        **_POINTS,
    },
}
#: What is shown to those that have no size of their own, and convolutions in front.
IMAGES = (
    dict.fromkeys(
        [
            "detr",
            "conditional_detr",
            "deformable_detr",
            "table_transformer",
            "dab_detr",
            "rt_detr",
            "rt_detr_v2",
            "d_fine",
            "deimv2",
            "pp_doclayout_v2",
            "pp_doclayout_v3",
            "pp_doclayout_v4",
        ],
        (3, 3, 64, 96),
    )
    | dict.fromkeys(["superglue", "lightglue", "efficientloftr"], (3, 2, 3, 64, 96))
    | {"vitmatte": (3, 4, 32, 32), "edgetam": (3, 3, 64, 64)}
)
#: Settings that others follow from.
MADE: dict[str, dict[str, Any]] = {
    "lw_detr": {
        "backbone_config": {
            "model_type": "lw_detr_vit",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "pretrain_image_size": 64,
            "patch_size": 8,
            "num_windows": 4,
            "window_block_indices": [0],
            "out_features": ["stage1", "stage2"],
        },
        "projector_scale_factors": [1.0],
        "decoder_self_attention_heads": 4,
        "decoder_cross_attention_heads": 4,
        "d_model": 32,
    },
}
