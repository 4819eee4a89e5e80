"""Every way people decode: the answers are those of the definition, decoded in the same way."""

from __future__ import annotations

import copy

import accelerate
import peft
import pytest
import torch
from families import FAMILIES, LAYERS, takes_guesses
from models import CACHE, masked_visual_columns
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import dyvte
from dyvte.runtime.compat import call_cache

STEPS = 6
CHOSEN = ["llava", "qwen2_5_vl", "gemma3", "aya_vision"]
ROWS = [3, "image", 5], [1, "image", 9]
EXITS = [2, 4]


def draft(**changes) -> LlamaForCausalLM:
    """A small text-only assistant with the same vocabulary."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, pad_token_id=0, **sizes | changes)).eval()
    model.generation_config.eos_token_id = None
    return model


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "beams, several returned": {"num_beams": 4, "num_return_sequences": 2},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "repetition penalty": {"repetition_penalty": 1.3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant_model": draft},
}
ONE_ROW = ("prompt lookup", "assisted")  # transformers allows no batches there


def answer(model, inputs, seed=0, **arguments):
    arguments = {"max_new_tokens": STEPS, "do_sample": False} | arguments
    if callable(arguments.get("assistant_model")):
        arguments["assistant_model"] = draft()
    torch.manual_seed(seed)
    with torch.no_grad():
        return model.generate(**inputs, **arguments)


def rows_per_sample(mode: dict) -> int:
    return max(mode.get("num_beams", 1), mode.get("num_return_sequences", 1))


def skip_unless_assisted(model, inputs):
    """``generate`` hands images (up to 5.0) and token types to the assistant too, and a text model takes none."""
    try:
        answer(model, inputs, assistant_model=draft)
    except ValueError as error:
        if "are not used by the model" not in str(error):
            raise
        pytest.skip("a text model cannot assist this one")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CHOSEN)
def test_equal_to_the_definition(name, mode):
    family = FAMILIES[name]
    rows, exits = (ROWS, EXITS) if mode not in ONE_ROW else (ROWS[:1], EXITS[:1])
    inputs, arguments = family.batch(*rows), MODES[mode]
    if mode == "assisted":
        skip_unless_assisted(family.build("eager"), inputs)
    if mode == "prompt lookup":
        if not takes_guesses(family):
            pytest.skip("transformers itself cannot take guesses back here")
        ids = inputs["input_ids"]
        ids[(ids >= 3) & (ids < 80)] = 7  # repetitive, so that there is something to look up
    eager, exits = family.build("eager"), torch.tensor(exits)
    with masked_visual_columns(eager, family.visual(inputs), exits):
        expected = answer(eager, inputs, **arguments)
    each = exits.repeat_interleave(rows_per_sample(arguments))
    with dyvte.visual_exit(family.build(), dyvte.FixedExit(each)) as handle:
        out = answer(family.build(), inputs, **arguments)
    assert out.tolist() == expected.tolist()
    assert set(handle.layers.tolist()) == set(exits.tolist())


@pytest.mark.parametrize("mode", ["greedy", "without a cache", "prompt lookup", "assisted"])
def test_only_the_prompt_decides(mode):
    """A policy that reads the text state sees the same state however the answer is decoded."""
    family = FAMILIES["llava"]
    model, inputs = family.build(), family.batch(ROWS[0])
    if mode == "assisted":
        skip_unless_assisted(model, inputs)
    seen = []

    class Reading(dyvte.ExitPolicy):
        def plan(self, batch_size, num_layers):
            return None

        def leaves(self, layer, state):
            seen.append(state)
            return torch.tensor([layer == 3])

    modes = MODES | {"without a cache": {"use_cache": False}}
    with dyvte.visual_exit(model, Reading()):
        answer(model, inputs)
        answer(model, inputs, **modes[mode])
    assert len(seen) >= 6 and len(seen) % 3 == 0
    for first in range(3, len(seen), 3):
        torch.testing.assert_close(torch.cat(seen[first : first + 3]), torch.cat(seen[:3]), atol=1e-5, rtol=1e-4)


def test_a_generated_placeholder_is_text():
    family = FAMILIES["llava"]
    inputs = family.batch([3, "image", 5])
    bias = {"sequence_bias": {(90,): 100.0}, "suppress_tokens": None}
    with dyvte.visual_exit(family.build(), dyvte.FixedExit(2)):
        assert answer(family.build(), inputs, **bias)[0, -STEPS:].tolist() == [90] * STEPS


def test_a_sequence_that_ends_early_leaves_the_others_alone():
    family = FAMILIES["llava"]
    model, inputs = family.build(), family.batch(*ROWS)
    with dyvte.visual_exit(model, dyvte.FixedExit(EXITS)):
        free = answer(model, inputs)
        stop = int(free[0, -STEPS + 1])
        ended = answer(model, inputs, eos_token_id=stop)
    assert ended[0, -STEPS + 2 :].tolist() == [0] * (STEPS - 2) or ended.shape[1] < free.shape[1]
    if stop not in free[1, -STEPS:].tolist():
        assert ended[1].tolist() == free[1].tolist()


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("way", ["forward", "generate", "config"])
def test_states_of_layers_are_refused_before_work(name, way):
    model = FAMILIES["llava"].build.__wrapped__(FAMILIES["llava"], "eager")
    inputs = FAMILIES["llava"].batch(ROWS[0])
    model.model.vision_tower.register_forward_pre_hook(lambda *_: pytest.fail("work has begun"))
    if way == "config":
        setattr(model.config.text_config, name, True)
    with dyvte.visual_exit(model, dyvte.FixedExit(2)), pytest.raises(ValueError, match=f"{name}=True does not work"):
        if way == "generate":
            answer(model, inputs, **{name: True}, return_dict_in_generate=True)
        else:
            model(**inputs, **({name: True} if way == "forward" else {}))


def test_streams_of_two_conversations_may_interleave():
    """Two caches under one handle: what an exit did is in the cache, not in the model."""
    family = FAMILIES["llava"]
    model, (first, second) = family.build(), [family.batch([3, "image", 5]), family.batch(*ROWS, seed=3)]

    def run(order):
        states = [dict(first), dict(second)]
        chosen = [[], []]
        with torch.no_grad(), dyvte.visual_exit(model, HalfWay()):
            for which in order:
                state = states[which]
                out = model(**state, use_cache=True)
                ids = out.logits[:, -1:].argmax(-1)
                chosen[which].append(ids.flatten().tolist())
                mask = torch.cat([state["attention_mask"], torch.ones_like(ids)], 1)
                position = mask.sum(1, keepdim=True) - 1
                states[which] = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
                states[which][CACHE] = call_cache(out)
        return chosen

    class HalfWay(dyvte.ExitPolicy):
        def plan(self, batch_size, num_layers):
            return torch.arange(batch_size) + 2

    apart = run([0] * 4 + [1] * 4)
    assert run([0, 1] * 4) == apart
    assert run([1, 0, 0, 1, 1, 0, 1, 0]) == apart


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("merged", [False, True])
def test_lora(merged):
    family = FAMILIES["llava"]
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    inputs, exits = family.batch(*ROWS), torch.tensor(EXITS)

    def tuned(attention):
        torch.manual_seed(5)
        model = peft.get_peft_model(family.build.__wrapped__(family, attention), config).eval()
        return model.merge_and_unload() if merged else model

    eager, model = tuned("eager"), tuned("sdpa")
    with masked_visual_columns(eager, family.visual(inputs), exits):
        expected = answer(eager, inputs)
    with dyvte.visual_exit(model, dyvte.FixedExit(exits)) as handle:
        out = answer(model, inputs)
    assert out.tolist() == expected.tolist() and handle.layers.tolist() == EXITS
    assert out.tolist() != answer(family.build(), inputs).tolist()


@pytest.mark.parametrize("where", ["whole", "in place", "a layer"])
def test_compiled_models_are_refused(where):
    model = FAMILIES["llava"].build.__wrapped__(FAMILIES["llava"])
    given = model
    if where == "whole":
        given = torch.compile(model)
    elif where == "in place":
        model.compile()
    else:
        model.get_decoder().layers[1].compile()
    with pytest.raises(ValueError, match="compiled model.*_orig_mod"):
        dyvte.attach(given, dyvte.FixedExit(2))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("way", ["cpu offload", "disk offload", "dispatch"])
def test_offloaded_weights(way, tmp_path):
    """accelerate moves weights and inputs in wrappers of ``forward``; the side run calls the layer again."""
    family = FAMILIES["llava"]
    inputs = family.batch(*ROWS)
    with dyvte.visual_exit(family.build(), dyvte.FixedExit(EXITS)):
        expected = answer(family.build(), inputs)
    model = family.build.__wrapped__(family)
    if way == "cpu offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif way == "disk offload":
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        names = {f"model.language_model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(LAYERS)}
        rest = ("model.vision_tower", "model.multi_modal_projector", "lm_head", "model.language_model.embed_tokens")
        names |= dict.fromkeys((*rest, "model.language_model.norm", "model.language_model.rotary_emb"), "cpu")
        accelerate.dispatch_model(model, names, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    with dyvte.visual_exit(model, dyvte.FixedExit(EXITS)) as handle:
        assert answer(model, inputs).tolist() == expected.tolist()
    assert handle.layers.tolist() == EXITS


class EightBit(torch.nn.Module):
    """A stand-in for a quantised linear: int8 weights with one scale per row, no ``weight`` to touch."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.scale = torch.nn.Buffer(scale)
        self.packed = torch.nn.Buffer((linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, states):
        return states @ (self.packed.to(states.dtype) * self.scale).T


def test_quantised_base():
    family = FAMILIES["llava"]
    inputs, exits = family.batch(*ROWS), torch.tensor(EXITS)

    def quantised(attention):
        model = family.build.__wrapped__(family, attention)
        for layer in model.get_decoder().layers:
            for owner in (layer.self_attn, layer.mlp):
                for name, linear in list(owner.named_children()):
                    if isinstance(linear, torch.nn.Linear):
                        setattr(owner, name, EightBit(linear))
        return model

    eager, model = quantised("eager"), quantised("sdpa")
    with masked_visual_columns(eager, family.visual(inputs), exits):
        expected = answer(eager, inputs)
    with dyvte.visual_exit(model, dyvte.FixedExit(exits)):
        assert answer(model, inputs).tolist() == expected.tolist()


def test_the_system_prompt_may_be_in_the_cache_already():
    """A prefix of text shared by conversations is a turn without images."""
    family = FAMILIES["llava"]
    if not family.sees_later_images():
        pytest.skip("generate itself drops the images of later turns")
    inputs = family.batch([8, "image", 5])
    prefix = {k: inputs[k][:, :6] for k in ("input_ids", "attention_mask")}
    eager, model = family.build("eager"), family.build()
    with masked_visual_columns(eager, family.visual(inputs), torch.tensor([2])):
        expected = answer(eager, inputs)
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.FixedExit(2)) as handle:
        cache = call_cache(model(**prefix, use_cache=True))
        out = answer(model, inputs, **{CACHE: copy.deepcopy(cache)})
        again = answer(model, inputs, **{CACHE: cache})
    assert out.tolist() == expected.tolist() == again.tolist() and handle.layers.tolist() == [2]


def test_a_cache_cannot_be_cropped_into_the_prompt():
    family = FAMILIES["llava"]
    model = family.build()
    with torch.no_grad(), dyvte.visual_exit(model, dyvte.FixedExit(2)):
        cache = call_cache(model(**family.batch([3, "image", 5]), **{CACHE: DynamicCache()}))
    with pytest.raises(ValueError, match="Start a new cache"):
        cache.crop(-8)
