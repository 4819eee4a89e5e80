"""What is wrong is refused: by a message that names the fault and the remedy, before work, the model as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import FAMILIES, LAYERS
from models import CACHE, tiny_llama
from torch import nn
from transformers import DynamicCache, GenerationConfig, StaticCache

import dyvte
from dyvte import SplicedVisualMask
from dyvte.runtime.compat import call_cache

FAMILY = FAMILIES["llava"]
MASK = torch.ones(1, 24, dtype=torch.bool)


class Plan(dyvte.ExitPolicy):
    def __init__(self, planned):
        self.planned = planned

    def plan(self, batch_size, num_layers):
        return self.planned


class Leaves(Plan):
    def plan(self, batch_size, num_layers):
        return None

    def leaves(self, layer, state):
        return self.planned


class Admits(Leaves):
    def admits(self, visual):
        return self.planned


class NoConfig(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Linear(2, 2)])


class Splices(nn.Module):
    def splice(self, ids):
        return ids


def attach(policy=None, model=None, **arguments):
    return lambda own: dyvte.attach(
        own if model is None else model, dyvte.FixedExit(2) if policy is None else policy(), **arguments
    )


def forward(policy=None, attached=None, rows=1, **changes):
    def run(model):
        inputs = FAMILY.batch(*[[3, "image", 5]] * rows) | changes
        with dyvte.visual_exit(model, policy or dyvte.FixedExit(2), **(attached or {})):
            model(**{k: v for k, v in inputs.items() if v is not None})

    return run


def generate(policy=None, attached=None, rows=1, **changes):
    def run(model):
        inputs = FAMILY.batch(*[[3, "image", 5]] * rows) | changes
        with dyvte.visual_exit(model, policy or dyvte.FixedExit(2), **(attached or {})):
            model.generate(**{k: v for k, v in inputs.items() if v is not None}, max_new_tokens=2)

    return run


def twice(model):
    handle = dyvte.attach(model, dyvte.FixedExit(2))
    try:
        dyvte.attach(model, dyvte.FixedExit(3))
    finally:
        handle.detach()


def checkpointing(model):
    model.get_decoder().gradient_checkpointing = True
    model.train()
    try:
        forward()(model)
    finally:
        model.get_decoder().gradient_checkpointing = False
        model.eval()


def flash(model):
    gemma = FAMILIES["gemma3"].build.__wrapped__(FAMILIES["gemma3"])
    gemma.config.text_config._attn_implementation_internal = "flash_attention_2"
    dyvte.attach(gemma, dyvte.FixedExit(2))


def encoder_decoder(model):
    model.config.is_encoder_decoder = True
    try:
        dyvte.attach(model, dyvte.FixedExit(2))
    finally:
        model.config.is_encoder_decoder = False


def copied(how):
    def run(model):
        with dyvte.visual_exit(model, dyvte.FixedExit(2)):
            how(model)

    return run


def half_heads():
    config = dyvte.ExitHeadsConfig(num_layers=LAYERS, hidden_size=32)
    return dyvte.LearnedExit(dyvte.ExitHeads(config).to(torch.bfloat16))


def static():
    return StaticCache(config=FAMILY.build().config.text_config, max_cache_len=64)


EMBEDS = {"input_ids": None, "pixel_values": None, "inputs_embeds": torch.zeros(1, 24, 32)}
NO_MASK = {"visual_mask": MASK[:, :5]}

# what is wrong: (how, the exception, what its message says)
BEFORE_ALL_WORK = {
    "a number for a policy": (attach(lambda: 4), TypeError, r"dyvte.FixedExit\(4\)"),
    "a policy's class": (attach(lambda: dyvte.NeverExit), TypeError, "must be an ExitPolicy"),
    "a name for a model": (attach(model="llava-hf/llava-1.5-7b-hf"), TypeError, "pass the loaded model itself"),
    "exit layer 0": (attach(lambda: dyvte.FixedExit(0)), ValueError, "outside 1 ... 5: choose"),
    "an exit layer beyond the last": (attach(lambda: dyvte.FixedExit(9)), ValueError, r"\(5 = never exit\)"),
    "a negative exit layer": (attach(lambda: dyvte.FixedExit(-1)), ValueError, "outside 1 ... 5"),
    "one of several out of range": (attach(lambda: dyvte.FixedExit([2, 6])), ValueError, "outside 1 ... 5"),
    "no exit layers": (attach(lambda: dyvte.FixedExit([])), (TypeError, ValueError), "int"),
    "a fraction": (attach(lambda: dyvte.FixedExit(2.5)), TypeError, "an int or one int per sample"),
    "fractions": (attach(lambda: dyvte.FixedExit([2.5])), TypeError, "a flat list of ints"),
    "nested exit layers": (attach(lambda: dyvte.FixedExit([[1, 2]])), TypeError, "a flat list of ints"),
    "True for an exit layer": (attach(lambda: dyvte.FixedExit(True)), TypeError, "an int or one int per sample"),
    "a probability above 1": (attach(lambda: dyvte.RandomExit(1.5)), ValueError, "p must lie in 0 ... 1"),
    "a word for a probability": (attach(lambda: dyvte.RandomExit("often")), TypeError, "p must be a number in 0 ... 1"),
    "a fraction for a seed": (attach(lambda: dyvte.RandomExit(0.5, seed=0.1)), TypeError, "seed an int"),
    "a model without visual ids": (attach(model=tiny_llama()), ValueError, "pass visual_mask, a bool tensor"),
    "a model without decoder layers": (attach(model=nn.Linear(2, 2)), ValueError, "decoder='path.to.it'"),
    "a wrong decoder path": (attach(decoder="model.llm"), ValueError, "these have: .*model.language_model"),
    "a path to a module without layers": (attach(decoder="lm_head"), ValueError, "these have: .*model.language_model"),
    "a number for a decoder": (attach(decoder=3), TypeError, "a module or the dotted path"),
    "a list for a visual mask": (attach(visual_mask=[True]), TypeError, "a bool tensor .* or a callable"),
    "a visual mask of ints": (attach(visual_mask=MASK.long()), ValueError, "must be bool .*, not torch.int64"),
    "a visual mask without a batch": (attach(visual_mask=MASK[0]), ValueError, r"bool \[batch, sequence\]"),
    "a module without a config": (attach(model=NoConfig()), ValueError, "not a wrapper"),
    "an encoder-decoder": (encoder_decoder, ValueError, "Use it without the exit"),
    "heads in bfloat16": (attach(half_heads), ValueError, r"call heads.float\(\)"),
    "a copy of a model with an exit": (copied(copy.deepcopy), TypeError, r"detach\(\) the exit"),
    "a pickle of a model with an exit": (copied(pickle.dumps), TypeError, r"detach\(\) the exit"),
    "two exits on one model": (twice, ValueError, r"attached to this model already: detach\(\) it"),
    "flash attention with windows": (flash, ValueError, "attn_implementation='sdpa' or 'eager'"),
    "a splice method that is not there": (SplicedVisualMask, ValueError, "name the one that splices.*method="),
    "a splice method without labels": (
        lambda model: SplicedVisualMask(Splices(), "splice"),
        ValueError,
        "takes no .*labels.*pass visual_mask",
    ),
    "labels": (forward(labels=torch.zeros(1, 24).long()), ValueError, "Compute the loss from the logits"),
    "a static cache": (forward(**{CACHE: static()}), ValueError, "use a DynamicCache"),
    "a static cache in generate": (generate(**{CACHE: static()}), ValueError, "use a DynamicCache"),
    "an offloaded cache": (forward(**{CACHE: DynamicCache(offloading=True)}), ValueError, "without offloading"),
    "a tuple for a cache": (forward(**{CACHE: ((None, None),)}), ValueError, "use a DynamicCache"),
    "output_hidden_states": (forward(output_hidden_states=True), ValueError, "Leave it out, or detach"),
    "output_router_logits": (forward(output_router_logits=True), ValueError, "Leave it out, or detach"),
    "output_attentions in generate": (generate(output_attentions=True), ValueError, "Leave it out, or detach"),
    "prefill in chunks": (generate(prefill_chunk_size=8), ValueError, "leave prefill_chunk_size unset"),
    "a static cache by name": (generate(cache_implementation="static"), ValueError, "leave cache_implementation unset"),
    "a static cache by config": (
        generate(generation_config=GenerationConfig(cache_implementation="static")),
        ValueError,
        "leave cache_implementation unset",
    ),
    "a 4-D attention mask": (forward(attention_mask=torch.ones(1, 1, 24, 24)), ValueError, "pass one .batch, sequence"),
    "an attention mask of another length": (
        forward(attention_mask=torch.ones(1, 9).long()),
        ValueError,
        "which tokens are padding",
    ),
    "too few exit layers": (forward(dyvte.FixedExit([2]), rows=2), ValueError, "one exit layer per row"),
    "exit layers per sample, beams": (generate(dyvte.FixedExit([2]), num_beams=3), ValueError, "the batch has 3 rows"),
    "gradient checkpointing": (checkpointing, ValueError, r"call model.eval\(\)"),
}
# these need the prompt as the decoder gets it, so images may have been encoded; no decoder layer has run
BEFORE_THE_DECODER = {
    "embeddings without a visual mask": (forward(**EMBEDS), ValueError, "pass visual_mask"),
    "embeddings in generate": (generate(**EMBEDS), ValueError, "pass visual_mask"),
    "a visual mask too short": (forward(attached=NO_MASK), ValueError, r"must be bool \[1, 24\] like the prompt"),
    "too few rows of a visual mask": (
        forward(attached={"visual_mask": MASK.expand(2, -1)}, rows=3),
        ValueError,
        "batch of 3: one row per sample",
    ),
    "fewer rows of a visual mask, no beams": (
        forward(attached={"visual_mask": MASK.expand(2, -1)}, rows=4),
        ValueError,
        "batch of 4: one row per sample",
    ),
    "admits() of another shape": (forward(Admits(torch.ones(1, 1).bool())), ValueError, r"admits\(\) must return bool"),
    "admits() with numbers": (forward(Admits(torch.ones(1))), ValueError, r"admits\(\) must return bool \[1\]"),
    "a callable that returns nothing": (
        forward(attached={"visual_mask": lambda call: None}),
        ValueError,
        "must be bool .*, not NoneType",
    ),
    "a plan of fractions": (forward(Plan(torch.tensor([2.0]))), ValueError, "must return None or exit layers 1 ... 5"),
    "a plan for another batch": (forward(Plan(torch.tensor([2, 3]))), ValueError, r"long \[1\]"),
    "a plan out of range": (forward(Plan(torch.tensor([7]))), ValueError, "exit layers 1 ... 5"),
    "a plan that is a list": (forward(Plan([2])), ValueError, "must return None or exit layers"),
}
LATER = {
    "leaves() without an answer": (forward(Leaves(None)), ValueError, r"must return bool \[1\]"),
    "leaves() with numbers": (forward(Leaves(torch.tensor([0.7]))), ValueError, r"must return bool \[1\]"),
}
ALL = BEFORE_ALL_WORK | BEFORE_THE_DECODER | LATER


@pytest.mark.parametrize("what", ALL)
def test_refused(what):
    run, exception, match = ALL[what]
    model, inputs = FAMILY.build.__wrapped__(FAMILY), FAMILY.batch([3, "image", 5])
    with torch.no_grad():
        before = model(**inputs).logits
        ran = []
        if what in BEFORE_ALL_WORK:
            model.model.vision_tower.register_forward_pre_hook(lambda *_: ran.append("vision tower"))
        if what not in LATER:
            model.get_decoder().layers[0].self_attn.register_forward_pre_hook(lambda *_: ran.append("decoder"))
        kept = hooks(model)
        with pytest.raises(exception, match=match):
            run(model)
        assert not ran and hooks(model) == kept and "generate" not in vars(model)
        assert torch.equal(model(**inputs).logits, before)
        with dyvte.visual_exit(model, dyvte.FixedExit(2)) as handle:
            model(**inputs)
        assert handle.layers.tolist() == [2]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_after_a_refused_call_the_handle_works():
    model, inputs = FAMILY.build(), FAMILY.batch([3, "image", 5])
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.FixedExit(2)) as handle:
        with pytest.raises(ValueError, match="labels"):
            model(**inputs, labels=inputs["input_ids"])
        model(**inputs)
    assert handle.layers.tolist() == [2] and LAYERS == 5


@pytest.mark.parametrize("exits", [[2, 2], [2, 4]])
def test_a_cache_filled_under_an_exit_needs_it(exits):
    model, inputs = FAMILY.build(), FAMILY.batch([3, "image", 5], [3, "image", 5])
    following = {"input_ids": torch.tensor([[5], [6]]), "attention_mask": torch.ones(2, 25).long()}
    with torch.no_grad():
        with dyvte.visual_exit(model, dyvte.FixedExit(exits)):
            cache = call_cache(model(**inputs, use_cache=True))
        with pytest.raises(ValueError, match="continue it with the exit attached, or start a new cache"):
            model(**following, **{CACHE: cache})


def test_the_table_is_long():
    assert len(ALL) >= 25
