"""Heads on a model: the exits they choose are those their logits say, alone and in batches."""

from __future__ import annotations

import pytest
import torch
from models import LAYERS, batch_of, prompt, tiny_llava

import dyvte

PROMPTS = [prompt(3, 5, seed=1), prompt(1, 9, seed=2), prompt(6, 1, seed=3), prompt(2, 4, seed=4), prompt(4, 4, seed=5)]


def heads_for(model, inputs, form):
    """Random heads whose threshold makes the samples leave at different layers."""
    torch.manual_seed(3)
    config = dyvte.ExitHeadsConfig(num_layers=LAYERS, hidden_size=32, width=8, form=form)
    heads = dyvte.ExitHeads(config).eval()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=0.5)
        if form == "shared":
            heads.heads.layer.zero_()  # or the layer alone would decide
            heads.heads.norm_bias.zero_()
            heads.heads.norm_weight.fill_(1)
        logits = heads(dyvte.trace_batch(model, inputs).state)[:, :-1]
    heads.config.threshold = logits.flatten().quantile(0.8).sigmoid().item()
    return heads


@pytest.mark.parametrize("form", ["shared", "original"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_exits_follow_the_heads(form, attention):
    model, inputs = tiny_llava(attention), batch_of(*PROMPTS)
    heads = heads_for(model, inputs, form)
    probability = heads(dyvte.trace_batch(model, inputs).state).sigmoid()
    over = probability[:, :-1] > heads.config.threshold
    expected = torch.where(over.any(1), over.int().argmax(1) + 1, LAYERS)
    assert len(set(expected.tolist())) > 2, "the samples should leave at different layers"
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.LearnedExit(heads)) as exits:
        learned = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert exits.layers.tolist() == expected.tolist()
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.FixedExit(expected)):
        fixed = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert learned.tolist() == fixed.tolist()


def test_a_single_text_token_after_the_image_has_a_state():
    model, inputs = tiny_llava(), batch_of(prompt(6, 1))
    trace = dyvte.trace_batch(model, inputs)
    assert trace.state.isfinite().all()
    assert torch.equal(trace.state[..., :32], trace.state[..., 32:])  # the mean is of that token


def test_min_layer_and_threshold():
    model, inputs = tiny_llava(), batch_of(*PROMPTS)
    heads = heads_for(model, inputs, "shared")
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.LearnedExit(heads, threshold=1e-9, min_layer=4)) as exits:
        model(**inputs)
    assert exits.layers.tolist() == [4] * 5
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.LearnedExit(heads, threshold=1.0)) as exits:
        model(**inputs)
    assert exits.layers.tolist() == [LAYERS] * 5


def test_heads_of_another_depth_are_refused():
    heads = dyvte.ExitHeads(dyvte.ExitHeadsConfig(num_layers=LAYERS + 2, hidden_size=32))
    model = tiny_llava()
    with pytest.raises(ValueError, match="fit a decoder of 8 layers"):
        dyvte.attach(model, dyvte.LearnedExit(heads))
    assert not any(m._forward_pre_hooks for m in model.get_decoder().layers)


def test_a_policy_may_only_say_who_leaves():
    class AfterThreeLayers(dyvte.ExitPolicy):
        def leaves(self, layer, state):
            return torch.full((len(state),), layer >= 3)

    model, inputs = tiny_llava(), batch_of(*PROMPTS)
    with torch.no_grad(), dyvte.visual_exit(model, AfterThreeLayers()) as exits:
        model(**inputs)
    assert exits.layers.tolist() == [3] * 5


def test_a_policy_is_a_small_class():
    class ShortPromptsLeaveEarly(dyvte.ExitPolicy):
        def plan(self, batch_size, num_layers):
            return torch.arange(1, batch_size + 1)

    model, inputs = tiny_llava(), batch_of(*PROMPTS)
    with torch.no_grad(), dyvte.visual_exit(model, ShortPromptsLeaveEarly()) as exits:
        model(**inputs)
    assert exits.layers.tolist() == [1, 2, 3, 4, 5]


def test_samples_with_unusual_images_stay():
    """The policy is asked once, with the mean visual token of each sample, and told which may leave."""
    model, inputs = tiny_llava(), batch_of(*PROMPTS)
    visual = dyvte.trace_batch(model, inputs).visual
    with torch.no_grad():
        features = torch.stack(model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output)
    torch.testing.assert_close(visual, features.mean(1), atol=1e-5, rtol=1e-5)
    heads = heads_for(model, inputs, "shared")
    guarded = dyvte.ExitHeads(dyvte.ExitHeadsConfig(**heads.config.to_diff_dict() | {"guard": 0.9})).eval()
    guarded.heads.load_state_dict(heads.heads.state_dict())
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.LearnedExit(guarded)) as exits:
        model(**inputs)
    everyone = exits.layers.clone()
    guarded.guard.image_mean.copy_(visual[2])
    guarded.guard.image_whiten.copy_(torch.eye(*guarded.guard.image_whiten.shape))
    guarded.guard.image_radius.fill_(1e-6)  # only the third image is like that of training
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.LearnedExit(guarded)) as exits:
        model(**inputs)
    assert exits.layers.tolist() == [LAYERS, LAYERS, everyone[2].item(), LAYERS, LAYERS]
    assert everyone.min() < LAYERS and everyone[2] < LAYERS
