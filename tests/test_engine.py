"""What the engine tells of its work, what belongs to whom, and what it refuses to do without knowing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import IMAGE_ID, LAYERS, PATCHES, batch_of, llama_config, masked_columns, prompt, tiny_llama, tiny_llava
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

import dyvte
from dyvte import FastV, FixedExit, RandomExit, RandomPruning, reduce_tokens

RAGGED = [prompt(3, 5, seed=1), prompt(1, 9, seed=2), prompt(6, 1, seed=3), prompt(2, 4, images=2, seed=4)]


@torch.no_grad()
def logits_of(model, inputs, **more):
    return model(**inputs, **more).logits


# What a handle tells.


def test_counts_and_kept_tokens_of_every_layer():
    model, inputs = tiny_llava(), batch_of(*RAGGED)
    visual, valid = inputs["input_ids"] == IMAGE_ID, inputs["attention_mask"].bool()
    with reduce_tokens(model, FixedExit([1, 3, 5, 6])) as handle:
        assert handle.layers is None and handle.counts is None and handle.record == []
        with pytest.raises(ValueError, match="no prompt has been run yet"):
            handle.kept(0)
        logits_of(model, inputs)
    assert handle.layers.tolist() == [1, 3, 5, 6]
    tokens = torch.tensor([PATCHES, PATCHES, PATCHES, 2 * PATCHES])
    for layer in range(LAYERS):
        sees = handle.layers > layer
        assert handle.counts[layer].tolist() == (tokens * sees).tolist()
        assert torch.equal(handle.kept(layer), valid & (~visual | sees[:, None]))
    with pytest.raises(ValueError, match="layer 6 is outside 0 ... 5"):
        handle.kept(6)


def test_one_record_for_each_batch_of_prompts():
    model, short, long = tiny_llava(), batch_of(RAGGED[0]), batch_of(*RAGGED[1:3])
    with reduce_tokens(model, FixedExit(2)) as handle:
        model.generate(**short, max_new_tokens=3, do_sample=False)
        model.generate(**long, max_new_tokens=3, do_sample=False)
    first, second = handle.record
    assert first.layers.tolist() == [2] and second.layers.tolist() == [2, 2]
    assert second.visual.tolist() == [PATCHES] * 2 and second.text.tolist() == [10, 7]
    assert second.cached[:, 0].tolist() == [26] * 2 + [10] * 4 and second.cached[:, 1].tolist() == [23] * 2 + [7] * 4
    assert second.width.tolist() == [26] * 2 + [10] * 4  # the shorter one is padded to the longer


def test_what_a_handle_tells_belongs_to_the_thread_that_called():
    model, prompts = tiny_llava(), [batch_of(*RAGGED[:1]), batch_of(*RAGGED[:3])]
    with reduce_tokens(model, FixedExit(2)) as handle, ThreadPoolExecutor(2) as pool:

        def call(inputs):
            for _ in range(5):
                logits_of(model, inputs)
            return handle.layers.tolist(), len(handle.record), handle.kept(0).shape

        runs = [pool.submit(call, inputs) for inputs in prompts]
        told = [run.result() for run in runs]
        assert handle.layers is None
    assert [layers for layers, _, _ in told] == [[2], [2, 2, 2]]
    assert {shape for _, _, shape in told} == {(1, 24), (3, 26)}


# Draws belong to the sample.


@pytest.mark.parametrize("method", [RandomExit(0.3, seed=5), RandomPruning(2, 0.4, seed=5)], ids=["exit", "pruning"])
def test_random_draws_are_those_of_the_prompt(method):
    """Whatever was drawn before, in whatever batch, and at every step of a generation without a cache."""
    model, inputs = tiny_llava(), batch_of(*RAGGED[:3])

    def drawn(inputs):
        with reduce_tokens(model, method) as handle:
            logits_of(model, inputs)
        kept, visual = handle.kept(3), inputs["input_ids"] == IMAGE_ID
        return handle.counts.T.tolist(), [row[own] for row, own in zip(kept, visual)]

    counts, kept = drawn(inputs)
    again, _ = drawn(inputs)
    assert counts == again and len({str(row) for row in counts}) + len({str(k.tolist()) for k in kept}) > 2
    for row in range(3):
        alone = batch_of(RAGGED[row]) | {"pixel_values": inputs["pixel_values"][row : row + 1]}
        own_counts, own_kept = drawn(alone)
        assert own_counts == [counts[row]] and torch.equal(own_kept[0], kept[row])
    with reduce_tokens(model, method) as handle:
        model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
    assert len(handle.record) == 4
    assert all(record.counts.T.tolist() == counts for record in handle.record)


def test_draws_may_be_keyed_by_sample():
    model, twice = tiny_llava(), batch_of(RAGGED[0], RAGGED[0])
    exits = []
    for keys in (["a", "b"], ["b", "a"], ["a", "a"]):
        with reduce_tokens(model, RandomExit(0.3, seed=2).keyed(keys)) as handle:
            logits_of(model, twice)
        exits.append(handle.layers.tolist())
    assert exits[0] == exits[1][::-1] and exits[2] == [exits[0][0]] * 2 and exits[0][0] != exits[0][1]
    with (
        reduce_tokens(model, RandomExit(0.3).keyed(["a"])),
        pytest.raises(ValueError, match="keyed to 1 samples, but 2"),
    ):
        logits_of(model, twice)


# Merging and combining.


class MeanOfPairs(dyvte.Reduction):
    """Merges neighbouring visual tokens: the second of each pair goes, the first becomes their mean."""

    layers = (2,)

    def select(self, view):
        return view.visual.cumsum(1) % 2 == 1

    def update(self, view, keep):
        mean = (view.hidden + view.hidden.roll(-1, 1)) / 2
        return torch.where((keep & view.visual)[..., None], mean, view.hidden)


def test_states_of_kept_tokens_may_be_replaced():
    inputs, eager = batch_of(*RAGGED[:2]), tiny_llava("eager")
    visual = inputs["input_ids"] == IMAGE_ID
    second = visual & (visual.cumsum(1) % 2 == 0)

    def merge(module, args, kwargs):
        mean = (args[0] + args[0].roll(-1, 1)) / 2
        return (torch.where((visual & ~second)[..., None], mean, args[0]),), kwargs

    hook = eager.get_decoder().layers[2].register_forward_pre_hook(merge, with_kwargs=True)
    with masked_columns(eager, torch.where(second, 2, LAYERS + 1)):
        expected = logits_of(eager, inputs)[:, -1]
    hook.remove()
    model = tiny_llava()
    with reduce_tokens(model, MeanOfPairs()) as handle:
        torch.testing.assert_close(logits_of(model, inputs)[:, -1], expected, atol=1e-5, rtol=1e-4)
    assert handle.counts[:, 0].tolist() == [16] * 2 + [8] * 4


def test_what_either_of_two_reductions_drops_is_dropped():
    model, inputs = tiny_llava(), batch_of(*RAGGED)
    both = FastV(2, 0.5) & RandomPruning(2, 0.5) & FixedExit([6, 4, 3, 1])
    kept = []
    for method in (FastV(2, 0.5), RandomPruning(2, 0.5), both):
        with reduce_tokens(model, method) as handle:
            logits_of(model, inputs)
        kept.append(handle.kept(2))
    visual = inputs["input_ids"] == IMAGE_ID
    gone = torch.tensor([False, False, False, True])[:, None] & visual
    assert torch.equal(kept[2], kept[0] & kept[1] & ~gone)
    assert handle.layers.tolist() == [6, 4, 3, 1]


# States that mean nothing.


@pytest.mark.parametrize("what", ["heads", "fixed", "trace"])
def test_states_that_are_not_finite_are_an_error_that_names_the_sample(what):
    model, inputs = tiny_llava(), batch_of(*RAGGED)

    class Asks(dyvte.ExitPolicy):
        def leaves(self, layer, state):
            return torch.zeros(len(state), dtype=torch.bool)

    def overflow(module, args, output):
        output = output.clone()
        output[1] = float("nan")
        return output

    inside = model.get_decoder().layers[1].mlp
    if what == "trace":
        inside.register_forward_hook(overflow)
        with pytest.raises(
            ValueError, match=r"samples \[1\] have .* not finite|samples \[1\] have logits that are NaN"
        ):
            dyvte.trace_batch(model, inputs)
        return
    policy = Asks() if what == "heads" else FixedExit(5)
    with reduce_tokens(model, policy):
        inside.register_forward_hook(overflow)
        with pytest.raises(ValueError, match=r"samples \[1\] have states that are not finite"):
            logits_of(model, inputs)


# What is not known is refused.


class Wants(nn.Module):
    """A decoder layer that is given something more."""

    def __init__(self, layer, extra):
        super().__init__()
        self.layer, self.extra = layer, extra

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, surprise=None, **kwargs):
        return self.layer(
            hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
        )


def with_layers(change):
    model = tiny_llama()
    for index in range(1, LAYERS):
        model.model.layers[index] = change(model.model.layers[index])
    visual = torch.zeros(2, 20, dtype=torch.bool)
    visual[:, 3:14] = True
    return model, {"inputs_embeds": torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))}, visual


def test_an_unknown_argument_with_columns_is_refused():
    model, inputs, visual = with_layers(lambda layer: Wants(layer, None))
    for layer in model.model.layers[1:]:
        layer.register_forward_pre_hook(lambda m, a, k: (a, k | {"surprise": torch.zeros(2, 20)}), with_kwargs=True)
    with (
        reduce_tokens(model, FixedExit(3), visual_mask=visual),
        pytest.raises(ValueError, match="'surprise'.*not known"),
    ):
        logits_of(model, inputs)
    with reduce_tokens(model, dyvte.NeverExit(), visual_mask=visual):
        logits_of(model, inputs)


class Forgets(LlamaAttention):
    """Keeps keys in a place of its own."""

    def forward(self, *args, past_key_values=None, cache=None, **kwargs):
        return super().forward(*args, **kwargs)


def test_a_layer_that_does_not_write_its_cache_is_refused():
    model = tiny_llama()
    for index, layer in enumerate(model.model.layers):
        own, layer.self_attn = layer.self_attn, Forgets(llama_config(), index)
        layer.self_attn.config = own.config
        layer.self_attn.load_state_dict(own.state_dict())
    _, inputs, visual = with_layers(lambda layer: layer)
    with (
        reduce_tokens(model, FixedExit(3), visual_mask=visual),
        pytest.raises(ValueError, match="layer 3 ran without writing its cache"),
    ):
        logits_of(model, inputs, use_cache=True)


def test_a_model_that_changes_states_between_layers_is_refused():
    model, inputs, visual = with_layers(lambda layer: layer)
    model.model.layers[4].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    with (
        reduce_tokens(model, FixedExit(3), visual_mask=visual),
        pytest.raises(ValueError, match="changes the hidden states before decoder layer 4"),
    ):
        logits_of(model, inputs)
    with reduce_tokens(model, FixedExit(5), visual_mask=visual):
        logits_of(model, inputs)


def test_continuous_batching_is_refused_at_once():
    model = tiny_llama()
    with reduce_tokens(model, FixedExit(2), visual_mask=torch.ones(1, 1, dtype=torch.bool)):
        with pytest.raises(ValueError, match="continuous batching does not work with visual exit"):
            model.generate_batch(inputs=[[5, 6, 7]])
    assert "generate_batch" not in vars(model)


def test_forward_called_directly_is_seen():
    model, inputs = tiny_llava(), batch_of(*RAGGED)
    with torch.no_grad(), reduce_tokens(model, FixedExit(2)) as handle:
        direct = model.forward(**inputs).logits
        assert handle.layers.tolist() == [2] * 4
        assert torch.equal(direct, model(**inputs).logits)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("exits", [[2, 2, 2], [1, 6, 3]])
@pytest.mark.parametrize("masked", [True, False])
def test_prompts_that_end_in_padding(exits, masked):
    """``generate`` reads the next token at the last column, also where that is padding."""
    from models import masked_visual_columns

    inputs = batch_of(*RAGGED[:3], side="right")
    if not masked:  # transformers then finds the padding by its id
        inputs.pop("attention_mask")
    eager, model = tiny_llava("eager"), tiny_llava()
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with masked_visual_columns(eager, inputs["input_ids"] == IMAGE_ID, torch.tensor(exits)):
        expected = eager.generate(**inputs, **settings)
    with reduce_tokens(model, FixedExit(exits)):
        out = model.generate(**inputs, **settings)
    assert out.sequences.tolist() == expected.sequences.tolist()
    for got, want in zip(out.logits, expected.logits):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
