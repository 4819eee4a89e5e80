"""What single model types need beyond the general shrinking of :mod:`zoo`, as data.

config: fields of the config and of its parts.
pixels: what one image is in the inputs; a tuple is the shape of random numbers, a list the values themselves.
along, per sample, counts on: how the images of a batch are put together, where not along the first dimension.
tokens, around: how many visual tokens an image has, where the model cannot be asked; tokens before and after them.
mask_as, answer_type: an input that marks the visual tokens; the token type of generated tokens.
definition: "masks" where rows alone do not say what an exit means.
same length: why the prompts of a batch are not padded.
output: (part, attribute): an output of a part that the model reads and the part does not have.
without a prompt, no decoder: why there is nothing to withdraw.
"""

from __future__ import annotations

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
MROPE_HALF = {**MROPE, "mrope_section": [2, 1, 1]}
WHOLE = {**MROPE, "partial_rotary_factor": 1.0}
LINEAR = {"rope_parameters": WHOLE, "initializer_range": 0.07}  # states carry rounding on
LETTERS = [*"ABCDEFGHIJ", *("B" + c for c in "ABCDEF")]  # how Chameleon writes 0 to 15
ROWS_4_BY_4 = [[[x, y, *(((x + 2 * y) * (i + 3)) % 7 - 3.0 for i in range(32))] for y in range(4) for x in range(4)]]
GRID_4_BY_4 = [[[x, y] for y in range(4) for x in range(4)]]
SHARING = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": [*["sliding_attention"] * 3, "full_attention", "sliding_attention", "full_attention"],
}
OMNI = {"vision_start_token_id": 93, "vision_end_token_id": 94, "audio_start_token_id": 95, "audio_end_token_id": 96}
CROSS = "its decoder sees images through cross attention"
ENCODER = "encoder-decoder: visual tokens go to the encoder, the decoder sees them through cross attention"
TOWER = {"model_args": {"embed_dim": 32}}

