"""Random families, prompts, paddings, exits, schedules and ways of decoding: all equal their definition.

A handful of cases by default; ``DYVTE_FUZZ_CASES=2000 pytest tests/test_fuzz.py`` for many.
"""

from __future__ import annotations

import os

import torch
from families import FAMILIES, LAYERS, Family, takes_guesses
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from models import CACHE, masked_columns, masked_visual_columns

import dyvte
from dyvte.runtime.compat import call_cache

CASES = int(os.environ.get("DYVTE_FUZZ_CASES", "40"))
STEPS = 4
MODES = {
    "forward": {},
    "greedy": {},
    "no cache": {"use_cache": False},
    "sampling": {"do_sample": True, "temperature": 1.0, "top_k": 50},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "two turns": {},
}


@st.composite
def cases(draw):
    family: Family = FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))]
    mode = draw(st.sampled_from(sorted(MODES if takes_guesses(family) else MODES.keys() - {"prompt lookup"})))
    rows = 1 if mode == "prompt lookup" else draw(st.integers(1, 4))
    look = st.sampled_from(family.looks)
    text = st.integers(1, 12)
    prompts = []
    for _ in range(rows):
        images = draw(st.lists(st.tuples(st.integers(0, 6), look), max_size=3))
        # Beginning with an image, images side by side, no image at all: all are there.
        prompt = [piece for before, image in images for piece in ((before, image) if before else (image,))]
        prompts.append([*prompt, draw(text)])
    exits = draw(st.lists(st.integers(family.first, LAYERS), min_size=rows, max_size=rows))
    attention = draw(st.sampled_from(family.attentions))
    side = draw(st.sampled_from(["left", "right"])) if mode == "forward" else "left"
    later = [[draw(text), *([draw(look)] if family.sees_later_images() and draw(st.booleans()) else []), draw(text)]
             for _ in range(rows)]  # fmt: skip
    return family, mode, prompts, exits, attention, side, later, draw(st.integers(0, 9))


def run(model, family, mode, inputs, more, seed):
    """What is compared: ids (or None), and logits, [rows, vocabulary] each."""
    arguments = {"max_new_tokens": STEPS, "do_sample": False} | MODES[mode]
    arguments |= {"output_logits": True, "return_dict_in_generate": True}
    torch.manual_seed(seed)
    with torch.no_grad():
        if mode == "forward":
            logits = model(**inputs).logits
            return None, logits[inputs["attention_mask"].bool() & ~family.visual(inputs)]
        out = model.generate(**inputs, **arguments)
        if mode == "two turns":
            answer = out.sequences[:, -STEPS:]
            ids = torch.cat([inputs["input_ids"], answer, more["input_ids"]], 1)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(answer), more["attention_mask"]], 1)
            following = more | {"input_ids": ids, "attention_mask": mask} | family.extra_inputs(ids)
            out = model.generate(**following, **{CACHE: call_cache(out)}, **arguments)
    return out.sequences, torch.cat(out.logits)


def repetitive(inputs: dict) -> None:
    """Makes the text of two words only, so that lookups find something to propose."""
    ids = inputs["input_ids"]
    ids[(ids >= 3) & (ids < 80)] %= 2
    ids[ids < 2] += 3


def leaves(visual: torch.Tensor, exits: torch.Tensor) -> torch.Tensor:
    return torch.where(visual.any(1), exits, LAYERS)


@settings(
    max_examples=CASES, deadline=None, derandomize=CASES <= 40, print_blob=True,
    suppress_health_check=list(HealthCheck), database=None,
)  # fmt: skip
@given(cases())
def test_any_case_equals_the_definition(case):
    family, mode, prompts, exits, attention, side, later, seed = case
    event(mode)
    inputs, more = family.batch(*prompts, side=side, seed=seed), family.batch(*later, seed=seed + 1)
    if mode == "prompt lookup":
        repetitive(inputs)
    exits, visual = torch.tensor(exits), family.visual(inputs)
    rows = max(MODES[mode].get("num_beams", 1), MODES[mode].get("num_return_sequences", 1))
    answer = torch.zeros(len(visual), STEPS, dtype=torch.bool)
    whole = torch.cat([visual, answer, family.visual(more)], 1) if mode == "two turns" else visual

    def both(attention):
        eager, model = family.build("eager"), family.build(attention)
        with masked_visual_columns(eager, whole, exits):
            expected = run(eager, family, mode, inputs, more, seed)
        with dyvte.visual_exit(model, dyvte.FixedExit(exits.repeat_interleave(rows))) as handle:
            found = run(model, family, mode, inputs, more, seed)
        if mode != "two turns":
            assert handle.layers.tolist() == leaves(visual, exits).repeat_interleave(rows).tolist()
        return found, expected

    equal(both, attention)


