"""One list of behaviours, run over every family: the exit equals its definition."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import FAMILIES, LAYERS, REFUSED, Family
from models import CACHE, masked_visual_columns

import dyvte
from dyvte.runtime.compat import call_cache, layer_types

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


@pytest.mark.parametrize(("family", "attention"), pairs())
def test_without_a_cache(family, attention):
    inputs = family.batch([3, "image", 5], [1, "image", 7])
    exits = [family.first, LAYERS - 1]
    equal_to_definition(family, inputs, exits, attention, use_cache=False, max_new_tokens=2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "attention"), pairs())
def test_forward(family, attention, side):
    """Every text token's logits, and a place for every token."""
    inputs = family.batch(*prompts(family, "ragged, several images, text only"), side=side)
    visual, exits = family.visual(inputs), torch.tensor([family.first, LAYERS, LAYERS - 1, 3])
    eager, model = family.build("eager"), family.build(attention)
    with torch.no_grad():
        with masked_visual_columns(eager, visual, exits):
            expected = eager(**inputs).logits
        with dyvte.visual_exit(model, dyvte.FixedExit(exits)):
            logits = model(**inputs).logits
    text = inputs["attention_mask"].bool() & ~visual
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits[text], expected[text], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "attention"), pairs())
def test_never_is_bit_equal_and_an_exit_is_not(family, attention):
    model, inputs = family.build(attention), family.batch(*prompts(family, "ragged"))
    with torch.no_grad():
        dense = model(**inputs).logits
        with dyvte.visual_exit(model, dyvte.NeverExit()):
            assert torch.equal(model(**inputs).logits, dense)
        with dyvte.visual_exit(model, dyvte.FixedExit(family.first)):
            assert (model(**inputs).logits[:, -1] - dense[:, -1]).abs().max() > 1e-3
        assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_bf16(family):
    attention = family.attentions[-1]
    inputs = family.batch(*prompts(family, "ragged"))
    exits = torch.tensor([family.first, LAYERS - 1, 3])
    logits, dense = [], []
    for dtype in (torch.float32, torch.bfloat16):
        model = family.build(attention, dtype)
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        dense.append(generated(model, given).logits[0].float())
        with dyvte.visual_exit(model, dyvte.FixedExit(exits)):
            out = generated(model, given)
        assert out.logits[0].isfinite().all() and out.sequences.shape[1] == inputs["input_ids"].shape[1] + STEPS
        logits.append(out.logits[0].float())
    # Or, where a version of transformers computes otherwise in half precision, no further apart than without an exit.
    apart = max(0.2 * logits[0].norm(), 1.2 * (dense[1] - dense[0]).norm())
    assert (logits[1] - logits[0]).norm() < apart


def continued(family: Family, inputs: dict, answer: torch.Tensor, more: dict) -> dict:
    """The inputs of a second turn: all ids so far, and the new images only."""
    ids = torch.cat([inputs["input_ids"], answer, more["input_ids"]], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(answer), more["attention_mask"]], 1)
    return more | {"input_ids": ids, "attention_mask": mask} | family.extra_inputs(ids)


@pytest.mark.parametrize("second", ["text", "image", "image for one"])
@pytest.mark.parametrize(("family", "attention"), pairs())
def test_a_second_turn(family, attention, second):
    """A turn of text keeps the earlier exits; a new image gets its own, per sample."""
    if second != "text" and not family.sees_later_images():
        pytest.skip("generate itself cannot place a new image on a continued cache")
    first = family.batch([3, "image", 5], [2, "image", 8])
    rows = {"text": ([4], [6]), "image": ([2, "image", 3], [4, "image", 5]), "image for one": ([2, "image", 3], [2])}
    more = family.batch(*rows[second], seed=1)
    turns = [[family.first, LAYERS - 1], [LAYERS - 2, family.first]]
    if second == "image for one":  # every layer but the first few is cut from the first turn on
        turns = [[family.first] * 2] * 2

    def talk(model, context):
        with context(0):
            one = generated(model, first)
        inputs = continued(family, first, one.sequences[:, -STEPS:], more)
        with context(1):
            two = generated(model, inputs, **{CACHE: call_cache(one)})
        return two

    length = first["input_ids"].shape[1] + STEPS
    visual = torch.cat([family.visual(first), torch.zeros(2, STEPS, dtype=torch.bool), family.visual(more)], 1)
    exits = torch.tensor(turns[0])[:, None].repeat(1, visual.shape[1])
    exits[:, length:] = torch.tensor(turns[1])[:, None]
    eager, model = family.build("eager"), family.build(attention)
    expected = talk(eager, lambda turn: masked_visual_columns(eager, visual, exits))
    out = talk(model, lambda turn: dyvte.visual_exit(model, dyvte.FixedExit(turns[turn])))
    assert out.sequences.tolist() == expected.sequences.tolist()
    for got, want in zip(out.logits, expected.logits):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    config, model, match = REFUSED[name]
    config = config()
    if name == "shared keys" and "dummy" not in dict(layer_types(config)):
        pytest.skip("no model of this version names the layers that use the keys of another")
    model = getattr(transformers, model)(config)
    with pytest.raises(ValueError, match=match):
        dyvte.attach(model, dyvte.NeverExit(), visual_mask=torch.ones(1, 1, dtype=torch.bool))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_features_injected_into_early_layers_set_a_minimum():
    """Fixed exits before it are refused, all other policies start there."""
    family = FAMILIES["qwen3_vl"]
    model, inputs = family.build(), family.batch([3, "image", 5], [3, "image", 7])
    with pytest.raises(ValueError, match="exit layer 1 is too early.*Choose 2 ... 5"):
        dyvte.attach(model, dyvte.FixedExit([1, 4]))

    class Eager(dyvte.ExitPolicy):
        asked = []

        def plan(self, batch_size, num_layers):
            return None

        def leaves(self, layer, state):
            self.asked.append(layer)
            return torch.ones(len(state), dtype=torch.bool)

    for policy in (dyvte.RandomExit(1.0), Eager()):
        with torch.no_grad(), dyvte.visual_exit(model, policy) as handle:
            model(**inputs)
        assert handle.layers.tolist() == [2, 2] and handle.min_layer == 2
    assert Eager.asked == [2]


def test_features_without_a_known_layer_are_refused():
    model = FAMILIES["qwen3_vl"].build.__wrapped__(FAMILIES["qwen3_vl"])
    model.config.vision_config.__dict__["deepstack_visual_indexes"] = None
    with pytest.raises(ValueError, match="does not say which"):
        dyvte.attach(model, dyvte.FixedExit(3))
