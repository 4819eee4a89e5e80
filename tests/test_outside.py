"""What callers do who never read how prompts ought to look: every way to decode prompts that end in padding."""

from __future__ import annotations

import pytest
import torch
from models import IMAGE_ID, batch_of, masked_visual_columns, prompt, tiny_llava
from transformers import LlamaConfig, LlamaForCausalLM

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


@pytest.mark.parametrize("mode", ["prompt lookup", "assisted"])
@pytest.mark.parametrize("layer", [1, 3])
def test_guesses_after_padding(mode, layer):
    """The prompt's last column is read for the first token, and guesses follow it in the same pass."""
    inputs = batch_of(PROMPTS[0])
    inputs["input_ids"][0, -4:] = inputs["input_ids"][0, -5]
    inputs["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (0, 2))
    inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 2))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    eager, model = tiny_llava("eager").double(), tiny_llava().double()

    if mode == "assisted":
        skip_unless_assisted(model, inputs)

    def run(model):
        guesses = {"prompt_lookup_num_tokens": 3} if mode == "prompt lookup" else {"assistant_model": draft()}
        settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        with torch.no_grad():
            return model.generate(**inputs, **settings, **guesses)

    with masked_visual_columns(eager, inputs["input_ids"] == IMAGE_ID, torch.tensor([layer])):
        expected = run(eager)
    with dyvte.visual_exit(model, dyvte.FixedExit(layer)):
        out = run(model)
    assert out.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(out.logits[0], expected.logits[0], atol=1e-5, rtol=1e-4)


def skip_unless_assisted(model, inputs) -> None:
    """``generate`` hands images to the assistant too (up to 5.0), and a text model takes none."""
    try:
        model.generate(**inputs, max_new_tokens=2, assistant_model=draft())
    except ValueError as error:
        if "are not used by the model" not in str(error):
            raise
        pytest.skip("a text model cannot assist this one")


def draft() -> LlamaForCausalLM:
    """A small text-only assistant with the same vocabulary."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, pad_token_id=0, **sizes)).eval().double()
    model.generation_config.eos_token_id = None
    return model