def equal(both, attention: str) -> None:
    """Within 1e-5, ids included.

    SDPA's kernel alone may round to more than that: then eager attention has to be within 1e-5, and SDPA within 5e-5.
    """
    (ids, logits), (expected_ids, expected) = both(attention)
    tolerance = 1e-5
    if attention != "eager" and (logits - expected).abs().max() > tolerance:
        (_, eager), _ = both("eager")
        torch.testing.assert_close(eager, expected, atol=tolerance, rtol=1e-4)
        tolerance = 5e-5
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=1e-4)
    # Equal logits make equal ids, but for ties closer than the tolerance, which beams can meet.
    assert expected_ids is None or ids.tolist() == expected_ids.tolist()


class Schedule(dyvte.Reduction):
    """Any table: column c of sample b is gone from layer ``gone_from[b, c]`` on.

    Args:
        gone_from: long [samples, columns], of a conversation whose latest turn ends with its last column; a prompt that
            is longer has what was generated at its end.
    """

    def __init__(self, gone_from: torch.Tensor, first_turn: bool):
        self.gone_from, self.first_turn = gone_from, first_turn

    def select(self, view):
        table, (_, length) = self.gone_from, view.prompt.shape
        table = torch.nn.functional.pad(table, (0, max(length - table.shape[1], 0)), value=LAYERS + 1)
        table = table[:, :length] if self.first_turn else table[:, table.shape[1] - length :]
        return table[view.samples // view.prompt.copies].gather(1, view.tokens.index) > view.layer


@settings(
    max_examples=CASES, deadline=None, derandomize=CASES <= 40, print_blob=True,
    suppress_health_check=list(HealthCheck), database=None,
)  # fmt: skip
@given(cases(), st.integers(0, 2**31), st.sampled_from([0.0, 0.5]))
def test_any_schedule_equals_the_definition(case, table_seed, never):
    """Every visual column goes at a layer of its own, or never."""
    family, mode, prompts, _, attention, side, later, seed = case
    inputs, more = family.batch(*prompts, side=side, seed=seed), family.batch(*later, seed=seed + 1)
    if mode == "prompt lookup":
        repetitive(inputs)
    visual = family.visual(inputs)
    whole = visual
    if mode == "two turns":
        whole = torch.cat([visual, torch.zeros(len(visual), STEPS, dtype=torch.bool), family.visual(more)], 1)
    generator = torch.Generator().manual_seed(table_seed)
    table = torch.randint(first_drop(family), LAYERS, whole.shape, generator=generator)
    table[(torch.rand(whole.shape, generator=generator) < never) | ~whole] = LAYERS + 1
    rows = max(MODES[mode].get("num_beams", 1), MODES[mode].get("num_return_sequences", 1))

    def both(attention):
        eager, model = family.build("eager"), family.build(attention)
        with masked_columns(eager, table):
            expected = run(eager, family, mode, inputs, more, seed)
        turns = [Schedule(table[:, : visual.shape[1]], True), Schedule(table, False)]
        ids, logits, counts = run_reduced(model, turns, family, mode, inputs, more, seed)
        for layer in range(LAYERS):
            kept = (visual & (table[:, : visual.shape[1]] > layer)).sum(1)
            assert counts[layer].tolist() == kept.repeat_interleave(rows).tolist()
        return (ids, logits), expected

    equal(both, attention)


def first_drop(family: Family) -> int:
    """Columns may go before the first layer, but where the model adds features to them later on."""
    return 0 if family.first == 1 else family.first


def run_reduced(model, turns, family, mode, inputs, more, seed):
    """Like :func:`run`, each turn under a reduction of its own; also the counts of the first prompt."""
    counts = []

    def under(turn):
        return dyvte.reduce_tokens(model, turns[turn])

    if mode != "two turns":
        with under(0) as handle:
            ids, logits = run(model, family, mode, inputs, more, seed)
        return ids, logits, handle.record[0].counts
    arguments = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    torch.manual_seed(seed)
    with torch.no_grad():
        with under(0) as handle:
            out = model.generate(**inputs, **arguments)
        counts = handle.record[0].counts
        answer = out.sequences[:, -STEPS:]
        ids = torch.cat([inputs["input_ids"], answer, more["input_ids"]], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(answer), more["attention_mask"]], 1)
        following = more | {"input_ids": ids, "attention_mask": mask} | family.extra_inputs(ids)
        with under(1):
            out = model.generate(**following, **{CACHE: call_cache(out)}, **arguments)
    return out.sequences, torch.cat(out.logits), counts
