"""Later turns, beams and bounds of decoders whose layers are not all attention with keys of their own."""

from __future__ import annotations

import pytest
import torch
from zoo_account import Subject, allowed_exits
from zoo_oracle import text_rows_alone
from zoo_prompts import extend, visual

import dyvte
from dyvte.runtime.compat import call_cache

KINDS = {
    "qwen3_5": "linear attention",
    "nemotron_h_omni": "recurrent and token-wise layers",
    "gemma3n": "several states per token, keys of other layers",
    "gemma4": "keys of other layers, the last row alone in a prefill",
}


@pytest.fixture(scope="module", params=KINDS, ids=KINDS.get)
def subject(request):
    pytest.importorskip(f"transformers.models.{request.param.removesuffix('_omni')}")
    return Subject(request.param)


def definition(subject, given, answer, layer):
    """Logits [text tokens, vocabulary] of a prompt and its answer."""
    whole = extend(subject.name, given, answer)
    return text_rows_alone(subject.reference, whole, visual(whole)[0], layer)


@torch.no_grad()
def test_a_later_turn(subject):
    first, largest, last, needs = allowed_exits(subject)
    given = subject.inputs([subject.prompt(3, 5)])
    length, arguments = given["input_ids"].shape[1], {"max_new_tokens": 3, "do_sample": False}
    for layer in (first, largest, last):
        with dyvte.visual_exit(subject.model, dyvte.FixedExit(layer), **needs):
            out = subject.model.generate(**given, **arguments, return_dict_in_generate=True)
            turn = torch.cat([out.sequences, torch.tensor([[11, 12, 13, 14]])], 1)
            more = extend(subject.name, given, turn[:, length:])
            more = {name: value for name, value in more.items() if value.shape == turn.shape}
            more["cache" if "cache" in out else "past_key_values"] = call_cache(out)
            out = subject.model.generate(**more, **arguments, output_logits=True, return_dict_in_generate=True)
        expected = definition(subject, given, out.sequences[:, length:-1], layer)
        torch.testing.assert_close(torch.cat(out.logits), expected[-3:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_beams(subject):
    first, largest, _, needs = allowed_exits(subject)
    given = subject.inputs([subject.prompt(3, 5)])
    for layer in (first, largest):
        with dyvte.visual_exit(subject.model, dyvte.FixedExit(layer), **needs):
            out = subject.model.generate(
                **given, max_new_tokens=4, num_beams=3, output_scores=True, return_dict_in_generate=True
            )
        answer = out.sequences[:, given["input_ids"].shape[1] :]
        likely = definition(subject, given, answer[:, :-1], layer)[-4:].log_softmax(-1)
        torch.testing.assert_close(out.sequences_scores[0], likely.gather(1, answer[0, :, None]).mean())


def test_a_trace_whose_logits_are_made_in_parts(subject, monkeypatch):
    *_, needs = allowed_exits(subject)
    given = subject.inputs([subject.prompt(3, 5), subject.prompt(1, 9)])
    whole = dyvte.trace_batch(subject.model, given, **needs)
    monkeypatch.setattr("dyvte.training.trace_pass.LOGITS_AT_ONCE", 0)
    parts = dyvte.trace_batch(subject.model, given, **needs)
    torch.testing.assert_close(parts.nll, whole.nll, equal_nan=True)
    torch.testing.assert_close(parts.state, whole.state)


def test_exits_stop_where_keys_are_read_again():
    subject = Subject("gemma4")
    _, largest, last, _ = allowed_exits(subject)
    assert (largest, last) == (2, 6)
    with pytest.raises(ValueError, match=r"3 layers are too late .* Choose 1 \.\.\. 2, or 6"):
        dyvte.attach(subject.model, dyvte.FixedExit(3))
    given = subject.inputs([subject.prompt(3, 5)])
    with dyvte.visual_exit(subject.model, dyvte.RandomExit(0.9, seed=1)) as handle, torch.no_grad():
        subject.model(**given)
    assert handle.layers.item() in (1, 2, 6)


def test_llama4_is_refused_where_it_takes_rows_for_positions():
    subject = Subject("llama4")
    given = subject.inputs([subject.prompt(3, 5)])
    length = given["input_ids"].shape[1]
    config = subject.model.config.get_text_config(decoder=True)
    with dyvte.visual_exit(subject.model, dyvte.FixedExit(2)), torch.no_grad():
        config.floor_scale = length + 1
        subject.model(**given)
        config.floor_scale = length
        with pytest.raises(ValueError, match=f"a prompt of {length} tokens is too long: beyond {length - 1}"):
            subject.model(**given)


def test_a_layer_that_runs_twice_is_refused():
    subject = Subject("llava")
    layers = subject.model.get_decoder().layers
    forward = layers[1].forward
    layers[1].forward = lambda hidden, **given: layers[2](forward(hidden, **given), **given)
    with dyvte.visual_exit(subject.model, dyvte.FixedExit(2)), torch.no_grad():
        with pytest.raises(ValueError, match="every layer runs once, in order"):
            subject.model(**subject.inputs([subject.prompt(3, 5)]))
