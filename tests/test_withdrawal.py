"""The exit equals its definition, in logits and in generated ids; what is dropped is really gone."""

from __future__ import annotations

import functools
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import (
    CACHE,
    IMAGE_ID,
    LAYERS,
    PATCHES,
    batch_of,
    greedy_by_definition,
    masked_visual_columns,
    prompt,
    tiny_llama,
    tiny_llava,
    without_image,
)
from transformers import DynamicCache, LogitsProcessor, StaticCache

import dyvte
from dyvte.runtime.cache import KeptLayer
from dyvte.runtime.compat import call_cache
from dyvte.runtime.tokens import KeptTokens

RAGGED = [prompt(3, 5, seed=1), prompt(1, 9, seed=2), prompt(6, 1, seed=3), prompt(2, 4, images=2, seed=4)]
STEPS = 6


def check_against_definition(inputs, exits, attention):
    visual = inputs["input_ids"] == IMAGE_ID
    expected_ids, expected = greedy_by_definition(tiny_llava("eager"), inputs, visual, exits, STEPS)
    model = tiny_llava(attention)
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.FixedExit(exits)) as handle:
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert handle.layers.tolist() == exits.tolist()
    assert out.sequences[:, inputs["input_ids"].shape[1] :].tolist() == expected_ids.tolist()
    for step in range(STEPS):
        torch.testing.assert_close(out.logits[step], expected[step], atol=1e-5, rtol=1e-4)
    return out


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layer", [1, 3, LAYERS - 1, LAYERS])
@pytest.mark.parametrize("images", [1, 2])
def test_one_sample_equals_definition(attention, layer, images):
    check_against_definition(batch_of(prompt(3, 5, images)), torch.tensor([layer]), attention)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("exits", [[2, 2, 2, 2], [1, 3, 5, 6], [4, 1, 4, 2], [6, 6, 3, 6], [6, 6, 6, 6]])
def test_ragged_batch_equals_definition(attention, exits):
    check_against_definition(batch_of(*RAGGED), torch.tensor(exits), attention)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_same_lengths_without_padding(attention):
    inputs = batch_of(prompt(2, 4, seed=5), prompt(4, 2, seed=6))
    inputs_exits = torch.tensor([2, 4])
    check_against_definition(inputs, inputs_exits, attention)


def test_each_sample_of_a_batch_equals_its_own_run():
    model, exits = tiny_llava(), [2, 4, 1, 6]
    inputs = batch_of(*RAGGED)
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.FixedExit(exits)):
        together = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)[:, -STEPS:]
    image = 0
    for row, (ids, layer) in enumerate(zip(RAGGED, exits)):
        alone = batch_of(ids)
        count = ids.count(IMAGE_ID) // PATCHES
        alone["pixel_values"] = inputs["pixel_values"][image : image + count]
        image += count
        with torch.no_grad(), dyvte.visual_exit(model, dyvte.FixedExit(layer)):
            single = model.generate(**alone, max_new_tokens=STEPS, do_sample=False)[:, -STEPS:]
        assert single[0].tolist() == together[row].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_forward_keeps_the_shape_and_the_text_logits(side, use_cache):
    inputs, exits = batch_of(*RAGGED, side=side), torch.tensor([2, 5, 1, 6])
    visual = inputs["input_ids"] == IMAGE_ID
    eager = tiny_llava("eager")
    with torch.no_grad(), masked_visual_columns(eager, visual, exits):
        expected = eager(**inputs, use_cache=False).logits
    model = tiny_llava()
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.FixedExit(exits)):
        logits = model(**inputs, use_cache=use_cache).logits
    assert logits.shape == expected.shape
    text = inputs["attention_mask"].bool() & ~visual
    torch.testing.assert_close(logits[text], expected[text], atol=1e-5, rtol=1e-4)


def test_the_cache_of_later_layers_holds_text_only():
    model, layer = tiny_llava(), 2
    inputs = batch_of(prompt(3, 5))
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.FixedExit(layer)):
        cache = call_cache(model(**inputs, use_cache=True))
    lengths = [kept.keys.shape[2] for kept in cache.layers]
    assert lengths == [8 + PATCHES] * layer + [8] * (LAYERS - layer)


