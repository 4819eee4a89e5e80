"""A trace says what the definition says, for every exit layer at once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import IMAGE_ID, LAYERS, batch_of, masked_visual_columns, prompt, tiny_llama, tiny_llava

import dyvte

PROMPTS = [prompt(3, 5, seed=1), prompt(1, 9, seed=2), prompt(6, 1, seed=3), prompt(2, 4, images=2, seed=4)]
ANSWERS = [[11, 12, 13], [14], [15, 16], [17, 18, 19]]


def with_answers(side):
    """Inputs whose sequences end in an answer, and labels there."""
    inputs = batch_of(*[p + a for p, a in zip(PROMPTS, ANSWERS)], side=side)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (ids, answer) in enumerate(zip(PROMPTS, ANSWERS)):
        end = labels.shape[1] if side == "left" else len(ids) + len(answer)
        labels[row, end - len(answer) : end] = torch.tensor(answer)
    return inputs | {"labels": labels}


def expected_trace(inputs, layer):
    """Logits under the definition, and what follows from them, sample by sample."""
    eager, labels = tiny_llava("eager"), inputs["labels"]
    rest = {k: v for k, v in inputs.items() if k != "labels"}
    visual = inputs["input_ids"] == IMAGE_ID
    with torch.no_grad():
        dense = eager(**rest, use_cache=False).logits
        with masked_visual_columns(eager, visual, torch.full((len(labels),), layer)):
            exits = eager(**rest, use_cache=False).logits
    rows = []
    for row in range(len(labels)):
        answer = (labels[row] != -100).nonzero().flatten()
        at = answer - 1
        p, q = exits[row, at].log_softmax(-1), dense[row, at].log_softmax(-1)
        agreement = (p.argmax(-1) == q.argmax(-1)).float().mean()
        nll = -p.gather(1, labels[row, answer][:, None]).mean()
        dense_nll = -q.gather(1, labels[row, answer][:, None]).mean()
        kl = (p[0].exp() * (p[0] - q[0])).sum()
        rows.append(torch.stack([agreement, nll, kl, dense_nll]))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_branch_equals_the_definition(attention, side):
    inputs = with_answers(side)
    trace = dyvte.trace_batch(tiny_llava(attention), inputs)
    assert trace.state.shape == (4, LAYERS, 64)
    for layer in range(1, LAYERS + 1):
        agreement, nll, kl, dense_nll = expected_trace(inputs, layer)
        assert trace.agreement[:, layer - 1].tolist() == pytest.approx(agreement.tolist())
        torch.testing.assert_close(trace.nll[:, layer - 1], nll, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(trace.kl[:, layer - 1], kl, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(trace.dense_nll, dense_nll, atol=1e-5, rtol=1e-5)
    assert trace.agreement.min() < 1, "the tiny model must disagree somewhere, or the test shows nothing"


def test_text_states_leave_visual_and_answer_tokens_out():
    inputs = with_answers("left")
    model = tiny_llava()
    trace = dyvte.trace_batch(model, inputs)
    labels = inputs.pop("labels")
    with torch.no_grad():
        hidden = model.model(**inputs, output_hidden_states=True).hidden_states  # [0] is before the first layer
    for row, (ids, answer) in enumerate(zip(PROMPTS, ANSWERS)):
        end = labels.shape[1] - len(answer)
        start = end - (len(ids) - 1 - max(i for i, token in enumerate(ids) if token == IMAGE_ID))
        for layer in range(1, LAYERS):
            text = hidden[layer][row, start:end]
            mean = text[:-1].mean(0) if len(text) > 1 else text[-1]
            expected = torch.cat([mean, text[-1]])
            torch.testing.assert_close(trace.state[row, layer - 1], expected, atol=1e-5, rtol=1e-4)


def test_the_trace_foretells_generation():
    """Teacher-forcing the model's own greedy answer: agreement 1 exactly where an exit generates the same ids."""
    model, steps = tiny_llava(), 3
    inputs = batch_of(*PROMPTS)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=steps, do_sample=False)
    length = inputs["input_ids"].shape[1]
    labels = torch.full_like(ids, -100)
    labels[:, length:] = ids[:, length:]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), steps, dtype=torch.long)], 1)
    # generate() counts positions from the first token that is not padding
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    full = inputs | {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
    trace = dyvte.trace_batch(model, full)
    outcomes = set()
    for layer in range(1, LAYERS + 1):
        with torch.no_grad(), dyvte.visual_exit(model, dyvte.FixedExit(layer)):
            out = model.generate(**inputs, max_new_tokens=steps, do_sample=False)
        same = (out == ids).all(1)
        assert same.tolist() == (trace.agreement[:, layer - 1] == 1).tolist()
        outcomes |= set(same.tolist())
    assert outcomes == {True, False}


def test_without_labels_the_next_token_counts():
    model, inputs = tiny_llava(), batch_of(*PROMPTS)
    trace = dyvte.trace_batch(model, inputs)
    with torch.no_grad():
        dense = model(**inputs).logits[:, -1].log_softmax(-1)
        with dyvte.visual_exit(model, dyvte.FixedExit(3)):
            left = model(**inputs).logits[:, -1].log_softmax(-1)
    token = dense.argmax(-1)
    torch.testing.assert_close(trace.nll[:, 2], -left.gather(1, token[:, None])[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(trace.kl[:, 2], (left.exp() * (left - dense)).sum(-1), atol=1e-5, rtol=1e-4)
    assert trace.agreement[:, 2].tolist() == (left.argmax(-1) == token).float().tolist()
    assert trace.agreement[:, -1].tolist() == [1.0] * 4 and trace.kl[:, -1].tolist() == [0.0] * 4


def test_a_bare_decoder_with_inputs_embeds():
    visual = torch.zeros(2, 20, dtype=torch.bool)
    visual[:, 3:14] = True
    inputs = {"inputs_embeds": torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))}
    model = tiny_llama()
    trace = dyvte.trace_batch(model, inputs, visual_mask=visual)
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.FixedExit(2), visual_mask=visual):
        left = model(**inputs).logits[:, -1].log_softmax(-1)
    with torch.no_grad():
        token = model(**inputs).logits[:, -1].argmax(-1)
    torch.testing.assert_close(trace.nll[:, 1], -left.gather(1, token[:, None])[:, 0], atol=1e-5, rtol=1e-5)


