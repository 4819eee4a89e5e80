"""A tiny random model of every image-text-to-text type of transformers, made from the type's own config class.

One walk shrinks every config and its parts by the names of their fields; what a type needs beyond that stands in
:mod:`zoo_fixes`, as data.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, TimmWrapperConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MAPPING
from zoo_fixes import FIXES

LAYERS = 5
PAD, IMAGE, VIDEO, AUDIO = 0, 90, 91, 92
SPECIAL = range(IMAGE, 140)
HIDDEN, HEADS, HEAD_DIM = 64, 4, 16

ANY = {
    "initializer_range": 0.1,  # with states of 64, far from uniform attention, so that a wrong mask shows
    "init_std": 0.1,
    "max_position_embeddings": 512,
    "conv_kernel_size": 3,
    "num_channels": 3,
    "projection_dim": HIDDEN,
    **dict.fromkeys(("projector_hidden_size", "projection_hidden_size", "projection_hidden_dim"), 32),
    **dict.fromkeys(("alignment_intermediate_size", "projection_intermediate_size", "merged_hidden_size"), 32),
    "base_channels": 32,
    "num_res_blocks": 1,
}
TEXT = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "n_embd", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "layers", "num_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "attention_heads", "num_heads", "decoder_attention_heads"), HEADS),
    "encoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "d_kv": HEAD_DIM,
    "vocab_size": 100,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # mixtures of experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_experts_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "share_expert_dim",
            "intermediate_size_mlp",
            "dense_intermediate_size",
            "shared_intermediate_size",
        ),
        24,
    ),
    # latent attention and its indexers
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "index_topk": 8,
    "index_n_heads": 16,  # fewer leave keys with equal scores of 0, whose order is chance
    "index_head_dim": 16,
    # linear attention
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("mamba_num_heads", "mamba_head_dim", "ssm_state_size"), 8),
    "n_groups": 2,
    # inputs for every layer
    "vocab_size_per_layer_input": 100,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "unpadded_vocab_size": 100,
    "moe_hidden_size": 32,
    "sliding_window": 12,
    "sliding_window_size": 12,
    "attention_chunk_size": 16,
}
VISION = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "patch_embed_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "d_ff", "encoder_ffn_dim", "moe_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "attention_heads"), 2),
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "d_kv": HEAD_DIM,
    "image_size": 16,
    "patch_size": 4,
    "vocab_size": 40,
    **dict.fromkeys(("out_hidden_size", "text_hidden_size"), HIDDEN),
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "position_embedding_size": 16,
    "num_position_embeddings": 16,
    "num_embeddings": 16,
    "codebook_size": 16,
    **dict.fromkeys(("pos_emb_height", "pos_emb_width", "posemb_grid_size"), 4),
    "adapter_out_dim": HIDDEN,
    "adapter_in_dim": 32,
    "adapter_input_size": 32,
    "output_dim": HIDDEN,
    "output_channels": 32,
    **dict.fromkeys(("max_image_size", "max_img_size"), 64),
    **dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32),
}
VISUAL_PARTS = ("vision", "high_res", "audio", "sam", "encoder", "vq", "qformer", "perceiver", "adapter", "protein")


def token_ids(names: list[str]) -> dict[str, int]:
    """Ids for the special tokens of a config: those for images and videos, any others after them."""
    known = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
    ids = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    others = iter(range(AUDIO + 1, 100))
    for name in names:
        if name.endswith(("_token_id", "_token_index")) and name not in ids:
            ids[name] = known.get(name.rsplit("_", 2)[0]) or next(others)
    return ids


def shrink(config: PreTrainedConfig | type[PreTrainedConfig], part: str = "") -> dict[str, Any]:
    """What to construct a config like this one with, but tiny."""
    kind = config if isinstance(config, type) else type(config)
    default = config() if isinstance(config, type) else config
    names = [field.name for field in dataclasses.fields(kind)]
    sizes = ANY | (VISION if part.startswith(VISUAL_PARTS) else TEXT)
    small = {"model_type": kind.model_type} | {
        name: sizes[name.removeprefix("swa_")] for name in names if name.removeprefix("swa_") in sizes
    }
    if "sliding_window" in small and default.sliding_window is None:
        small["sliding_window"] = None
    small |= {n: i for n, i in token_ids(names).items() if n in names}
    if "kv_lora_rank" in names:
        small["num_key_value_heads"] = HEADS  # latent attention has a key for every query head
    types = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if len(types) > 1 and "layer_types" in names:
        order = (0, 1, 0, 0, 1) if len(types) == 2 else range(len(types))
        small["layer_types"] = ([types[i] for i in order] * LAYERS)[: small.get("num_hidden_layers", LAYERS)]
    for name, own in kind.sub_configs.items():
        inner = getattr(default, name, None) or (own if name == "vision_config" else None)
        if inner is not None:
            small[name] = shrink(inner, name)
    return small


def merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Changes win; dicts of both are merged."""
    both = {
        n: merge(values[n], v) for n, v in changes.items() if isinstance(v, dict) and isinstance(values.get(n), dict)
    }
    return values | changes | both


def tiny_config(name: str) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[name]
    values = merge(shrink(kind), FIXES.get(name, {}).get("config", {}))
    values.pop("model_type")
    return kind(**values)


class Tower(transformers.PreTrainedModel):
    """Stands in for towers that only timm has: patches, as a map or, with a class token, in a row."""

    config_class = TimmWrapperConfig

    _supports_sdpa = True

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        size = VISION["patch_size"]
        self.patches = torch.nn.Conv2d(3, VISION["hidden_size"], size, stride=size)
        self.in_a_row = bool(config.model_args)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        states = self.patches(pixel_values)
        if self.in_a_row:
            states = torch.nn.functional.pad(states.flatten(2).mT, (0, 0, 1, 0))
        return BaseModelOutputWithPooling(last_hidden_state=states)


def tiny_model(name: str, attention: str = "eager") -> transformers.PreTrainedModel:
    """The model with seeded random weights, in eval mode."""
    config = tiny_config(name)
    config._attn_implementation = attention
    from_config = AutoModel.from_config

    def part(config: PreTrainedConfig, **kwargs: Any) -> transformers.PreTrainedModel:
        return Tower(config) if hasattr(config, "architecture") else from_config(config, **kwargs)

    torch.manual_seed(0)
    with mock.patch.object(AutoModel, "from_config", part):
        model = getattr(transformers, MAPPING[name])(config).eval()
    for module in model.modules():  # some generate through a part
        if getattr(module, "generation_config", None) is not None:
            module.generation_config = transformers.GenerationConfig(pad_token_id=PAD, suppress_tokens=[PAD, *SPECIAL])
    if "output" in FIXES.get(name, {}):
        path, missing = FIXES[name]["output"]
        model.get_submodule(path).register_forward_hook(lambda module, args, out: setattr(out, missing, None))
    return model