@pytest.mark.parametrize("policy", [dyvte.NeverExit(), dyvte.FixedExit(LAYERS)])
def test_never_is_bit_equal_to_the_untouched_model(policy):
    model, inputs = tiny_llava(), batch_of(*RAGGED)
    with torch.no_grad():
        expected = model(**inputs).logits
        with dyvte.visual_exit(model, policy) as handle:
            never = model(**inputs).logits
        detached = model(**inputs).logits
    assert torch.equal(never, expected) and torch.equal(detached, expected)
    assert handle.layers.tolist() == [LAYERS] * 4


def test_hooks_go_also_after_an_exception():
    model = tiny_llava()
    with pytest.raises(RuntimeError, match="mine"), dyvte.visual_exit(model, dyvte.FixedExit(2)):
        raise RuntimeError("mine")
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
    assert "generate" not in vars(model)


def test_attach_until_detached():
    model, inputs = tiny_llava(), batch_of(prompt(3, 5))
    handle = dyvte.attach(model, dyvte.FixedExit(1))
    with torch.no_grad():
        model(**inputs)
    assert handle.layers.tolist() == [1]
    handle.detach()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_text_only_samples_never_leave():
    inputs = batch_of(prompt(3, 5), prompt(4, 7, images=0), prompt(2, 3, seed=3))
    model = tiny_llava()
    with torch.no_grad():
        dense = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
        with dyvte.visual_exit(model, dyvte.FixedExit(1)) as handle:
            out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    assert handle.layers.tolist() == [1, LAYERS, 1]
    assert out[1].tolist() == dense[1].tolist()


def test_beams_are_reordered_with_the_cache():
    """Beams with an exit equal beams over a model that follows the definition step by step."""
    inputs, exits = batch_of(*RAGGED[:2]), torch.tensor([2, 4])
    visual = (inputs["input_ids"] == IMAGE_ID).repeat_interleave(3, 0)
    arguments = {"max_new_tokens": STEPS, "num_beams": 3, "do_sample": False}
    eager = tiny_llava("eager")
    with torch.no_grad(), masked_visual_columns(eager, visual, exits.repeat_interleave(3)):
        expected = eager.generate(**inputs, use_cache=False, **arguments)
    model = tiny_llava()
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.FixedExit(exits.repeat_interleave(3))):
        out = model.generate(**inputs, **arguments)
    assert out.tolist() == expected.tolist()


def test_beams_with_exits_of_their_own_keep_their_columns():
    """One exit per row, so beams of a sample differ: what a row's cache holds moves with it."""
    inputs, exits = batch_of(*RAGGED[:2]), [1, 5, 3, 2, 6, 4]
    model = tiny_llava()
    twice = {k: v.repeat_interleave(3, 0) for k, v in inputs.items() if k != "pixel_values"}
    pixels = inputs["pixel_values"].repeat_interleave(3, 0)
    order = torch.tensor([2, 0, 0, 5, 4, 4])
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.FixedExit(exits)):
        cache = call_cache(model(**twice, pixel_values=pixels))
        cache.reorder_cache(order)
    for layer in cache.layers:
        if hasattr(layer, "tokens"):
            filled = layer.keys.abs().sum((1, 3)) > 0
            assert not (layer.tokens.valid & ~filled).any(), "a place counts as a token and holds none"
            assert torch.equal(layer.tokens.valid.sum(1), (filled & layer.tokens.valid).sum(1))


def test_interleaved_generations_keep_their_own_state():
    model = tiny_llava()
    inputs = [batch_of(prompt(3, 5, seed=1)), batch_of(prompt(5, 2, seed=2), prompt(1, 8, seed=3))]
    exits = [[2], [1, 4]]

    def step(state, policy):
        with torch.no_grad(), dyvte.visual_exit(model, policy):
            out = model(**state, use_cache=True)
        mask = torch.cat([state["attention_mask"], torch.ones(len(out.logits), 1, dtype=torch.long)], 1)
        ids = without_image(out.logits[:, -1:]).argmax(-1)
        position = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
        following = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
        return following | {CACHE: call_cache(out)}, ids

    def positions(state):
        return state | {"position_ids": (state["attention_mask"].cumsum(1) - 1).clamp(min=0)}

    apart = []
    for state, e in zip(map(positions, inputs), exits):
        ids = []
        for _ in range(4):
            state, new = step(state, dyvte.FixedExit(e))
            ids.append(new.tolist())
        apart.append(ids)
    first, second = map(positions, inputs)
    together = [[], []]
    for _ in range(4):
        first, new = step(first, dyvte.FixedExit(exits[0]))
        together[0].append(new.tolist())
        second, new = step(second, dyvte.FixedExit(exits[1]))
        together[1].append(new.tolist())
    assert together == apart


