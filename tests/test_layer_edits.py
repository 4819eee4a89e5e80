"""Every edit of layers against a slow definition: an eager model whose masks, weights or neurons loops change."""

from __future__ import annotations

import itertools
import math
from contextlib import ExitStack, contextmanager

import pytest
import torch
from families import FAMILIES
from models import IMAGE_ID, LAYERS, PATCHES, batch_of, llama_config, prompt, tiny_llama, tiny_llava
from test_pruning import RAGGED, STEPS, generate, greedy
from transformers.models.llama import modeling_llama

import dyvte
from dyvte import FastV, FixedExit, edit_layers, reduce_tokens
from dyvte.methods.aki import AKI
from dyvte.methods.ima import SkipComputations
from dyvte.methods.mod import MoD
from dyvte.methods.redundancylens import HollowAttention, ProbeFFN
from dyvte.methods.yopo import FirstNeurons, HeadCut, LayerCut, NeighbourAttention

EXITS = [[LAYERS] * 4, [3, 5, 6, 4], [1, 4, 2, 6]]
NEVER = LAYERS + 1
LOWEST = torch.finfo(torch.float32).min


def decoder_layers(model):
    return model.model.language_model.layers


@contextmanager
def hooked(model, layers, hook):
    """``hook(index, layer)`` -> handles, for some layers."""
    handles = [handle for index in layers for handle in hook(index, decoder_layers(model)[index])]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def masks_changed(model, layers, length, sees):
    """``sees(sample, row, column, causal)`` says what the rows of the prompt see there."""

    changed = []

    def change(causal):
        for sample, row, column in itertools.product(*map(range, causal.shape)):
            now = bool(causal[sample, row, column])
            if sees(sample, row, column, now) != now:
                changed.append((sample, row, column, LOWEST if now else 0))

    def hook(index, layer):
        def before(module, args, kwargs):
            mask = kwargs["attention_mask"].clone()
            if not changed:  # the prompt's part is the same in all layers and at all steps
                change(mask[:, 0, :length, :length] == 0)
            for sample, row, column, value in changed:
                mask[sample, 0, row, column] = value
            return args, kwargs | {"attention_mask": mask}

        return [layer.register_forward_pre_hook(before, with_kwargs=True)]

    with hooked(model, layers, hook):
        yield


