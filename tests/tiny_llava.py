"""A random LLaVA with its processor on disk, as a hub model would be."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

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


def save_tiny_llava(folder: Path) -> Path:
    from reference_mllm import build_model, build_processor

    torch.manual_seed(1)
    processor = build_processor(15)
    model = build_model(SETTINGS, len(processor.tokenizer)).eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