class Watched(dyvte.ExitPolicy):
    """Leaves after three layers; keeps the text states it was asked about first, at exit layer 1."""

    def __init__(self):
        self.states = []

    def leaves(self, layer, state):
        if layer == 1:
            self.states.append(state)
        return torch.full((len(state),), layer >= 3)


class GeneratesWithin(LogitsProcessor):
    def __init__(self, model, inputs, policy):
        self.model, self.inputs, self.policy = model, inputs, policy

    def __call__(self, input_ids, scores):
        asked = len(self.policy.states)
        self.model.generate(**self.inputs, max_new_tokens=1)
        del self.policy.states[asked:]
        return scores


def test_a_generation_within_a_generation_leaves_the_outer_decision_alone():
    model, inputs, policy = tiny_llava(), batch_of(prompt(3, 5)), Watched()
    within = GeneratesWithin(model, batch_of(prompt(2, 3, seed=4)), policy)
    with dyvte.visual_exit(model, policy):
        model.generate(**inputs, max_new_tokens=4, use_cache=False, logits_processor=[within])
    assert len(policy.states) == 4
    for state in policy.states:  # generated tokens have no say
        torch.testing.assert_close(state, policy.states[0], atol=1e-5, rtol=1e-4)


def test_threads_take_turns_to_generate():
    model, prompts = tiny_llava(), [batch_of(prompt(3, 5, seed=1)), batch_of(prompt(4, 4, seed=2))]
    with dyvte.visual_exit(model, dyvte.FixedExit(2)):
        alone = [model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist() for inputs in prompts]
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(model.generate, **prompts[i % 2], max_new_tokens=6, do_sample=False) for i in range(20)]
    assert [run.result().tolist() for run in runs] == alone * 10


def test_threads_take_turns_to_call():
    model, prompts = tiny_llava(), [batch_of(prompt(3, 5, seed=1)), batch_of(prompt(4, 4, seed=2))]

    @torch.no_grad()
    def call(inputs, **changes):
        return model(**inputs | changes).logits

    with dyvte.visual_exit(model, dyvte.FixedExit(2)):
        alone = [call(inputs) for inputs in prompts]
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(call, prompts[i % 2]) for i in range(60)]
            refused = pool.submit(call, prompts[0], labels=prompts[0]["input_ids"])
            later = pool.submit(call, prompts[1])
        for i, run in enumerate(runs):
            torch.testing.assert_close(run.result(), alone[i % 2], atol=1e-5, rtol=1e-4)
        assert isinstance(refused.exception(), ValueError) and torch.equal(later.result(), alone[1])


def test_an_own_generate_is_put_back():
    model = tiny_llava()
    own = functools.partial(model.generate, max_new_tokens=2)
    model.generate = own
    with dyvte.visual_exit(model, dyvte.FixedExit(2)):
        assert model.generate(**batch_of(prompt(3, 5))).shape[1] == 3 + 16 + 5 + 2
    assert model.generate is own


@pytest.mark.parametrize("exits", [[2, 2], [2, 4]])
def test_a_later_mask_may_hide_earlier_tokens(exits):
    inputs = batch_of(prompt(6, 5, seed=1), prompt(4, 3, seed=2))
    length, exits = inputs["input_ids"].shape[1], torch.tensor(exits)

    def logits(model, how):
        with torch.no_grad(), how:
            cache = call_cache(model(**inputs, use_cache=True))
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1).long()], 1)
            mask[:, : length - 2] = 0
            following = {"input_ids": torch.tensor([[5], [6]]), "position_ids": torch.full((2, 1), length)}
            return model(**following, attention_mask=mask, **{CACHE: cache}).logits

    eager, model = tiny_llava("eager"), tiny_llava()
    expected = logits(eager, masked_visual_columns(eager, inputs["input_ids"] == IMAGE_ID, exits))
    torch.testing.assert_close(
        logits(model, dyvte.visual_exit(model, dyvte.FixedExit(exits))), expected, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("mode", [{"use_cache": False}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}])
def test_a_visual_mask_of_the_prompt_serves_the_whole_generation(mode):
    model, inputs = tiny_llava(), batch_of(prompt(3, 5))
    mask = inputs["input_ids"] == IMAGE_ID
    with dyvte.visual_exit(model, dyvte.FixedExit(2)):
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False, **mode)
    with dyvte.visual_exit(model, dyvte.FixedExit(2), visual_mask=mask):
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False, **mode), expected)