def check(edit, changes, exits, inputs, attention="sdpa"):
    """Logits and answers are those of an eager model with the changes and with masked columns from the exits on."""
    visual, exits = inputs["input_ids"] == IMAGE_ID, torch.tensor(exits)
    ends = torch.where(exits < LAYERS, exits, NEVER)[:, None]
    eager = tiny_llava("eager")
    with ExitStack() as stack:
        for change in changes(eager, visual):
            stack.enter_context(change)
        expected_ids, expected = greedy(eager, inputs, torch.where(visual, ends, NEVER))
    model = tiny_llava(attention)
    dense = generate(model, inputs, output_logits=True, return_dict_in_generate=True)
    method = edit if bool((exits == LAYERS).all()) else edit & FixedExit(exits.tolist())
    with reduce_tokens(model, method) as handle:
        out = generate(model, inputs, output_logits=True, return_dict_in_generate=True)
    assert out.sequences[:, -STEPS:].tolist() == expected_ids.tolist()
    for step in range(STEPS):
        torch.testing.assert_close(out.logits[step], expected[step], atol=1e-5, rtol=1e-4)
    assert handle.layers.tolist() == exits.tolist()
    assert not torch.allclose(out.logits[0], dense.logits[0], atol=1e-3)  # it does change something
    again = generate(model, inputs, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(again.logits[0], dense.logits[0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("layers, window", [((0, 2, 3), 3), (None, 0)])
def test_hollow_attention(layers, window, exits, attention):
    inputs = batch_of(*RAGGED)

    def changes(model, visual):
        def sees(sample, row, column, causal):
            both = bool(visual[sample, row] and visual[sample, column])
            return causal and not (both and int(visual[sample, column:row].sum()) > window)

        yield masks_changed(model, layers or range(LAYERS), visual.shape[1], sees)

    check(HollowAttention(layers, window), changes, exits, inputs, attention)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("exits", EXITS)
def test_modality_mutual_attention(exits, attention):
    inputs = batch_of(*RAGGED)

    def changes(model, visual):
        def sees(sample, row, column, causal):
            last = max(visual[sample].nonzero().flatten().tolist())
            return causal or bool(visual[sample, row] and column > last)

        yield masks_changed(model, range(LAYERS), visual.shape[1], sees)

    check(AKI(), changes, exits, inputs, attention)


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("causal_only", [False, True])
def test_neighbour_attention(causal_only, exits):
    inputs, side = batch_of(*RAGGED), 4

    def changes(model, visual):
        def sees(sample, row, column, causal):
            if not (visual[sample, row] and visual[sample, column]):
                return causal
            a, b = int(visual[sample, :row].sum()), int(visual[sample, :column].sum())
            if a // PATCHES != b // PATCHES or (causal_only and column > row):
                return False
            (r, c), (s, d) = divmod(a % PATCHES, side), divmod(b % PATCHES, side)
            return max(abs(r - s), abs(c - d)) <= 1

        yield masks_changed(model, (1, 4), visual.shape[1], sees)

    check(NeighbourAttention((side, side), 3, causal_only, layers=(1, 4)), changes, exits, inputs)


@contextmanager
def weights_changed(change):
    """``change(layer, weights [n, heads, q, s]) -> weights`` after the softmax of the text model; outputs likewise."""
    original = modeling_llama.eager_attention_forward

    def attend(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
        groups = module.num_key_value_groups
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        weights = (query @ key.transpose(2, 3) * scaling + mask).softmax(-1)
        weights, rows = change(module.layer_idx, weights)
        out = (weights @ value).masked_fill(rows, 0)
        return out.transpose(1, 2).contiguous(), weights

    modeling_llama.eager_attention_forward = attend
    try:
        yield
    finally:
        modeling_llama.eager_attention_forward = original


def cut_weights(keep, cut_from, visual, outputs=True):
    """Weights of cut heads on visual columns are zero; where ``outputs``, visual rows get nothing from them."""

    def change(layer, weights):
        columns = torch.zeros(len(visual), weights.shape[-1], dtype=torch.bool)
        columns[:, : visual.shape[1]] = visual
        cut = ~keep[layer]
        rows = (columns[:, None, :, None] & cut[None, :, None, None]) & outputs
        if layer >= cut_from:
            cut = torch.ones_like(cut)
        return weights.masked_fill(columns[:, None, None, :] & cut[None, :, None, None], 0), rows

    return weights_changed(change)


HEADS = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("exits", EXITS)
def test_head_cut(exits, attention):
    inputs = batch_of(*RAGGED)
    check(HeadCut(HEADS), lambda model, visual: [cut_weights(HEADS, NEVER, visual)], exits, inputs, attention)


@pytest.mark.parametrize("exits", EXITS[:2])
def test_layer_cut(exits):
    inputs, whole = batch_of(*RAGGED), torch.ones_like(HEADS)
    check(LayerCut(2), lambda model, visual: [cut_weights(whole, 2, visual)], exits, inputs)
    both = HeadCut(HEADS) & LayerCut(4)
    check(both, lambda model, visual: [cut_weights(HEADS, 4, visual)], exits, inputs)


def neurons_changed(model, layers, visual, chosen):
    """``chosen(sample, states, mlp)`` -> the neurons that the visual rows of a prompt use."""

    def hook(index, layer):
        mlp = layer.mlp

        def after(module, args, output):
            states, out = args[0], output.clone()
            for sample in range(len(visual)):
                kept = chosen(sample, states[sample], mlp)
                for column in visual[sample].nonzero().flatten().tolist():
                    x = states[sample, column]
                    h = mlp.act_fn(mlp.gate_proj.weight @ x) * (mlp.up_proj.weight @ x)
                    other = torch.ones_like(h, dtype=torch.bool)
                    other[kept] = False
                    out[sample, column] = mlp.down_proj.weight @ h.masked_fill(other, 0)
            return out

        return [mlp.register_forward_hook(after)]

    return hooked(model, layers, hook)


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("probe, keep", [(0.3, 0.2), (0.1, 0.5)])
def test_probe_ffn(probe, keep, exits):
    inputs, layers = batch_of(*RAGGED), (0, 1, 3)

    def changes(model, visual):
        def chosen(sample, states, mlp):
            places = visual[sample].nonzero().flatten().tolist()
            count = max(int(probe * len(places) + 0.5), 1)
            asked = states[[places[i * len(places) // count] for i in range(count)]]
            h = (mlp.act_fn(asked @ mlp.gate_proj.weight.T) * (asked @ mlp.up_proj.weight.T)).abs().mean(0)
            return h.topk(int(keep * len(h) + 0.5)).indices

        yield neurons_changed(model, layers, visual, chosen)

    check(ProbeFFN(layers, probe, keep), changes, exits, inputs)


@pytest.mark.parametrize("exits", EXITS)
def test_first_neurons(exits):
    inputs = batch_of(*RAGGED)

    def changes(model, visual):
        yield neurons_changed(model, range(LAYERS), visual, lambda sample, states, mlp: torch.arange(24))

    check(FirstNeurons(2), changes, exits, inputs)


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("rows", ["visual", "prompt", "all"])
@pytest.mark.parametrize("part", ["ffn", "attention", "block"])
def test_skipped_computations(part, rows, exits):
    inputs, layers = batch_of(*RAGGED), (1, 3, 4)

    def changes(model, visual):
        length = visual.shape[1]

        def hook(index, layer):
            def after(module, args, output):
                out = (output[0] if isinstance(output, tuple) else output).clone()
                if rows == "visual":
                    out[:, :length][visual] = 0
                else:
                    out[:, : length if rows == "prompt" else None] = 0
                return (out, *output[1:]) if isinstance(output, tuple) else out

            modules = {"ffn": [layer.mlp], "attention": [layer.self_attn], "block": [layer.mlp, layer.self_attn]}
            return [module.register_forward_hook(after) for module in modules[part]]

        yield hooked(model, layers, hook)

    check(SkipComputations(layers, part, rows), changes, exits, inputs)


@contextmanager
def bypassed(model, layers, length, visual, score, share, weighted):
    """Tokens that are not routed keep their state in a layer, and nothing sees them there."""
    routes = {}

    def hook(index, layer):
        def before(module, args, kwargs):
            states, mask = args[0], kwargs["attention_mask"].clone()
            chosen = torch.ones(states.shape[:2], dtype=torch.bool)
            for sample, own in enumerate(visual):
                for frame in own.nonzero().flatten().split(PATCHES):
                    scores = score(states[sample, frame]).tolist()
                    order = sorted(range(len(frame)), key=lambda i: (-scores[i], i))
                    chosen[sample, frame[order[max(int(share * len(frame) + 0.5), 1) :]]] = False
            routes[index] = chosen, states
            mask.masked_fill_(~chosen[:, None, None, :] & ~torch.eye(len(chosen[0])).bool(), LOWEST)
            return args, kwargs | {"attention_mask": mask}

        def after(module, args, output):
            (chosen, states), out = routes[index], output.clone()
            if weighted:
                factor = torch.ones(states.shape[:2])
                factor[:, :length] = score(states[:, :length]).where(visual, 1)
                out = states + factor[..., None] * (out - states)
            return torch.where(chosen[..., None], out, states)

        return [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]

    with hooked(model, layers, hook):
        yield


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("share, weighted", [(0.2, False), (0.5, True)])
def test_tokens_that_bypass_layers(share, weighted, exits):
    inputs, layers = batch_of(*RAGGED), (0, 2, 3)
    router = torch.randn(32, generator=torch.Generator().manual_seed(0))

    def score(states):
        return states @ router

    def changes(model, visual):
        yield bypassed(model, layers, visual.shape[1], visual, score, share, weighted)

    method = MoD(layers, score, share, weighted)
    check(method, changes, exits, inputs)
    model = tiny_llava()
    with torch.no_grad(), reduce_tokens(model, method) as handle:
        cache = model(**inputs, use_cache=True).past_key_values
    images, length = torch.tensor([1, 1, 1, 2]), inputs["input_ids"].shape[1]
    per_frame = int(share * PATCHES + 0.5)
    for layer in range(LAYERS):
        tokens = per_frame if layer in layers else PATCHES
        assert handle.counts[layer].tolist() == (images * tokens).tolist()
        assert layer not in layers or cache.layers[layer].keys.shape[2] < length


def test_edits_add_up_with_pruning():
    """What a pruning reads is the attention of the edited layer, and what an edit counts is what the pruning left."""
    inputs, rule = batch_of(*RAGGED), FastV(3, 0.5)
    visual = inputs["input_ids"] == IMAGE_ID
    length, eager, gone = visual.shape[1], tiny_llava("eager"), torch.full(visual.shape, NEVER)

    def sees(left):
        def inner(sample, row, column, causal):
            both = bool(left[sample, row] and left[sample, column])
            return causal and not (both and int(left[sample, column:row].sum()) > 2)

        return inner

    with masks_changed(eager, (0, 1, 2), length, sees(visual)), torch.no_grad():
        maps = eager(**inputs, output_attentions=True, use_cache=False).attentions[2][:, :, -1].mean(1)
        for sample in range(4):
            columns = visual[sample].nonzero().flatten()
            order = maps[sample, columns].argsort(descending=True, stable=True)
            gone[sample, columns[order[len(columns) // 2 :]]] = 3
        with masks_changed(eager, (3, 4, 5), length, sees(visual & (gone > 3))):
            expected_ids, expected = greedy(eager, inputs, gone)
    for method in (HollowAttention(None, 2) & rule, rule & HollowAttention(None, 2)):
        with reduce_tokens(tiny_llava(), method) as handle:
            out = generate(handle.spec.model, inputs, output_logits=True, return_dict_in_generate=True)
        assert out.sequences[:, -STEPS:].tolist() == expected_ids.tolist()
        torch.testing.assert_close(out.logits, tuple(expected), atol=1e-5, rtol=1e-4)


def test_neurons_left_out_are_not_computed():
    from torch.utils.flop_counter import FlopCounterMode

    config, ids = llama_config(), batch_of(prompt(3, 5))["input_ids"]
    model, visual = tiny_llama(), ids == IMAGE_ID
    embeds = torch.randn(1, 24, 32)

    def flops(method):
        with (
            torch.no_grad(),
            reduce_tokens(model, method, visual_mask=visual),
            FlopCounterMode(display=False) as counter,
        ):
            model.model(inputs_embeds=embeds)
        return counter.get_total_flops()

    dense, per_neuron = flops(dyvte.NeverExit()), 2 * 3 * 32
    assert dense - flops(FirstNeurons(2, layers=[1])) == PATCHES * per_neuron * config.intermediate_size // 2
    assert dense - flops(SkipComputations([1, 2])) == 2 * PATCHES * per_neuron * config.intermediate_size
    probes = math.floor(0.25 * PATCHES + 0.5)
    saved = PATCHES * per_neuron * (config.intermediate_size - 12) - probes * 2 * 2 * 32 * config.intermediate_size
    assert dense - flops(ProbeFFN([1], 0.25, 0.25)) == saved


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "internvl", "mistral3_sliding"])
def test_families_bear_edits(name):
    family = FAMILIES[name]
    inputs = family.batch([3, "image", 5], [1, "image", 9], [2, "image", 4, "image", 6])
    heads = torch.ones(len(dyvte.runtime.decoder.find_decoder(family.build()).layers), 4, dtype=torch.bool)
    heads[2, :2] = False
    edits = [HollowAttention([2], 0), ProbeFFN([3]), HeadCut(heads), SkipComputations([1], "block"), AKI([4])]
    with torch.no_grad():
        found = []
        for attention in family.attentions:
            with edit_layers(family.build(attention), *edits) as handle:
                found.append(family.build(attention)(**inputs).logits)
            assert handle.counts is not None
        text = inputs["attention_mask"].bool() & ~family.visual(inputs)
        for logits in found[1:]:
            torch.testing.assert_close(logits[text], found[0][text], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: HollowAttention((1,), -1), "number of visual tokens"),
        (lambda: edit_layers(tiny_llava()), "at least one edit"),
        (
            lambda: dyvte.attach(tiny_llava(), HollowAttention((6,), 3)),
            "edits layer 6, but the model has layers 0 ... 5",
        ),
        (lambda: dyvte.attach(tiny_llava(), HeadCut(HEADS[:4])), "does not fit 6 layers of 4 heads"),
        (lambda: dyvte.attach(tiny_llava(), HeadCut(torch.eye(6, 4).bool())), "kept or cut together"),
        (lambda: HeadCut(torch.ones(6, 4)), "mask must be bool"),
        (lambda: dyvte.attach(tiny_llava(), LayerCut(6)), "outside 0 ... 5"),
        (lambda: FirstNeurons(0.5), "1 or more"),
        (lambda: dyvte.attach(FAMILIES["qwen3_vl"].build(), MoD([1], torch.sum)), "cannot bypass layer 1"),
        (lambda: ProbeFFN(None, 2), "share"),
        (lambda: SkipComputations([1], "mlp"), "part must be"),
    ],
)
def test_bad_settings(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    "other, match", [(FastV(3), "reads the attention of layer 2"), (MoD([2], torch.sum), "two methods choose")]
)
def test_what_does_not_go_with_a_bypass_is_refused(other, match):
    model = tiny_llava()
    with pytest.raises(ValueError, match=match), reduce_tokens(model, MoD([1, 2], lambda x: x[..., 0]) & other):
        model(**batch_of(*RAGGED))


def test_a_grid_that_images_do_not_fill_is_refused():
    model = tiny_llava()
    with pytest.raises(ValueError, match="grids of 3 x 3"), edit_layers(model, NeighbourAttention((3, 3))):
        model(**batch_of(*RAGGED))


def test_the_model_is_left_as_it_was():
    model = tiny_llava()
    with edit_layers(
        model, HollowAttention(None, 2), ProbeFFN(None), HeadCut(HEADS), SkipComputations([1], "attention")
    ):
        pass
    for module in model.modules():
        assert "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks
