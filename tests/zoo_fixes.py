"""What single model types need beyond the general shrinking of :mod:`zoo`, as data.

Towers that only come with timm are replaced by small ones of transformers.
"""

from __future__ import annotations

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
QWEN3_5 = {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}
TOWER = {"model_args": {"embed_dim": 32}}

FIXES: dict[str, dict] = {
    "florence2": {"config": {"vision_config": {"patch_size": [3] * 4, "embed_dim": [8] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4}}},
    "apertus1p5": {
        "config": {
            "text_config": {"vocab_size": 132},
            "vision_config": {"base_channels": 32, "channel_multiplier": [1, 1, 1]},
            "audio_config": {"codebook_dim": 32},
            "image_token_offset": 100,
            "audio_token_offset": 116,
        }
    },
    "chameleon": {
        "config": {
            "vocab_size": 132,
            "vocabulary_map": {"<image>": 90} | {f"IMGIMG{c}": 100 + i for i, c in enumerate("ABCDEFGHIJKLMNOP")},
        }
    },
    "cohere_compass": {
        "config": {
            "text_config": {
                "rope_parameters": {"full_attention": MROPE, "sliding_attention": MROPE},
                "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
            },
            "vision_config": {"deepstack_visual_indexes": [0, 1]},
        }
    },
    "cosmos3_edge": {"config": {"text_config": {"rope_parameters": MROPE}}},
    "deepseek_ocr2": {
        "config": {
            "text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 4, "n_group": 1, "topk_group": 1},
        }
    },
    "dots3_note": {
        "config": {
            "text_config": {
                "swa_num_attention_heads": 4,
                "swa_num_key_value_heads": 4,
                "swa_q_lora_rank": 16,
                "swa_kv_lora_rank": 16,
                "swa_head_dim": 16,
                "swa_qk_nope_head_dim": 8,
                "swa_v_head_dim": 8,
            },
            "vision_config": {"mlp_layer_types": ["dense", "dense"]},
        }
    },
    "emu3": {
        "config": {
            "text_config": {"vocab_size": 132},
            "vocabulary_map": {"<image>": 90, "<|extra_200|>": 99}
            | {f"<|visual token {i:06d}|>": 100 + i for i in range(16)},
        }
    },
    "ernie4_5_vl_moe": {
        "config": {
            "text_config": {"moe_intermediate_size": [24, 24], "rope_parameters": {**MROPE, "mrope_section": [3, 3, 2]}}
        }
    },
    "fast_vlm": {"config": {"vision_config": {"hidden_size": 32}}},
    "gemma3n": {
        "config": {
            "vision_config": {"vocab_size": 4, "vocab_offset": 96},
            "audio_config": {"vocab_size": 4, "vocab_offset": 96},
            "text_config": {"num_kv_shared_layers": 2},
            "vision_soft_tokens_per_image": 16,
        }
    },
    "gemma4": {"config": {"text_config": {"global_head_dim": 16}, "vision_config": {"model_type": "gemma4_vision"}}},
    "glm5_next": {"config": {"text_config": {"index_kpool": 2, "qk_rope_head_dim": 0}}},
    "granite4_vision": {
        "config": {
            "deepstack_layer_map": [[-2, 0], [-1, 1]],
            "spatial_target_layers": [2],
            "downsample_rate": "1/2",
            "vision_config": {"hidden_size": 64},
        }
    },
    "hy_v4_vl": {"config": {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [2, 1, 1]}}}},
    "muse_spark": {"config": {"audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8] * 4}}},
    "molmo2": {
        "config": {
            "vision_config": {"image_size": [16, 16]},
            "adapter_config": {"vision_feature_layer": [1, 0]},
            "image_patch_id": 90,
        }
    },
    "nemotron_h_omni": {
        "config": {
            "vision_config": {"video_temporal_patch_size": 2},
            "text_config": {
                "layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention", "moe"],
            },
            "vision_hidden_size": 32,
        }
    },
    "perception_lm": {"config": {"vision_config": TOWER}},
    "qwen4_exp": {
        "config": {
            "text_config": {
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 16,
                "indexer_budget": 8,
                "indexer_compress_ratio": 2,
                "rope_parameters": MROPE,
            }
        }
    },
}
