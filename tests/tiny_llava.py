"""A random LLaVA with its processor on disk, as a hub model would be."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import LlavaProcessor

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
LAYERS = 4
SETTINGS = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 15,
        "projection_dim": 16,
    },
    "text_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.4,
    },
}


def random_reference() -> tuple[torch.nn.Module, LlavaProcessor]:
    from reference_mllm import build_model, build_processor

    torch.manual_seed(1)
    processor = build_processor(15)
    return build_model(SETTINGS, len(processor.tokenizer)).eval(), processor


def save_tiny_llava(folder: Path) -> Path:
    for part in random_reference():
        part.save_pretrained(folder)
    return folder
