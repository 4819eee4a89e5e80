"""Heads on a model: the exits they choose are those their logits say, alone and in batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import CACHE, LAYERS, batch_of, prompt, tiny_llama, tiny_llava

import dyvte
from dyvte.runtime.compat import call_cache

PROMPTS = [prompt(3, 5, seed=1), prompt(1, 9, seed=2), prompt(6, 1, seed=3), prompt(2, 4, seed=4), prompt(4, 4, seed=5)]


def heads_for(model, inputs, form, **more):
    """Random heads whose threshold makes the samples leave at different layers."""
    torch.manual_seed(3)
    config = dyvte.ExitHeadsConfig(num_layers=LAYERS, hidden_size=32, width=8, form=form, **more)
    heads = dyvte.ExitHeads(config).eval()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=0.5)
        if form == "shared":
            heads.heads.layer.zero_()  # or the layer alone would decide
            heads.heads.norm_bias.zero_()
            heads.heads.norm_weight.fill_(1)
        logits = heads(dyvte.trace_batch(model, inputs).state)[:, heads.config.lookahead : -1]
    heads.config.threshold = logits.flatten().quantile(0.7).sigmoid().item()
    return heads


@pytest.mark.parametrize("form", ["shared", "original"])
@pytest.mark.parametrize(("attention", "lookahead"), [("eager", 0), ("sdpa", 0), ("sdpa", 1)])
def test_exits_follow_the_heads(form, attention, lookahead):
    model, inputs = tiny_llava(attention), batch_of(*PROMPTS)
    heads = heads_for(model, inputs, form, lookahead=lookahead)
    probability = heads(dyvte.trace_batch(model, inputs).state).sigmoid()
    over = probability[:, :-1] > heads.config.threshold
    expected = torch.where(over.any(1), over.int().argmax(1) + 1, LAYERS)
    assert len(set(expected.tolist())) > 2, "the samples should leave at different layers"
    assert expected.min() > lookahead
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.LearnedExit(heads)) as exits:
        learned = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert exits.layers.tolist() == expected.tolist()
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.FixedExit(expected)):
        fixed = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert learned.tolist() == fixed.tolist()


def test_autocast_leaves_decisions_in_float32():
    model, inputs, seen = tiny_llava(), batch_of(*PROMPTS), []
    heads = heads_for(model, inputs, "shared")
    heads.heads.out.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), dyvte.visual_exit(model, dyvte.LearnedExit(heads)):
        assert model(**inputs).logits.dtype == torch.bfloat16
    assert seen and set(seen) == {torch.float32}


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
        features = model.get_image_features(inputs["pixel_values"])
        features = torch.stack(list(getattr(features, "pooler_output", features)))  # up to 4.57 the list itself
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


def test_looking_ahead_reaches_back_before_the_first_exit_a_model_allows():
    """A model that cannot exit before layer 3 is asked about layer 3 after 2 layers already."""
    asked = []

    class Eager(dyvte.ExitPolicy):
        lookahead = 1

        def leaves(self, layer, state):
            asked.append(layer)
            return torch.ones(len(state), dtype=torch.bool)

    model, inputs = tiny_llava(), batch_of(*PROMPTS)
    handle = dyvte.attach(model, Eager())
    handle.spec = dataclasses.replace(handle.spec, first=3)
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        handle.detach()
    assert asked[0] == 3 and handle.layers.tolist() == [3] * 5


class OnDevice(torch.Tensor):
    """Stands for a tensor on an accelerator: notes what makes the host wait for a value computed there."""

    waits: list[str] = []
    READS = {"cpu", "item", "tolist", "numpy", "nonzero", "equal", "allclose", "__bool__", "__int__", "__float__"}

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, kwargs or {}
        masked = name in ("__getitem__", "__setitem__") and any(
            isinstance(part, OnDevice) and part.dtype == torch.bool
            for part in (args[1] if isinstance(args[1], tuple) else args[1:2])
        )
        copied = name == "to" and args[1:2] == ("cpu",)
        if name in cls.READS or masked or copied:
            cls.waits.append(name + (" later" if kwargs.get("non_blocking") else ""))
        result = super().__torch_function__(func, types, args, kwargs)
        return result.as_subclass(torch.Tensor) if copied or name in ("cpu", "nonzero") else result


@pytest.mark.parametrize("lookahead", [0, 1])
def test_the_host_waits_for_nothing_but_the_decisions(lookahead):
    """One copy a layer, not blocking, once layers are running and while nobody leaves.

    Heads without a guard: on the CPU that this runs on, it would be asked late.
    """
    model, width = tiny_llama(), 32
    config = dyvte.ExitHeadsConfig(num_layers=LAYERS, hidden_size=width, threshold=0.999, lookahead=lookahead)
    policy = dyvte.LearnedExit(dyvte.ExitHeads(config))
    visual = torch.zeros(3, 12, dtype=torch.bool)
    visual[:, 2:8] = True
    embeds = torch.randn(3, 12, width).as_subclass(OnDevice)
    model.model.layers[0].register_forward_hook(lambda *_: OnDevice.waits.clear())
    with torch.no_grad():
        model(inputs_embeds=embeds)
        of_the_model = list(OnDevice.waits)
        with dyvte.visual_exit(model, policy, visual_mask=visual.as_subclass(OnDevice)) as exits:
            model(inputs_embeds=embeds)
    assert exits.layers.tolist() == [LAYERS] * 3
    assert of_the_model == []
    assert OnDevice.waits == ["to later"] * (LAYERS - 1 - lookahead)


@pytest.mark.parametrize("padding", [0, 2])
def test_a_decoding_step_asks_the_device_no_more_than_a_dense_one(padding):
    """Samples that left at three different layers, so three masks beside the model's own; and all at one."""
    model, width = tiny_llama(), 32
    visual = torch.zeros(3, 12, dtype=torch.bool)
    visual[:, 2:8] = True
    valid = torch.ones(3, 12, dtype=torch.long)
    valid[0, :padding] = 0
    waits = []
    for policy in (dyvte.NeverExit(), dyvte.FixedExit([1, 3, 5]), dyvte.FixedExit(2)):
        with torch.no_grad(), dyvte.visual_exit(model, policy, visual_mask=visual):
            mask = valid.as_subclass(OnDevice)
            cache = model(inputs_embeds=torch.randn(3, 12, width).as_subclass(OnDevice), attention_mask=mask)
            OnDevice.waits = []
            mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
            token = torch.randn(3, 1, width).as_subclass(OnDevice)
            model(inputs_embeds=token, attention_mask=mask, **{CACHE: call_cache(cache)})
        waits.append(list(OnDevice.waits))
    assert waits[0] == waits[1] == waits[2]