def test_a_bare_decoder_with_inputs_embeds():
    exits = torch.tensor([2, 4])
    visual = torch.zeros(2, 20, dtype=torch.bool)
    visual[:, 3:14] = True
    generator = torch.Generator().manual_seed(0)
    inputs = {"inputs_embeds": torch.randn(2, 20, 32, generator=generator), "attention_mask": torch.ones(2, 20).long()}
    eager = tiny_llama("eager")
    with torch.no_grad(), masked_visual_columns(eager, visual, exits):
        expected = eager(**inputs, use_cache=False).logits[:, -1]
    model = tiny_llama()
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.FixedExit(exits), visual_mask=visual):
        out = model.generate(
            **inputs, max_new_tokens=3, output_logits=True, return_dict_in_generate=True, eos_token_id=None
        )
    torch.testing.assert_close(out.logits[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"labels": torch.zeros(1, 24, dtype=torch.long)}, "labels do not work"),
        ({CACHE: StaticCache(config=tiny_llava().config.text_config, max_cache_len=64)}, "DynamicCache"),
    ],
)
def test_calls_that_cannot_be_right_are_refused(change, match):
    model = tiny_llava()
    with dyvte.visual_exit(model, dyvte.FixedExit(2)), pytest.raises(ValueError, match=match):
        model(**batch_of(prompt(3, 5)), **change)


@pytest.mark.parametrize("change", [{"prefill_chunk_size": 8}, {"cache_implementation": "static"}])
def test_generate_modes_that_cannot_be_right_are_refused(change):
    model = tiny_llava()
    with (
        dyvte.visual_exit(model, dyvte.FixedExit(2)),
        pytest.raises(ValueError, match="does not work with visual exit"),
    ):
        model.generate(**batch_of(prompt(3, 5)), max_new_tokens=2, **change)


@pytest.mark.parametrize("layer", [0, LAYERS + 1, -1, [2, 9]])
def test_exit_layers_out_of_range(layer):
    with pytest.raises(ValueError, match="outside 1 ... 6"):
        dyvte.attach(tiny_llava(), dyvte.FixedExit(layer))


def test_a_model_without_visual_ids_needs_a_mask():
    with pytest.raises(ValueError, match="pass visual_mask"):
        dyvte.attach(tiny_llama(), dyvte.FixedExit(2))


def test_inputs_embeds_need_a_mask():
    model = tiny_llava()
    with dyvte.visual_exit(model, dyvte.FixedExit(2)), pytest.raises(ValueError, match="pass visual_mask"):
        model(inputs_embeds=torch.zeros(1, 5, 32), **{CACHE: DynamicCache()})


def test_nothing_of_a_call_outlives_it():
    model, inputs = tiny_llava(), batch_of(*RAGGED)
    pixels = weakref.ref(inputs["pixel_values"])
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.FixedExit([1, 3, 5, 6])):
        cache = weakref.ref(call_cache(model(**inputs, use_cache=True)))
        del inputs
        gc.collect()
        assert cache() is None and pixels() is None


def test_nothing_of_a_failed_call_outlives_it():
    model, inputs = tiny_llava(), batch_of(prompt(3, 5))
    pixels = weakref.ref(inputs["pixel_values"])
    other = torch.randn(1, inputs["input_ids"].shape[1], 32)
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.FixedExit(2)):
        failing = model.model.vision_tower.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        failing.remove()
        del inputs
        gc.collect()
        assert pixels() is None
        with pytest.raises(ValueError, match="pass visual_mask"):  # the ids of the failed call say nothing about these
            model.get_decoder()(inputs_embeds=other)


def test_layers_that_share_columns_go_on_sharing_them():
    """Beams reorder the cache at every step; a set of columns must not become one for each layer."""
    keep = torch.tensor([[True, False, True], [False, True, True]])
    columns = KeptTokens.from_mask(keep)
    layers = [KeptLayer(columns, 3) for _ in range(2)]
    order = torch.tensor([1, 1])
    for layer in layers:
        layer.keys, layer.values = torch.randn(2, 1, 2, 4), torch.randn(2, 1, 2, 4)
        layer.is_initialized = True
    for _ in range(2):
        for layer in layers:
            layer.reorder_cache(order)
        assert layers[0].tokens is layers[1].tokens is not columns
        assert layers[0].tokens.index.tolist() == [[1, 2], [1, 2]]
        columns, order = layers[0].tokens, order.clone()
