"""One list of behaviours, run over every family: the exit equals its definition."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, LAYERS, Family
from models import masked_visual_columns

import dyvte

STEPS = 4
BATCHES = {
    "one": [[3, "image", 5]],
    "start": [["image", 6]],
    "one token after": [[4, "image", 1]],
    "two images": [[2, "image", 3, "image", 4]],
    "unequal images": [[2, "large image", 1, "image", 3]],
    "video": [[2, "video", 5]],
    "ragged": [[3, "image", 5], [1, "image", 9], [6, "image", 1]],
    "ragged, several images, text only": [[2, "image", 3, "large image", 4], [12], [1, "image", 2], [4, "video", 2]],
}


def prompts(family: Family, name: str) -> list:
    """A batch, with what the family cannot look at replaced by an image."""
    return [
        [piece if isinstance(piece, int) or piece in family.looks else "image" for piece in row]
        for row in BATCHES[name]
    ]


def generated(model, inputs, **changes):
    arguments = {"max_new_tokens": STEPS, "do_sample": False} | changes
    with torch.no_grad():
        return model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **arguments)


def equal_to_definition(family, inputs, exits, attention, **changes):
    """Logits within 1e-5 and equal ids; returns what the handle says of the exits."""
    visual, exits = family.visual(inputs), torch.as_tensor(exits)
    nothing = ~visual.any(1)
    exits = torch.where(nothing, LAYERS, exits)
    eager = family.build("eager")
    with masked_visual_columns(eager, visual, exits):
        expected = generated(eager, inputs, **changes)
    model = family.build(attention)
    with dyvte.visual_exit(model, dyvte.FixedExit(exits.tolist())) as handle:
        out = generated(model, inputs, **changes)
    assert out.sequences.tolist() == expected.sequences.tolist()
    for step, (got, want) in enumerate(zip(out.logits, expected.logits)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4, msg=lambda m, s=step: f"step {s}: {m}")
    assert handle.layers.tolist() == exits.tolist()
    return out


def pairs():
    return [pytest.param(f, a, id=f"{f.name}-{a}") for f in FAMILIES.values() for a in f.attentions]


@pytest.mark.parametrize("batch", [b for b in BATCHES if "ragged" not in b])
@pytest.mark.parametrize(("family", "attention"), pairs())
def test_one_sample(family, attention, batch):
    inputs = family.batch(*prompts(family, batch))
    layers = range(family.first, LAYERS + 1) if batch == "one" else [family.first, LAYERS - 1]
    for layer in layers:
        equal_to_definition(family, inputs, [layer], attention)


@pytest.mark.parametrize("batch", [b for b in BATCHES if "ragged" in b])
@pytest.mark.parametrize(("family", "attention"), pairs())
def test_ragged_batch(family, attention, batch):
    inputs = family.batch(*prompts(family, batch))
    rows = len(inputs["input_ids"])
    first = family.first
    for exits in ([first, first + 1, LAYERS - 1, LAYERS], [LAYERS, first, first, first + 2], [3] * 4, [LAYERS] * 4):
        equal_to_definition(family, inputs, exits[:rows], attention)
