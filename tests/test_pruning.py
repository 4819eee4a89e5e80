"""Pruning equals its definition, alone and with an exit; what is dropped is really gone."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES
from models import (
    CACHE,
    IMAGE_ID,
    LAYERS,
    PATCHES,
    batch_of,
    llama_config,
    masked_columns,
    prompt,
    tiny_llama,
    tiny_llava,
    without_image,
)

import dyvte
from dyvte import FastV, RandomPruning, reduce_tokens
from dyvte.evaluation.costs import attention_flops, layer_flops, pass_flops
from dyvte.runtime.compat import call_cache
from dyvte.runtime.locate import find_decoder

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
RAGGED = [prompt(3, 5, seed=1), prompt(1, 9, seed=2), prompt(6, 1, seed=3), prompt(2, 4, images=2, seed=4)]
STEPS = 5


def kept_columns(rule: FastV | RandomPruning, model, inputs, visual: torch.Tensor) -> torch.Tensor:
    """bool [batch, sequence], which visual tokens the rule keeps, from the full maps of an eager model."""
    if isinstance(rule, RandomPruning):  # any tokens are right, as long as their number is
        with torch.no_grad(), reduce_tokens(model, rule) as handle:
            model(**inputs)
        kept = handle.kept(rule.layer) & visual
        assert kept.sum(1).tolist() == [rule.count(n, rule.layer) for n in visual.sum(1).tolist()]
        return kept
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True, use_cache=False).attentions
    scores = maps[rule.layer - 1][:, :, -1].mean(1)  # left padding: the last column is the last prompt token
    kept = torch.zeros_like(visual)
    for row, own, score in zip(kept, visual, scores):
        columns = own.nonzero().flatten()
        best = score[columns].argsort(descending=True, stable=True)  # windows hide some: equal scores, the first wins
        row[columns[best[: rule.count(len(columns), rule.layer)]]] = True
    return kept


def definition(rule: FastV | RandomPruning, exits: torch.Tensor, inputs, visual: torch.Tensor, model):
    """When each column goes: kept ones at the exit, others at the layer of the rule, whichever comes first."""
    kept = kept_columns(rule, model, inputs, visual)
    end = exits[:, None].where(kept, exits[:, None].clamp(max=rule.layer))
    return end.where(visual, LAYERS + 1), kept


@torch.no_grad()
def greedy(model, inputs, gone_from, steps=STEPS):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    chosen, logits = [], []
    with masked_columns(model, gone_from):
        for _ in range(steps):
            position = (mask.cumsum(1) - 1).clamp(min=0)
            given = inputs | {"input_ids": ids, "attention_mask": mask, "position_ids": position}
            logits.append(model(**given, use_cache=False).logits[:, -1])
            chosen.append(without_image(logits[-1]).argmax(-1))
            ids = torch.cat([ids, chosen[-1][:, None]], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.stack(chosen, 1), logits


def generate(model, inputs, **more):
    settings = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": [IMAGE_ID]} | more
    with torch.no_grad():
        return model.generate(**inputs, **settings)


def check(rule, policy, exits, inputs, attention):
    visual, exits = inputs["input_ids"] == IMAGE_ID, torch.tensor(exits)
    gone_from, kept = definition(rule, exits, inputs, visual, tiny_llava("eager"))
    expected_ids, expected = greedy(tiny_llava("eager"), inputs, gone_from)
    model = tiny_llava(attention)
    with reduce_tokens(model, rule if policy is None else rule & policy) as handle:
        out = generate(model, inputs, output_logits=True, return_dict_in_generate=True)
    assert out.sequences[:, inputs["input_ids"].shape[1] :].tolist() == expected_ids.tolist()
    for step in range(STEPS):
        torch.testing.assert_close(out.logits[step], expected[step], atol=1e-5, rtol=1e-4)
    assert handle.layers.tolist() == exits.tolist()
    stayed = exits > rule.layer
    assert handle.counts[rule.layer][stayed].tolist() == kept.sum(1)[stayed].tolist()
    return out


RULES = [FastV(2, 0.5), FastV(1, 0.1), FastV(4, 0.8), RandomPruning(2, 0.5, seed=3), RandomPruning(3, 0.3)]


def name(rule) -> str:
    return f"{type(rule).__name__}-{rule.layer}-{rule.keep}"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("rule", RULES, ids=name)
def test_a_ragged_batch_equals_the_definition(rule, attention):
    check(rule, None, [LAYERS] * 4, batch_of(*RAGGED), attention)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_one_sample_equals_the_definition(attention):
    out = check(FastV(2, 0.25), None, [LAYERS], batch_of(prompt(3, 5)), attention)
    lengths = [layer.keys.shape[2] for layer in call_cache(out).layers]
    new = STEPS - 1
    assert lengths == [8 + PATCHES + new] * 2 + [8 + 4 + new] * (LAYERS - 2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("exits", [[4, 4, 4, 4], [3, 5, 6, 4], [1, 4, 2, 6], [2, 2, 2, 2], [1, 1, 1, 1], [3, 1, 1, 3]])
@pytest.mark.parametrize("kind", [FastV, RandomPruning])
def test_with_an_exit_it_equals_the_definition(kind, exits, attention):
    check(kind(2, 0.4), dyvte.FixedExit(exits), exits, batch_of(*RAGGED), attention)


class Reads(dyvte.ExitPolicy):
    """Leaves where the state says so, like exit heads; notes what it was asked."""

    def __init__(self):
        self.asked = []

    def plan(self, batch_size, num_layers):
        return None

    def leaves(self, layer, state):
        self.asked.append((layer, len(state)))
        return state[:, 0] * (layer + 1) > 1.0


def test_an_exit_that_reads_the_state():
    """State and exits are those of the masked definition, in which the exit is asked after every layer."""
    inputs, model, policy = batch_of(*RAGGED), tiny_llava(), Reads()
    with reduce_tokens(model, FastV(2, 0.4) & policy) as handle:
        generate(model, inputs)
    exits = handle.layers.tolist()
    assert len(set(exits)) > 1 and policy.asked[0] == (1, 4)
    assert [layer for layer, _ in policy.asked] == list(range(1, LAYERS))
    assert [n for _, n in policy.asked] == [sum(e >= layer for e in exits) for layer in range(1, LAYERS)]
    check(FastV(2, 0.4), Reads(), exits, inputs, "sdpa")


def test_each_sample_of_a_batch_equals_its_own_run():
    model, inputs, rule = tiny_llava(), batch_of(*RAGGED), FastV(2, 0.4)
    with reduce_tokens(model, rule):
        together = generate(model, inputs)[:, -STEPS:]
    image = 0
    for row, ids in enumerate(RAGGED):
        alone, count = batch_of(ids), ids.count(IMAGE_ID) // PATCHES
        alone["pixel_values"] = inputs["pixel_values"][image : image + count]
        image += count
        with reduce_tokens(model, rule):
            assert generate(model, alone)[0, -STEPS:].tolist() == together[row].tolist()


def test_random_draws_do_not_depend_on_the_batch():
    model = tiny_llava()
    inputs = batch_of(*RAGGED[:2])
    with reduce_tokens(model, RandomPruning(2, 0.5, seed=7)):
        together = generate(model, inputs)[:, -STEPS:]
    rule = RandomPruning(2, 0.5, seed=7)
    for row in range(2):
        alone = batch_of(RAGGED[row]) | {"pixel_values": inputs["pixel_values"][row : row + 1]}
        with reduce_tokens(model, rule):
            assert generate(model, alone)[0, -STEPS:].tolist() == together[row].tolist()


@pytest.mark.parametrize("kind", [FastV, RandomPruning])
def test_keeping_all_is_bit_equal_to_dense(kind):
    model, inputs = tiny_llava(), batch_of(*RAGGED)
    with torch.no_grad():
        dense = model(**inputs).logits
        with reduce_tokens(model, kind(2, 1.0)) as handle:
            assert torch.equal(model(**inputs).logits, dense)
        assert torch.equal(model(**inputs).logits, dense)
    assert handle.layers.tolist() == [LAYERS] * 4
    assert handle.counts[-1].tolist() == [PATCHES] * 3 + [2 * PATCHES]


@pytest.mark.parametrize("kind", [FastV, RandomPruning])
@pytest.mark.parametrize("layer", [1, 3, LAYERS])
def test_keeping_none_is_an_exit(kind, layer):
    model, inputs = tiny_llava(), batch_of(*RAGGED)
    with reduce_tokens(model, kind(layer, 0.0)) as handle:
        out = generate(model, inputs, output_logits=True, return_dict_in_generate=True)
    with dyvte.visual_exit(model, dyvte.FixedExit(layer)) as exits:
        expected = generate(model, inputs, output_logits=True, return_dict_in_generate=True)
    assert out.sequences.tolist() == expected.sequences.tolist() and handle.layers.tolist() == exits.layers.tolist()
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-4)


def test_text_only_samples_stay_as_they_are():
    model, inputs = tiny_llava(), batch_of(prompt(3, 5), prompt(4, 7, images=0), prompt(2, 3, seed=3))
    dense = generate(model, inputs)
    with reduce_tokens(model, FastV(1, 0.0)) as handle:
        out = generate(model, inputs)
    assert handle.layers.tolist() == [1, LAYERS, 1] and handle.counts[1].tolist() == [0, 0, 0]
    assert out[1].tolist() == dense[1].tolist()


@pytest.mark.parametrize("rule", [FastV(2, 0.4), RandomPruning(2, 0.4)], ids=name)
def test_beams_keep_the_same_tokens(rule):
    model, inputs = tiny_llava(), batch_of(*RAGGED[:2])
    with reduce_tokens(model, rule) as handle:
        out = generate(model, inputs, num_beams=3, num_return_sequences=3)
    assert handle.counts[2].tolist() == [6] * 6 and len(out) == 6
    if isinstance(rule, FastV):
        visual = inputs["input_ids"] == IMAGE_ID
        gone_from, _ = definition(rule, torch.full((2,), LAYERS), inputs, visual, tiny_llava("eager"))
        eager = tiny_llava("eager")
        with masked_columns(eager, gone_from.repeat_interleave(3, 0)):
            expected = generate(eager, inputs, num_beams=3, num_return_sequences=3, use_cache=False)
        assert out.tolist() == expected.tolist()


@pytest.mark.parametrize("policy", [dyvte.NeverExit(), dyvte.FixedExit(4)])
def test_guessed_tokens_change_nothing(policy):
    """Prompt lookup guesses several tokens at once; they go through pruned caches, and wrong ones are cropped."""
    model = tiny_llava()
    inputs = batch_of(prompt(3, 5, seed=1))
    inputs["input_ids"][0, -4:] = inputs["input_ids"][0, -5]
    with reduce_tokens(model, FastV(2, 0.4) & policy):
        plain = generate(model, inputs, max_new_tokens=12)
        guessed = generate(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert guessed.tolist() == plain.tolist()


def test_half_precision_stays_close():
    model, inputs = tiny_llava(), batch_of(*RAGGED)
    with torch.no_grad(), reduce_tokens(model, FastV(2, 0.5)) as handle:
        expected, kept = model(**inputs).logits[:, -1], handle.counts[-1]
    half = tiny_llava().to(torch.bfloat16)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with torch.no_grad(), reduce_tokens(half, FastV(2, 0.5)) as handle:
        found = half(**inputs).logits[:, -1].float()
    assert handle.counts[-1].tolist() == kept.tolist() and found.isfinite().all()
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.9


# Deepstack and interleaved positions, windows, image blocks that attend both ways, a prefix.
@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "mistral3_sliding", "paligemma"])
def test_families(name):
    family = FAMILIES[name]
    inputs = family.batch([3, "image", 5], [1, "image", 9], [2, "image", 4, "image", 6])
    visual = family.visual(inputs)
    rule, layers = FastV(max(family.first, 2), 0.5), len(find_decoder(family.build()).layers)
    eager = family.build("eager")
    kept = kept_columns(rule, eager, inputs, visual)
    gone_from = torch.where(visual & ~kept, rule.layer, layers + 1)
    with torch.no_grad(), masked_columns(eager, gone_from):
        expected = eager(**inputs, use_cache=False).logits
    for attention in family.attentions:
        model = family.build(attention)
        with torch.no_grad(), reduce_tokens(model, rule):
            logits = model(**inputs).logits
        text = inputs["attention_mask"].bool() & ~visual
        torch.testing.assert_close(logits[text], expected[text], atol=1e-5, rtol=1e-4)


def test_a_bare_decoder():
    visual = torch.zeros(2, 20, dtype=torch.bool)
    visual[:, 3:14] = True
    inputs = {"inputs_embeds": torch.randn(2, 20, 32), "attention_mask": torch.ones(2, 20).long()}
    rule, eager = FastV(2, 0.5), tiny_llama("eager")
    gone_from = torch.where(visual & ~kept_columns(rule, eager, inputs, visual), 2, LAYERS + 1)
    with torch.no_grad(), masked_columns(eager, gone_from):
        expected = eager(**inputs, use_cache=False).logits[:, -1]
    model = tiny_llama()
    with torch.no_grad(), reduce_tokens(model, rule, visual_mask=visual) as handle:
        torch.testing.assert_close(model(**inputs).logits[:, -1], expected, atol=1e-5, rtol=1e-4)
    assert handle.counts[-1].tolist() == [6, 6]


def test_a_second_image_in_a_later_turn():
    """Its scores count what the cache holds; the first image stays as it was pruned."""
    model, rule = tiny_llava(), FastV(2, 0.5)
    first, second = batch_of(prompt(3, 5)), batch_of(prompt(2, 4, seed=8), seed=8)
    whole = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1),
        "attention_mask": torch.ones(1, 46, dtype=torch.long),
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
    }
    with torch.no_grad(), reduce_tokens(model, rule) as handle:
        cache = call_cache(model(**first, use_cache=True))
        out = model(**second | {"attention_mask": whole["attention_mask"]}, **{CACHE: cache})
    assert handle.counts[-1].tolist() == [8]
    assert [layer.keys.shape[2] for layer in cache.layers] == [46] * 2 + [46 - 16] * (LAYERS - 2)
    eager = tiny_llava("eager")
    gone_from = torch.full((1, 46), LAYERS + 1)
    gone_from[:, :24] = definition(rule, torch.tensor([LAYERS]), first, first["input_ids"] == IMAGE_ID, eager)[0]
    gone_from[gone_from == LAYERS] = LAYERS + 1
    with torch.no_grad():
        scores = eager(**whole, output_attentions=True).attentions[1][0, :, -1].mean(0)
    new = (whole["input_ids"][0] == IMAGE_ID) & (torch.arange(46) >= 24)
    gone_from[0, new.nonzero().flatten()[scores[new].topk(8, largest=False).indices]] = 2
    with torch.no_grad(), masked_columns(eager, gone_from):
        expected = eager(**whole, use_cache=False).logits[:, -1]
    torch.testing.assert_close(out.logits[:, -1], expected, atol=1e-5, rtol=1e-4)


def test_hooks_go_also_after_an_exception():
    model = tiny_llava()
    with pytest.raises(RuntimeError, match="mine"), reduce_tokens(model, FastV(2, 0.5)):
        raise RuntimeError("mine")
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
    assert "generate" not in vars(model)


def test_the_model_stays_sdpa():
    model = tiny_llava("sdpa")
    with reduce_tokens(model, FastV(2, 0.5)):
        generate(model, batch_of(*RAGGED))
        assert find_decoder(model).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FastV(0, 0.5), "layer must be a number of decoder layers"),
        (lambda: FastV(2.0, 0.5), "layer must be a number of decoder layers"),
        (lambda: FastV(2, 1.5), "keep must be the share"),
        (lambda: FastV(2, float("nan")), "keep must be the share"),
        (lambda: RandomPruning(2, 0.5, seed=0.5), "seed must be a whole number"),
        (lambda: dyvte.attach(tiny_llava(), FastV(LAYERS + 1, 0.5)), "layer 7 is outside 0 ... 6"),
        (lambda: dyvte.attach(tiny_llava(), FastV(2, 0.5) & dyvte.FixedExit(9)), "outside 1 ... 6"),
        (lambda: dyvte.attach(FAMILIES["qwen3_vl"].build(), FastV(1, 0.5)), "layer 1 is outside 2 ... 5"),
        (lambda: dyvte.attach(tiny_llama(), FastV(2, 0.5)), "pass visual_mask"),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_only_reductions_combine():
    with pytest.raises(TypeError, match="only reductions combine"):
        FastV(2, 0.5) & 4


def test_counts():
    rule = FastV(2, 0.5)
    assert [rule.count(n, 2) for n in (0, 1, 2, 3, 5, 576)] == [0, 1, 1, 2, 3, 288]
    assert FastV(2, 0.001).count(10, 2) == 1 and FastV(2, 0.0).count(10, 2) == 0 and FastV(2, 1.0).count(7, 2) == 7
    model = tiny_llava()
    with torch.no_grad(), reduce_tokens(model, rule & dyvte.FixedExit(4)) as handle:
        model(**batch_of(prompt(3, 5)))
    assert handle.counts[:, 0].tolist() == [16, 16, 8, 8, 0, 0] and handle.layers.tolist() == [4]
    assert [int(handle.kept(layer).sum()) for layer in range(LAYERS)] == [24, 24, 16, 16, 8, 8]


def test_flops():
    config = llama_config()
    head = 2 * config.hidden_size * config.vocab_size
    expected = 2 * layer_flops(config, 30) + 2 * layer_flops(config, 20) + 2 * layer_flops(config, 10) + head
    assert pass_flops(config, 10, [20, 20, 10, 10, 0, 0]) == expected
    # Scores: keys of 30 tokens, one query, one row of attention.
    assert attention_flops(config, 30) == 2 * 32 * 30


def test_counted_flops():
    """The closed form is what torch counts while pruning, scores included."""
    from torch.utils.flop_counter import FlopCounterMode

    model, inputs = tiny_llava("eager"), batch_of(prompt(3, 5))
    rule = FastV(2, 0.25)
    with torch.no_grad():
        embeds = model.model.get_input_embeddings()(inputs["input_ids"])
        language = SimpleNamespace(model=model.model.language_model, head=model.lm_head)
        with reduce_tokens(language.model, rule, visual_mask=inputs["input_ids"] == IMAGE_ID):
            language.model(inputs_embeds=embeds)  # the first use checks itself
            with FlopCounterMode(display=False) as counter:
                language.head(language.model(inputs_embeds=embeds).last_hidden_state[:, -1:])
    rotary = counter.get_flop_counts().get("LlamaModel.rotary_emb", {})  # up to 5.0 angles come from a product
    counted = counter.get_total_flops() - sum(rotary.values())
    config = model.config.text_config
    assert counted == pass_flops(config, 8, [PATCHES] * 2 + [4] * 4) + attention_flops(config, 8 + PATCHES)


def test_as_policies_of_evaluate(tmp_path):
    pytest.importorskip("datasets")
    from reference_mllm import build_model, build_processor
    from test_evaluation import SETTINGS

    from dyvte.data import load_samples
    from dyvte.evaluation.runner import evaluate

    torch.manual_seed(0)
    processor = build_processor(9)
    model = build_model(SETTINGS, len(processor.tokenizer)).eval()
    policies = {
        "fastv-0.5": FastV(2, 0.5),
        "prune-0.5": RandomPruning(2, 0.5),
        "fastv-exit": FastV(1, 0.5) & dyvte.FixedExit(3),
        "fastv-0": FastV(2, 0.0),
        "fixed-2": dyvte.FixedExit(2),
    }
    samples = load_samples({"scenes": {"split": "dev", "n": 6}})
    settings = {"batch_size": 4, "max_new_tokens": 3, "timing_batches": 1, "progress": False}
    summary = evaluate(model, processor, samples, policies, tmp_path, **settings)["policies"]
    assert summary["fastv-exit"]["mean_exit_layer"] == 3 and summary["fastv-0.5"]["mean_exit_layer"] == 4
    assert summary["fastv-0"]["agreement"] == summary["fixed-2"]["agreement"]
    assert evaluate(model, processor, samples, policies, tmp_path, **settings)["policies"] == summary
