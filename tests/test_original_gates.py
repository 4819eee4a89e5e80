"""Gates of the original DyVTE code, imported, decide and answer as the original rule says.

The rule is written out here once more, apart from the package: after decoder layer i, gate i reads [mean of the text
tokens after the image but the last; last token] and the sample leaves at the first i whose logit 1 exceeds logit 0.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import IMAGE_ID, LAYERS, batch_of, greedy_by_definition, prompt, tiny_llava

import dyvte

PROMPTS = [prompt(3, 5, seed=1), prompt(1, 9, seed=2), prompt(6, 2, seed=3), prompt(2, 4, seed=4), prompt(4, 4, seed=5)]
STEPS = 4


def gates():
    """Random gates."""
    generator = torch.Generator().manual_seed(2)
    state = {}
    for i in range(LAYERS):
        state[f"model.visual_gates_router.{i}.w1.weight"] = torch.randn(24, 64, generator=generator) / 8
        state[f"model.visual_gates_router.{i}.w2.weight"] = torch.randn(2, 24, generator=generator)
    return state


def original_exits(model, inputs, state):
    """e = i + 1 for the first gate that fires, else never; sample by sample."""
    with torch.no_grad():
        hidden = model.model(**inputs, output_hidden_states=True).hidden_states
    exits = []
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        start = max(i for i, token in enumerate(ids) if token == IMAGE_ID) + 1
        chosen = LAYERS
        for i in range(LAYERS - 1):
            text = hidden[i + 1][row, start:]
            features = torch.cat([text[:-1].mean(0), text[-1]])
            w1, w2 = (state[f"model.visual_gates_router.{i}.{name}.weight"] for name in ("w1", "w2"))
            no, yes = w2 @ F.gelu(w1 @ features)
            if yes > no:
                chosen = i + 1
                break
        exits.append(chosen)
    return torch.tensor(exits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_decisions_tokens_and_logits(attention):
    model, inputs = tiny_llava(attention), batch_of(*PROMPTS)
    state = gates()
    exits = original_exits(tiny_llava("eager"), inputs, state)
    assert len(set(exits.tolist())) > 2, "the gates should let samples leave at different layers"
    visual = inputs["input_ids"] == IMAGE_ID
    expected_ids, expected = greedy_by_definition(tiny_llava("eager"), inputs, visual, exits, STEPS)
    policy = dyvte.LearnedExit(dyvte.ExitHeads.from_original(state))
    with torch.no_grad(), dyvte.visual_exit(model, policy) as handle:
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert handle.layers.tolist() == exits.tolist()
    assert out.sequences[:, inputs["input_ids"].shape[1] :].tolist() == expected_ids.tolist()
    for step in range(STEPS):
        torch.testing.assert_close(out.logits[step], expected[step], atol=5e-5, rtol=0)


def test_alone_as_in_a_padded_batch():
    model, inputs = tiny_llava(), batch_of(*PROMPTS)
    policy = dyvte.LearnedExit(dyvte.ExitHeads.from_original(gates()))
    with torch.no_grad(), dyvte.visual_exit(model, policy) as together:
        model(**inputs)
    for row, ids in enumerate(PROMPTS):
        alone = batch_of(ids) | {"pixel_values": inputs["pixel_values"][row : row + 1]}
        with torch.no_grad(), dyvte.visual_exit(model, policy) as handle:
            model(**alone)
        assert handle.layers.tolist() == [together.layers[row].item()]


def test_one_text_token_after_the_image_is_its_own_mean():
    """The original averages nothing there and gets NaN, which never exits; here the token stands for the mean."""
    model, inputs = tiny_llava(), batch_of(prompt(6, 1))
    state = gates()
    with torch.no_grad():
        token = model.model(**inputs, output_hidden_states=True).hidden_states[1][0, -1]
    w1, w2 = (state[f"model.visual_gates_router.0.{name}.weight"] for name in ("w1", "w2"))
    no, yes = w2 @ F.gelu(w1 @ torch.cat([token, token]))
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.LearnedExit(dyvte.ExitHeads.from_original(state))) as handle:
        model(**inputs)
    assert (handle.layers.item() == 1) == bool(yes > no)