FIXES: dict[str, dict] = {
    "apertus1p5": {
        "config": {
            "text_config": {"vocab_size": 132},
            "vision_config": {"base_channels": 32, "channel_multiplier": [1, 1, 1]},
            "audio_config": {"codebook_dim": 32},
            "image_token_offset": 100,
            "audio_token_offset": 116,
        },
        "pixels": {"pixel_values": (1, 3, 16, 16), "image_sizes": [[16, 16]]},
    },
    "aria": {"config": {"projector_patch_to_query_dict": {"16": 8}}},
    "blip-2": {"config": {"num_query_tokens": 4, "image_token_index": 90}},
    "chameleon": {
        "config": {
            "vocab_size": 132,
            "vocabulary_map": {"<image>": 90} | {f"IMGIMG{c}Z": 100 + i for i, c in enumerate(LETTERS)},
        },
        "pixels": {"pixel_values": (1, 3, 64, 64)},
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
    "cosmos3_omni": {
        "config": {"text_config": {"rope_parameters": MROPE}, "vision_config": {"deepstack_visual_indexes": [0, 1]}}
    },
    "deepseek_ocr2": {
        "config": {
            "text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 4, "n_group": 1, "topk_group": 1},
            "vision_config": {"sam_config": {"downsample_channels": [32, 32]}},
        },
    },
    "deepseek_vl_hybrid": {
        "config": {"high_res_vision_config": {"image_size": 32, "global_attn_indexes": [0]}},
        "pixels": {"pixel_values": (1, 3, 16, 16), "high_res_pixel_values": (1, 3, 32, 32)},
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
            "vq_config": {"channel_multiplier": [1, 1]},
            "vocabulary_map": {"<image>": 90, "<|extra_200|>": 99}
            | {f"<|visual token {i:06d}|>": 100 + i for i in range(16)},
        },
        "pixels": {"pixel_values": (1, 3, 16, 16), "image_sizes": [[16, 16]]},
    },
    "ernie4_5_vl_moe": {
        "config": {
            "text_config": {"moe_intermediate_size": [24, 24], "rope_parameters": {**MROPE, "mrope_section": [3, 3, 2]}}
        }
    },
    "exaone4_5": {"config": {"vision_config": {"window_size": 16, "fullatt_block_indexes": [1]}}},
    "fast_vlm": {"config": {"vision_config": {"hidden_size": 32}}},
    "florence2": {
        "without a prompt": ENCODER,
        "config": {
            "vision_config": {"patch_size": [3] * 4, "embed_dim": [8] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4}
        },
    },
    "fuyu": {"config": {"patch_size": 4}, "pixels": {"pixel_values": (1, 4, 48)}},
    "gemma3": {"config": {"mm_tokens_per_image": 4}},
    "gemma3n": {
        "config": {
            "vision_config": {"vocab_size": 4, "vocab_offset": 96},
            "audio_config": {"vocab_size": 4, "vocab_offset": 96},
            "text_config": SHARING,
            "vision_soft_tokens_per_image": 16,
        }
    },
    "gemma4": {
        "config": {
            "text_config": {**SHARING, "global_head_dim": 16},
            "vision_config": {"pooling_kernel_size": 2},
        },
        "pixels": {"pixel_values": (1, 16, 48), "image_position_ids": GRID_4_BY_4},
    },
    "gemma4_unified": {
        "config": {
            "text_config": {"global_head_dim": 16},
            "vision_config": {"pooling_kernel_size": 1, "mm_embed_dim": 32, "output_proj_dims": 32},
        },
        "pixels": {"pixel_values": (1, 16, 48), "image_position_ids": GRID_4_BY_4},
    },
    "glm46v": {"config": {"text_config": {"rope_parameters": MROPE}}},
    "glm4v": {"config": {"text_config": {"rope_parameters": MROPE}}},
    "glm4v_moe": {"config": {"text_config": {"rope_parameters": {**WHOLE}}}},
    "glm5_next": {"config": {"text_config": {"index_kpool": 2, "qk_rope_head_dim": 0}}},
    "glm_ocr": {"config": {"text_config": {"rope_parameters": MROPE}}},
    "glmga": {"config": {"text_config": {"rope_parameters": MROPE}}},
    "got_ocr2": {"config": {"vision_config": {"image_size": 32}}},
    "pp_chart2table": {"config": {"vision_config": {"image_size": 32}}},
    "granite4_vision": {
        "config": {
            "deepstack_layer_map": [[-2, 0], [-1, 1]],
            "spatial_target_layers": [2],
            "downsample_rate": "1/2",
            "vision_config": {"hidden_size": 64},
            "image_grid_pinpoints": [[16, 32], [32, 16]],
        },
        "tokens": 14,
        "pixels": {"pixel_values": (1, 3, 3, 16, 16), "image_sizes": [[16, 32]]},
    },
    "granite_docling": {
        "config": {"vision_config": {"scale_factor": 2, "deepstack_visual_indexes": [0, 1]}},
        "pixels": {"pixel_values": (1, 1, 3, 16, 16), "pixel_attention_mask": [[True]]},
        "per sample": True,
    },
    "hunyuan_vl": {
        "definition": "masks",  # images are numbered through the batch
        "config": {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [2, 2, 2, 2]}}},
        "pixels": {"pixel_values": (16, 48), "image_grid_thw": [[1, 4, 4]]},
    },
    "hy_v4_vl": {
        "definition": "masks",  # layers without an indexer take the columns that an earlier one chose
        "config": {"text_config": {"rope_parameters": MROPE_HALF}},
    },
    "hyperclovax_vision_v2": {"config": {"vision_config": {"window_size": 16, "fullatt_block_indexes": [1]}}},
    "idefics2": {
        "per sample": True,
        "config": {"perceiver_config": {"resampler_n_latents": 4, "resampler_n_heads": 2, "resampler_head_dim": 16}},
        "pixels": {"pixel_values": (1, 1, 3, 16, 16)},
    },
    "idefics3": {"per sample": True, "pixels": {"pixel_values": (1, 1, 3, 16, 16)}},
    "inkling2": {
        "config": {"text_config": {"rel_extent": 16, "n_layers_per_attn_res_block": 2}},
        "pixels": {"pixel_values": (4, 8, 8, 3), "image_grid_thw": [[1, 2, 2]]},
    },
    "inkling2_loop": {
        "config": {
            "text_config": {
                "rel_extent": 16,
                "n_layers_per_attn_res_block": 1,
                "loop_layer_index_start": 1,
                "loop_layer_index_end": 4,
                "loop_num_passes": 2,
                "loop_gate_rank": 4,
            }
        },
        "pixels": {"pixel_values": (4, 8, 8, 3), "image_grid_thw": [[1, 2, 2]]},
    },
    "inkling_mm_model": {
        "config": {"text_config": {"rel_extent": 16}},
        "pixels": {"pixel_values": (4, 2, 4, 4, 3)},
    },
    "instructblip": {
        "config": {"num_query_tokens": 4, "image_token_index": 90},
        "pixels": {"pixel_values": (1, 3, 16, 16), "qformer_input_ids": [[5, 6, 7]]},
    },
    "instructblipvideo": {
        "config": {"num_query_tokens": 4, "video_token_index": 90},
        "pixels": {"pixel_values": (1, 2, 3, 16, 16), "qformer_input_ids": [[5, 6, 7]]},
        "tokens": 8,
    },
    "kimi_k25": {"pixels": {"pixel_values": (16, 3, 4, 4), "image_grid_thw": [[1, 4, 4]]}},
    "kosmos-2": {
        "same length": "the model itself miscounts positions of padded prompts while decoding",
        "config": {"latent_query_num": 4},
        "pixels": {"pixel_values": (1, 3, 16, 16)},
        "tokens": 4,
        "mask_as": "image_embeds_position_mask",
    },
    "kosmos-2.5": {
        "same length": "the model itself miscounts positions of padded prompts while decoding",
        "config": {"latent_query_num": 4},
        "pixels": {"flattened_patches": ROWS_4_BY_4},
        "tokens": 4,
        "mask_as": "image_embeds_position_mask",
    },
    "lfm2_vl": {
        "config": {
            "text_config": {"full_attn_idxs": [1, 4]},
            "vision_config": {"num_patches": 16},
        },
        "pixels": {
            "pixel_values": (1, 16, 48),
            "spatial_shapes": [[4, 4]],
            "pixel_attention_mask": [[1] * 16],
        },
    },
    "lighton_ocr": {"pixels": {"pixel_values": (1, 3, 16, 16), "image_sizes": [[16, 16]]}},
    # 5.24.0 reads an output of the language model that it does not have.
    "llama4": {
        "config": {"vision_config": {"intermediate_size": 128}},
        "output": ("language_model", "image_outputs"),
    },
    "llava_next": {
        "config": {"image_grid_pinpoints": [[16, 32], [32, 16]]},
        "pixels": {"pixel_values": (1, 3, 3, 16, 16), "image_sizes": [[16, 32]]},
    },
    "llava_next_video": {
        "config": {"image_grid_pinpoints": [[16, 32], [32, 16]]},
        "pixels": {"pixel_values": (1, 3, 3, 16, 16), "image_sizes": [[16, 32]]},
    },
    "llava_onevision": {
        "config": {"image_grid_pinpoints": [[16, 32], [32, 16]]},
        "pixels": {"pixel_values": (1, 3, 3, 16, 16), "image_sizes": [[16, 32]]},
    },
    "minimax_m3_vl": {
        "definition": "masks",  # blocks of keys are found by position
        "same length": "the model itself chooses among blocks of keys with padding in them",
        "config": {
            "text_config": {
                "layer_types": ["full_attention", "minimax_m3_sparse"] * 2 + ["minimax_m3_sparse"],
                "index_n_heads": 2,
                "index_block_size": 4,
                "index_topk_blocks": 2,
            }
        },
    },
    "mistral3": {"pixels": {"pixel_values": (1, 3, 16, 16), "image_sizes": [[16, 16]]}},
    "mistral4": {"pixels": {}, "tokens": 6},
    "mistral_large4": {"pixels": {"pixel_values": (1, 3, 16, 16), "image_sizes": [[16, 16]]}},
    "molmo2": {
        "config": {
            "vision_config": {"image_size": [16, 16]},
            "adapter_config": {"vision_feature_layer": [1, 0]},
            "image_patch_id": 90,
        },
        "pixels": {
            "pixel_values": (1, 16, 48),
            "image_token_pooling": [[4 * i + j for j in range(4)] for i in range(4)],
            "image_grids": [[2, 2, 0, 0]],
        },
        "counts on": {"image_token_pooling": 16},
    },
    "muse_glimmer": {"config": {"out_hidden_size": 128}},
    "muse_spark": {
        "config": {
            "text_config": {"initializer_range": 0.05},  # its residual gates carry rounding on
            "out_hidden_size": 128,
            "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8] * 4},
        }
    },
    "nemotron_h_omni": {
        "config": {
            "vision_config": {"video_temporal_patch_size": 2},
            "text_config": {
                "time_step_min": 1e-12,  # only whole prompts are clamped to it, steps are not
                "layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention", "moe"],
            },
            "vision_hidden_size": 32,
        },
        "pixels": {"pixel_values": (16, 48), "image_grid_hw": [[4, 4]]},
    },
    "paddleocr_vl": {
        "config": {"text_config": {"rope_parameters": MROPE}},
        "pixels": {"pixel_values": (16, 3, 4, 4), "image_grid_thw": [[1, 4, 4]]},
    },
    "paligemma": {"answer_type": 1},
    "perception_lm": {"config": {"vision_config": TOWER}, "pixels": {"pixel_values": (1, 1, 3, 16, 16)}},
    "qwen2_5_omni_thinker": {
        "config": {
            **OMNI,
            "text_config": {"rope_parameters": MROPE},
            "vision_config": {"window_size": 16, "fullatt_block_indexes": [1]},
        },
        "around": ([93], [94]),
    },
    "qwen2_5_vl": {
        "config": {
            "text_config": {"rope_parameters": MROPE},
            "vision_config": {"window_size": 16, "fullatt_block_indexes": [1]},
        }
    },
    "qwen2_vl": {"config": {"text_config": {"rope_parameters": MROPE}, "vision_config": {"hidden_size": 64}}},
    "qwen3_5": {"config": {"text_config": LINEAR}},
    "qwen3_5_moe": {"config": {"text_config": LINEAR}},
    "minicpm_ocr": {
        "config": {"text_config": LINEAR, "vision_config": {"insert_layer_id": 0}},
        "pixels": {"pixel_values": (1, 3, 4, 64), "target_sizes": [[4, 4]]},
        "along": {"pixel_values": 3},
    },
    "minicpmv4_6": {
        "config": {
            "downsample_mode": "4x",  # the other way lets images of one batch see each other
            "text_config": LINEAR,
            "vision_config": {"insert_layer_id": 0},
        },
        "pixels": {"pixel_values": (1, 3, 4, 64), "target_sizes": [[4, 4]]},
        "along": {"pixel_values": 3},
    },
    "minicpmv4_7": {
        "config": {
            "downsample_mode": "4x",  # the other way lets images of one batch see each other
            "text_config": {"rope_parameters": WHOLE},
            "vision_config": {"insert_layer_id": 0},
        },
        "pixels": {"pixel_values": (1, 3, 4, 64), "target_sizes": [[4, 4]]},
        "along": {"pixel_values": 3},
    },
    "qwen3_omni_moe_thinker": {
        "config": {
            **OMNI,
            "text_config": {"rope_parameters": MROPE},
            "vision_config": {"deepstack_visual_indexes": [0, 1]},
        },
        "around": ([93], [94]),
    },
    "qwen3_vl": {
        "config": {"text_config": {"rope_parameters": MROPE}, "vision_config": {"deepstack_visual_indexes": [0, 1]}}
    },
    "qwen3_vl_moe": {
        "config": {"text_config": {"rope_parameters": MROPE}, "vision_config": {"deepstack_visual_indexes": [0, 1]}}
    },
    "qwen4_exp": {
        "config": {
            "text_config": {
                "indexer_n_heads": 16,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 16,
                "indexer_budget": 8,
                "indexer_compress_ratio": 2,
                "ple_layer_ids": [1, 4],
                "ple_embed_dim": 64,
                "ngram_vocab_size_base": 50,
                "heads_per_ngram": 2,
                "make_ngram_vocab_size_divisible_by": 8,
                "split_ngram_parts": 1,
                "rope_parameters": MROPE,
            }
        }
    },
    "shieldgemma2": {"config": {"mm_tokens_per_image": 4}},
    "smolvlm": {"per sample": True, "pixels": {"pixel_values": (1, 1, 3, 16, 16)}},
    "step3p7": {"config": {"vision_config": {"image_size": 32}, "text_config": {"sliding_window": 12}}},
    "unlimited_ocr": {
        "config": {
            "vision_config": {"sam_config": {"downsample_channels": [32, 32], "image_size": 64}},
            "text_config": {"num_key_value_heads": 4},
        },
        "pixels": {"pixel_values": (1, 3, 64, 64)},
    },
    "video_llama_3": {
        "pixels": {"pixel_values": (16, 48), "image_grid_thw": [[1, 4, 4]], "image_merge_sizes": [2]},
    },
    "vipllava": {"config": {"vision_feature_layer": [-2, -1]}},
    # No visual token is part of a prompt: built to see them refused.
    "blip": {"without a prompt": CROSS},
    "diffusion_gemma": {"without a prompt": "denoises whole blocks of tokens, which attend both ways"},
    "evolla": {"without a prompt": "its decoder sees proteins through cross attention"},
    "git": {"no decoder": "its visual rows stand before all tokens, and nothing in the inputs is as long as both"},
    "idefics": {"without a prompt": CROSS},
    "mllama": {"without a prompt": CROSS},
    "pi0": {"without a prompt": "makes actions of a robot by flow matching, no tokens"},
    "pix2struct": {"without a prompt": ENCODER},
    "pp_formulanet": {"without a prompt": ENCODER},
    "t5gemma2": {"without a prompt": ENCODER, "config": {"encoder": {"mm_tokens_per_image": 4}}},
    "udop": {"without a prompt": ENCODER},
    "vision-encoder-decoder": {"without a prompt": ENCODER},
}
