"""Attention shares against an eager model's own maps; the folder that inspect writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from models import IMAGE_ID, batch_of, prompt, tiny_llama, tiny_llava

from dyvte.data import load_samples
from dyvte.evaluation.attention_shares import attention_map, attention_shares
from dyvte.evaluation.inspection import inspect_model, state_similarity
from dyvte.runtime.attention import find_attention
from dyvte.runtime.locate import find_decoder

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
RAGGED = [prompt(3, 5, seed=1), prompt(1, 9, seed=2), prompt(6, 1, seed=3), prompt(2, 4, images=2, seed=4)]


def shares_of_maps(model, inputs, visual):
    """The definition, sample by sample, from the full maps of an eager model."""
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True, use_cache=False).attentions
    share = torch.zeros(len(visual), len(maps), 2, 3)
    for i, row in enumerate(visual):
        tokens = inputs["attention_mask"][i].bool()
        last = int((row & tokens).nonzero().max())
        column = torch.arange(len(row))
        after = tokens & ~row & (column > last)
        groups = (row & tokens, tokens & ~row & (column < last), after)
        for layer, weights in enumerate(maps):
            rows = weights[i].mean(0)[after]
            for g, group in enumerate(groups):
                paid = rows[:, group].sum(1)
                share[i, layer, :, g] = torch.stack([paid.mean(), paid[-1]])
    return share


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_shares_are_those_of_the_maps(attention, side):
    inputs = batch_of(*RAGGED, side=side)
    visual = inputs["input_ids"] == IMAGE_ID
    found = attention_shares(tiny_llava(attention), inputs)
    expected = shares_of_maps(tiny_llava("eager"), inputs, visual)
    torch.testing.assert_close(found.share, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.share.sum(-1), torch.ones(4, 6, 2))
    assert found.tokens.tolist() == [[16, 3, 5], [16, 1, 9], [16, 6, 1], [32, 3, 4]]


@pytest.mark.parametrize("layer", [1, 4, 6])
def test_the_map_of_one_layer(layer):
    inputs = batch_of(*RAGGED, side="left")
    model = tiny_llava()
    found = attention_map(model, inputs, layer)
    with torch.no_grad():
        weights = tiny_llava("eager")(**inputs, output_attentions=True, use_cache=False).attentions[layer - 1]
    visual = inputs["input_ids"] == IMAGE_ID
    for row, mask in enumerate(visual):
        last = int(mask.nonzero().max())
        expected = weights[row, :, last + 1 :].mean((0, 1))
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)
    for outside in (0, 7):
        with pytest.raises(ValueError, match="outside 1 ... 6"):
            attention_map(model, inputs, outside)


# Norms on queries and keys, several rotations, windows, image blocks that attend both ways, a prefix.
@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "mistral3_sliding", "paligemma", "paligemma2", "glm4v"])
def test_families(name):
    family = FAMILIES[name]
    inputs = family.batch([3, "image", 5], [1, "image", 9], [2, "image", 4, "image", 6])
    found = attention_shares(family.build(family.attentions[-1]), inputs)
    expected = shares_of_maps(family.build("eager"), inputs, family.visual(inputs))
    torch.testing.assert_close(found.share, expected, atol=1e-5, rtol=0)


def test_hooks_go_and_labels_do_no_harm():
    model, inputs = tiny_llava(), batch_of(*RAGGED)
    expected = attention_shares(model, inputs).share
    torch.testing.assert_close(attention_shares(model, inputs | {"labels": inputs["input_ids"]}).share, expected)
    with pytest.raises(ValueError):
        attention_shares(model, inputs | {"pixel_values": inputs["pixel_values"][:1]})
    for layer in find_decoder(model).layers:  # (transformers leaves hooks of its own in vision towers)
        assert not layer.self_attn._forward_pre_hooks and not layer.self_attn._forward_hooks


def test_attention_of_another_kind_is_refused():
    """A module that does more than rotated dot products is found out by its output."""
    model = tiny_llava(seed=3)
    attention = find_decoder(model).layers[1].self_attn
    plain = attention.forward

    def gated(*args, **kwargs):
        output, weights = plain(*args, **kwargs)
        return output * 0.5, weights

    attention.forward = gated
    with pytest.raises(ValueError, match="cannot be read from its queries and keys"):
        attention_shares(model, batch_of(prompt(3, 5)))


def test_layers_without_projections_are_refused():
    with pytest.raises(ValueError, match="no attention that can be read"):
        find_attention(torch.nn.TransformerEncoderLayer(8, 2))


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        (batch_of(prompt(3, 5), prompt(4, 3, images=0)), r"samples \[1\] have no visual tokens"),
        (batch_of(prompt(3, 0)), r"samples \[0\] have no visual tokens, or no text after"),
        ({"inputs_embeds": torch.zeros(1, 4, 32)}, "pass visual_mask"),
    ],
)
def test_batches_that_show_nothing(inputs, match):
    with pytest.raises(ValueError, match=match):
        attention_shares(tiny_llava(), inputs)


def test_a_bare_decoder():
    visual = torch.zeros(2, 12, dtype=torch.bool)
    visual[:, 2:8] = True
    inputs = {"inputs_embeds": torch.randn(2, 12, 32), "attention_mask": torch.ones(2, 12).long()}
    found = attention_shares(tiny_llama(), inputs, visual_mask=visual)
    expected = shares_of_maps(tiny_llama("eager"), inputs, visual)
    torch.testing.assert_close(found.share, expected, atol=1e-5, rtol=0)


def test_similarity():
    state = torch.randn(3, 4, 10)
    found = state_similarity(state)
    assert found.shape == (3, 3, 2)
    expected = torch.nn.functional.cosine_similarity(state[1, 2, 5:], state[1, 1, 5:], dim=0)
    torch.testing.assert_close(found[1, 1, 1], expected)


@pytest.fixture(scope="module")
def mllm():
    from reference_mllm import build_model, build_processor
    from test_evaluation import SETTINGS

    torch.manual_seed(0)
    processor = build_processor(9)
    return build_model(SETTINGS, len(processor.tokenizer)).eval(), processor


def test_inspect_writes_numbers_and_a_figure(mllm, tmp_path):
    samples = load_samples({"scenes": {"split": "dev", "n": 24, "seed": 2}})
    result = inspect_model(*mllm, samples, tmp_path, batch_size=5, max_new_tokens=3, progress=False)
    assert result == json.loads((tmp_path / "inspect.json").read_text())
    assert (tmp_path / "inspect.png").stat().st_size > 10_000
    layers = result["layers"]
    assert result["samples"] == 24 and sum(part["samples"] for part in result["by_kind"].values()) == 24
    for part in (result, *result["by_kind"].values()):
        for reader in part["attention"].values():
            assert all(len(values) == layers for values in reader.values())
            assert sum(values[0] for values in reader.values()) == pytest.approx(1, abs=1e-4)
        assert len(part["agreement"]) == len(part["kl"]) == layers and part["agreement"][-1] == 1
        assert len(part["similarity"]["last"]) == layers - 1
        assert part["agreement"][part["unneeded_from"] - 1] >= 0.99
    # Once more: the traces are there, the numbers stay.
    again = inspect_model(*mllm, samples, tmp_path, batch_size=5, max_new_tokens=3, progress=False)
    assert again["agreement"] == result["agreement"]


def test_another_model_does_not_find_old_traces(mllm, tmp_path):
    from reference_mllm import build_model
    from test_evaluation import SETTINGS

    model, processor = mllm
    samples = load_samples({"scenes": {"split": "dev", "n": 4}})
    inspect_model(model, processor, samples, tmp_path, max_new_tokens=2, progress=False)
    other = build_model(SETTINGS, len(processor.tokenizer)).eval()
    with pytest.raises(ValueError, match="holds traces made otherwise"):
        inspect_model(other, processor, samples, tmp_path, max_new_tokens=2, progress=False)
    asked_otherwise = load_samples({"scenes": {"split": "dev", "n": 4, "seed": 1}})
    with pytest.raises(ValueError, match="holds traces made otherwise"):
        inspect_model(model, processor, asked_otherwise, tmp_path, max_new_tokens=2, progress=False)


def test_nothing_to_inspect(mllm, tmp_path):
    with pytest.raises(ValueError, match="no samples to inspect"):
        inspect_model(*mllm, [], tmp_path)
