"""The closed form counts what torch counts."""

from __future__ import annotations

import pytest
import torch
from models import LAYERS, PATCHES, batch_of, llama_config, prompt, tiny_llava
from torch.utils.flop_counter import FlopCounterMode

import dyvte
from dyvte.evaluation.costs import prefill_flops


def counted(model, inputs) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs, logits_to_keep=1)
    by_module = counter.get_flop_counts()
    total = sum(by_module["Global"].values())
    vision = [name for name in by_module if name.endswith((".vision_tower", ".multi_modal_projector"))]
    return total - sum(sum(by_module[name].values()) for name in vision)


@pytest.mark.parametrize("layer", [1, 3, LAYERS])
def test_prefill_flops(layer):
    # The counter has no entry for the CPU kernel of scaled_dot_product_attention; eager attention is counted.
    model, inputs = tiny_llava("eager"), batch_of(prompt(3, 5))
    with dyvte.visual_exit(model, dyvte.FixedExit(layer)):
        assert prefill_flops(llama_config(), 8, PATCHES, layer) == pytest.approx(counted(model, inputs), rel=0.01)


def test_exit_layer_out_of_range():
    with pytest.raises(ValueError, match="outside 1"):
        prefill_flops(llama_config(), 8, PATCHES, 0)