def test_no_hook_stays_behind():
    def hooks():
        return [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]

    model, inputs = tiny_llava(), batch_of(prompt(3, 5))
    with torch.no_grad():
        model(**inputs)  # transformers keeps hooks of its own on the vision tower
    before = hooks()
    dyvte.trace_batch(model, inputs)
    assert hooks() == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"input_ids": None}, "neither input_ids nor inputs_embeds"),
        ({"labels": torch.full((1, 24), -100)}, "no answer tokens"),
        ({"labels": torch.zeros(1, 3, dtype=torch.long)}, "labels must be"),
        ({"input_ids": torch.full((1, 24), 7)}, "no visual tokens"),
    ],
)
def test_bad_input(change, match):
    with pytest.raises(ValueError, match=match):
        dyvte.trace_batch(tiny_llava(), batch_of(prompt(3, 5)) | change)


@pytest.mark.parametrize(
    ("exits", "expected"), [(None, [1, 2, 3, 4, 5]), (2, [1, 3, 5]), (3, [1, 4, 5]), ([4, 2, 6], [2, 4]), (9, [1, 5])]
)
def test_some_exits_only(exits, expected):
    inputs, model = with_answers("left"), tiny_llava()
    every, some = dyvte.trace_batch(model, inputs), dyvte.trace_batch(model, inputs, exits=exits)
    columns, others = [e - 1 for e in [*expected, LAYERS]], [e - 1 for e in range(1, LAYERS) if e not in expected]
    for name in ("agreement", "nll", "kl"):
        torch.testing.assert_close(getattr(some, name)[:, columns], getattr(every, name)[:, columns])
    assert bool((some.agreement[:, others] == 0).all()) and bool(some.nll[:, others].isnan().all())
    torch.testing.assert_close(some.state, every.state)


@pytest.mark.parametrize("exits", [0, True, "all", [], [0, 2], [3, 7], [2.0]])
def test_exits_that_cannot_be_traced(exits):
    with pytest.raises(ValueError, match="exits"):
        dyvte.trace_batch(tiny_llava(), batch_of(prompt(3, 5)), exits=exits)


@pytest.mark.parametrize("labels", [True, False])
def test_logits_may_be_made_in_parts(labels, monkeypatch):
    """Where all of them at once would be too large, the head runs on some rows after the other."""
    inputs, model = with_answers("left"), tiny_llava()
    if not labels:
        inputs.pop("labels")
    whole, widths = dyvte.trace_batch(model, inputs), []
    model.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[:2].numel()))
    monkeypatch.setattr("dyvte.training.trace_pass.LOGITS_AT_ONCE", 4 * 4 * 100)
    parts = dyvte.trace_batch(model, inputs)
    assert len(widths) > 1 and max(widths) <= 4
    for field in dataclasses.fields(whole):
        torch.testing.assert_close(getattr(parts, field.name), getattr(whole, field.name), atol=1e-5, rtol=1e-4)


def test_a_head_that_depends_on_its_place_is_refused(monkeypatch):
    inputs, model, calls = with_answers("left"), tiny_llava(), []

    def drift(module, args, output):
        calls.append(1)
        return output * len(calls)

    model.lm_head.register_forward_hook(drift)
    monkeypatch.setattr("dyvte.training.trace_pass.LOGITS_AT_ONCE", 1)
    with pytest.raises(ValueError, match="gives other logits for a few rows"):
        dyvte.trace_batch(model, inputs)


def test_a_callable_mask_and_a_named_decoder():
    model, inputs = tiny_llava(), with_answers("left")
    expected = dyvte.trace_batch(model, inputs)
    told = dyvte.trace_batch(
        model, inputs, visual_mask=lambda call: call["input_ids"] == IMAGE_ID, decoder="model.language_model"
    )
    torch.testing.assert_close(told.nll, expected.nll)
    torch.testing.assert_close(told.state, expected.state)
