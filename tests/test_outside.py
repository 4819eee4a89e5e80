"""What callers do who never read how prompts ought to look: every way to decode prompts that end in padding."""

from __future__ import annotations

import pytest
import torch
from models import IMAGE_ID, batch_of, masked_visual_columns, prompt, tiny_llava

import dyvte

PROMPTS = [prompt(3, 5, seed=1), prompt(1, 9, seed=2), prompt(6, 1, seed=3)]
MODES = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "sampling": {"do_sample": True, "top_k": 50},
    "beams": {"num_beams": 3},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exits", [[2, 2, 2], [1, 6, 3]], ids=str)
@pytest.mark.parametrize("told", ["mask", "pad id"])
def test_padded_on_the_right(told, exits, mode):
    """``generate`` reads the next token at the last column, which may be padding."""
    inputs, exits = batch_of(*PROMPTS, side="right"), torch.tensor(exits)
    visual = inputs["input_ids"] == IMAGE_ID
    if told == "pad id":
        del inputs["attention_mask"]
    arguments = {"max_new_tokens": 4, "do_sample": False} | MODES[mode]
    arguments |= {"output_logits": True, "return_dict_in_generate": True}
    # In double precision: rounding alone comes to more than the tolerance in a few of these.
    inputs["pixel_values"] = inputs["pixel_values"].double()
    eager, model = tiny_llava("eager").double(), tiny_llava().double()
    rows = max(arguments.get("num_beams", 1), arguments.get("num_return_sequences", 1))
    torch.manual_seed(0)
    with torch.no_grad(), masked_visual_columns(eager, visual, exits):
        expected = eager.generate(**inputs, **arguments)
    torch.manual_seed(0)
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.FixedExit(exits.repeat_interleave(rows))):
        out = model.generate(**inputs, **arguments)
    assert out.sequences.tolist() == expected.sequences.tolist()
    for got, want in zip(out.logits, expected.logits):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
