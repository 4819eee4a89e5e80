"""Traces of models that splice images into the text themselves, whose labels are given for ``input_ids``."""

from __future__ import annotations

import pytest
import torch
from models import LAYERS, masked_visual_columns
from test_sentinel_models import ROWS, SENTINEL, TOKENS, expanded, splice_model, spliced_inputs

import dyvte
from dyvte import SplicedVisualMask

ANSWERS = [[21, 22, 23], [24], [25, 26]]


def labelled(side):
    """Inputs that end in answers, labels in the places of ``input_ids``, and where those come to stand."""
    rows = [row + answer for row, answer in zip(ROWS, ANSWERS)]
    inputs, ids = spliced_inputs(rows, side)
    labels = torch.full_like(ids, -100)
    visual, valid = expanded(rows, side)
    places = []
    for row, (tokens, answer) in enumerate(zip(rows, ANSWERS)):
        end = ids.shape[1] if side == "left" else len(tokens)
        labels[row, end - len(answer) : end] = torch.tensor(answer)
        end = visual.shape[1] if side == "left" else len(tokens) + (TOKENS - 1) * tokens.count(SENTINEL)
        places.append(torch.arange(end - len(answer), end))
    return inputs | {"input_ids": ids}, labels, visual, places


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_every_branch_equals_the_definition(attention, side):
    inputs, labels, visual, places = labelled(side)
    model, eager = splice_model(attention, side), splice_model("eager", side)
    trace = dyvte.trace_batch(model, inputs | {"labels": labels}, SplicedVisualMask(model))
    assert model.encoded == 1 and trace.agreement.min() < 1
    dense = eager(**inputs).logits
    for layer in range(1, LAYERS + 1):
        with masked_visual_columns(eager, visual, torch.full((len(ROWS),), layer)):
            logits = eager(**inputs).logits
        for row, (place, answer) in enumerate(zip(places, ANSWERS)):
            p, q = logits[row, place - 1].log_softmax(-1), dense[row, place - 1].log_softmax(-1)
            agreement = (p.argmax(-1) == q.argmax(-1)).float().mean()
            found = trace.agreement[row, layer - 1], trace.nll[row, layer - 1], trace.kl[row, layer - 1]
            nll, kl = -p[torch.arange(len(answer)), answer].mean(), (p[0].exp() * (p[0] - q[0])).sum()
            torch.testing.assert_close(torch.stack(found), torch.stack([agreement, nll, kl]), atol=1e-5, rtol=1e-4)


def test_without_an_attention_mask():
    """One sample needs none; sequences that begin or end with an image could be padding, so they do."""
    inputs, labels, visual, places = labelled("left")
    model, one = splice_model(), {"input_ids": inputs["input_ids"][:1], "images": inputs["images"][:1]}
    trace = dyvte.trace_batch(model, one | {"labels": labels[:1]}, SplicedVisualMask(model))
    both = dyvte.trace_batch(model, inputs | {"labels": labels}, SplicedVisualMask(model))
    torch.testing.assert_close(trace.nll, both.nll[:1], atol=1e-5, rtol=1e-4)
    two = {"input_ids": torch.tensor([[SENTINEL, 5, 6], [7, SENTINEL, 8]]), "images": inputs["images"][:2]}
    with pytest.raises(ValueError, match="pass attention_mask"):
        dyvte.trace_batch(model, two, SplicedVisualMask(model))


def test_labels_that_do_not_fit():
    inputs, labels, visual, places = labelled("left")
    model = splice_model()
    with pytest.raises(ValueError, match="labels must be"):
        dyvte.trace_batch(model, inputs | {"labels": torch.full(visual.shape, -100)}, SplicedVisualMask(model))
    early = labels.clone()
    early[0, 1] = 6  # before the image
    with pytest.raises(ValueError, match="before the end of the prompt"):
        dyvte.trace_batch(model, inputs | {"labels": early}, SplicedVisualMask(model))
