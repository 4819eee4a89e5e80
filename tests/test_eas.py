"""EAS on running models against a slow definition: layers rewritten by hand, whole sequences, no cache."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import peft
import pytest
import torch
from families import FAMILIES
from models import CACHE, IMAGE_ID, LAYERS, batch_of, tiny_llava
from safetensors.torch import load_file, save_file
from test_pruning import RAGGED, STEPS, generate, greedy
from torch import nn

import dyvte
from dyvte import EAS, FastV, FixedExit, reduce_tokens
from dyvte.identity import model_fingerprint
from dyvte.methods.eas_adapters import EASAdapters, EASAdaptersConfig
from dyvte.methods.yopo import HeadCut
from dyvte.runtime.compat import call_cache
from dyvte.runtime.decoder import DecoderSpec

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
SKIPPED, NEVER = [1, 3, 4], LAYERS + 1
EXITS = [[LAYERS] * 4, [3, 5, 6, 4], [1, 4, 2, 6]]


def adapters_for(model, skipped=SKIPPED, adapted=None, **changes) -> EASAdapters:
    """Random ones that change a lot."""
    layers = DecoderSpec.of(model).num_layers
    adapted = [layer for layer in range(layers) if layer not in skipped] if adapted is None else adapted
    settings = {"skipped": skipped, "adapted": adapted, "width": 8, "adapted_width": 6, "temperature": 2} | changes
    adapters = EASAdapters(EASAdaptersConfig(num_layers=layers, hidden_size=32, **settings)).eval()
    for number, parameter in enumerate(adapters.parameters()):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    return adapters


@contextmanager
def rewritten(model, adapters, prompt, gone_from):
    """The definition: prompt bool and gone_from long [n, prompt length]; gone columns count in no mean."""
    layers, restore = model.model.language_model.layers, []

    def asked(index, states):
        mask = torch.zeros(states.shape[:2], dtype=torch.bool)
        mask[:, : prompt.shape[1]] = prompt & (gone_from > index)
        return mask

    def without_attention(index, layer, adapter):
        def forward(hidden, **given):
            states = layer.input_layernorm(hidden)
            adapted = adapter(states, asked(index, states))
            return hidden + layer.mlp(adapted * layer.post_attention_layernorm.weight)

        return forward

    def before(index, adapter):
        def hook(module, args, kwargs):
            states = kwargs["hidden_states"]
            return args, kwargs | {"hidden_states": adapter(states, asked(index, states))}

        return hook

    for name, adapter in adapters.skipped.items():
        layer = layers[int(name)]
        layer.forward = without_attention(int(name), layer, adapter)
        restore.append(lambda layer=layer: delattr(layer, "forward"))
    for name, adapter in adapters.adapted.items():
        hook = before(int(name), adapter)
        restore.append(layers[int(name)].self_attn.register_forward_pre_hook(hook, with_kwargs=True).remove)
    try:
        yield
    finally:
        for undo in restore:
            undo()


@pytest.mark.parametrize("attention, fold", [("eager", False), ("sdpa", False), ("sdpa", True)])
@pytest.mark.parametrize("exits", EXITS)
@torch.no_grad()
def test_ragged_batches_with_and_without_an_exit(exits, attention, fold):
    inputs, exits = batch_of(*RAGGED), torch.tensor(exits)
    visual = inputs["input_ids"] == IMAGE_ID
    gone_from = torch.where(visual, torch.where(exits < LAYERS, exits, NEVER)[:, None], NEVER)
    eager, model = tiny_llava("eager"), tiny_llava(attention)
    adapters = adapters_for(model)
    with rewritten(eager, adapters, inputs["attention_mask"].bool(), gone_from):
        expected_ids, expected = greedy(eager, inputs, gone_from)
    dense = generate(model, inputs, output_logits=True, return_dict_in_generate=True)
    method = EAS(adapters, fold)
    method = method if bool((exits == LAYERS).all()) else method & FixedExit(exits.tolist())
    settings = {"output_logits": True, "return_dict_in_generate": True}
    with reduce_tokens(model, method) as handle:
        twice = [generate(model, inputs, **settings) for _ in range(2)]  # nothing of a prompt is left for the next
        uncached = generate(model, inputs, use_cache=False)
    for out in twice:
        assert out.sequences[:, -STEPS:].tolist() == expected_ids.tolist()
        for step in range(STEPS):
            torch.testing.assert_close(out.logits[step], expected[step], atol=2e-5, rtol=1e-4)
    assert uncached.tolist() == twice[0].sequences.tolist()
    assert handle.record[0].layers.tolist() == exits.tolist()
    assert not torch.allclose(twice[0].logits[0], dense.logits[0], atol=1e-2)
    again = generate(model, inputs, output_logits=True, return_dict_in_generate=True)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, dense.logits))


@pytest.mark.parametrize("fold", [False, True], ids=["unfolded", "folded"])
def test_beams(fold):
    model, inputs = tiny_llava(), batch_of(*RAGGED)
    with reduce_tokens(model, EAS(adapters_for(model), fold) & FixedExit(3)):
        cached, uncached = (generate(model, inputs, num_beams=3, use_cache=cache) for cache in (True, False))
    assert cached.tolist() == uncached.tolist()


@pytest.mark.parametrize("fold", [False, True], ids=["unfolded", "folded"])
def test_skipped_attentions_do_no_work(fold):
    model, inputs, calls = tiny_llava(), batch_of(*RAGGED), {}
    for index, layer in enumerate(model.model.language_model.layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            count = lambda *_, key=(index, name): calls.__setitem__(key, calls.get(key, 0) + 1)  # noqa: E731
            getattr(layer.self_attn, name).register_forward_hook(count)
    with reduce_tokens(model, EAS(adapters_for(model), fold)) as handle:
        out = generate(model, inputs, return_dict_in_generate=True)
    tokens = inputs["attention_mask"].sum(1)
    for layer, cached in enumerate(handle.record[0].cached):
        assert torch.equal(cached, tokens * (layer not in SKIPPED))
    assert {index for index, _ in calls} == set(range(LAYERS)) - set(SKIPPED)
    assert set(calls.values()) == {STEPS}
    cache = call_cache(out)
    assert [not cache.layers[i].is_initialized for i in range(LAYERS)] == [i in SKIPPED for i in range(LAYERS)]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_other_models_fold_as_they_run_unfolded(name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.batch([3, "image", 5], [1, "image", 9])
    adapters, out = adapters_for(model, [1, 3]), []
    for fold in (False, True):
        with reduce_tokens(model, EAS(adapters, fold) & FixedExit(family.first + 1)):
            settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
            out.append(model.generate(**inputs, **settings, return_dict_in_generate=True))
    for unfolded, folded in zip(out[0].logits, out[1].logits):
        torch.testing.assert_close(folded, unfolded, atol=1e-4, rtol=1e-3)


def test_a_later_turn_uses_what_its_prompt_left_and_another_cache_is_refused():
    model, inputs = tiny_llava(), batch_of(RAGGED[0], RAGGED[1])
    more = torch.randint(3, 80, (2, 4), generator=torch.Generator().manual_seed(1))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), reduce_tokens(model, EAS(adapters_for(model))):
        first = model(**inputs, position_ids=position[:, :-4], use_cache=True)
        later = {"input_ids": more, "attention_mask": mask, "position_ids": position[:, -4:]}
        together = model(**later, **{CACHE: call_cache(first)}).logits
        cache = call_cache(model(**inputs, position_ids=position[:, :-4], use_cache=True))
        for step in range(4):
            one = {"input_ids": more[:, step : step + 1], "attention_mask": mask[:, : mask.shape[1] - 3 + step]}
            place = position[:, step - 4][:, None]
            logits = model(**one, position_ids=place, **{CACHE: cache}).logits
            torch.testing.assert_close(logits[:, 0], together[:, step], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        filled = call_cache(model(**inputs, use_cache=True))
        with reduce_tokens(model, EAS(adapters_for(model))), pytest.raises(ValueError, match="filled without these"):
            model(**later, **{CACHE: filled})


def test_a_checkpoint_comes_back_whole_or_is_refused(tmp_path):
    model, inputs = tiny_llava(), batch_of(*RAGGED)
    adapters = adapters_for(model)
    adapters.config.identity = {"weights": model_fingerprint(model), "dtype": "float32"}
    adapters.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    with reduce_tokens(model, EAS(adapters)):
        expected = generate(model, inputs)
    with reduce_tokens(model, dyvte.methods.by_name("eas", adapters=tmp_path)):
        assert torch.equal(generate(model, inputs), expected)
    other = tiny_llava(seed=1)
    with pytest.raises(ValueError, match="trained on other weights"):
        dyvte.attach(other, EAS(tmp_path))
    dyvte.attach(other, EAS(tmp_path, other_weights=True)).detach()
    with pytest.raises(ValueError, match="trained on other weights"):  # a peft adapter makes another model of it
        lora = peft.LoraConfig(target_modules=".*language_model.*q_proj", init_lora_weights=False)
        dyvte.attach(peft.get_peft_model(model, lora), EAS(tmp_path))

    weights = load_file(tmp_path / "model.safetensors")
    name = next(iter(weights))
    for changed, match in (
        ({k: v for k, v in weights.items() if k != name}, f"missing weights: {name}"),
        (weights | {"more": weights[name].clone()}, "unexpected weights: more"),
        (weights | {name: weights[name][:1].clone()}, f"another shape: {name}"),
    ):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=match):
            EASAdapters.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="damaged"):
        EASAdapters.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "dyvte_eas", "layer": 2}')
    with pytest.raises(ValueError, match=r"unknown keys \['layer'\] and lacks \['hidden_size', 'num_layers'"):
        EASAdapters.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing"):
        EASAdapters.load(tmp_path)


def test_on_a_lora_base():
    model, inputs = tiny_llava(), batch_of(*RAGGED)
    targets = r".*language_model.*\.(q_proj|v_proj|gate_proj)"
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    adapters = adapters_for(model)
    with reduce_tokens(model, EAS(adapters)):
        expected = generate(model, inputs, output_logits=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="merge"):
        dyvte.attach(model, EAS(adapters, fold=True))
    merged = model.merge_and_unload()
    with reduce_tokens(merged, EAS(adapters, fold=True)):
        folded = generate(merged, inputs, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(torch.stack(folded.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-3)


def test_what_does_not_fit_is_refused():
    model = tiny_llava()
    adapters = adapters_for(model)
    keep = torch.ones(LAYERS, 4, dtype=torch.bool)
    keep[2] = False
    for method, match in (
        (EAS(adapters_for(model, [0])), "layer 0, the first of its kind"),
        (EAS(adapters) & FastV(2, 0.5), "reads the attention of layer 1, which is skipped"),
        (EAS(adapters, fold=True) & HeadCut(keep), "use it unfolded"),
        (EAS(adapters) & EAS(adapters), "two methods adapt layer"),
        (EAS(EASAdapters(replace(adapters.config, num_layers=7))), "fit a decoder of 7 layers"),
    ):
        with pytest.raises(ValueError, match=match):
            dyvte.attach(model, method)
    with pytest.raises(ValueError, match="adapters for skipped attentions"):
        EAS(adapters, skipped=[2])
    gemma = FAMILIES["gemma3"].build()
    with pytest.raises(ValueError, match="cannot skip the attention of layer"):
        dyvte.attach(gemma, EAS(adapters_for(gemma, [4], [])))
    inputs = batch_of(RAGGED[0])
    labels = torch.where(torch.arange(inputs["input_ids"].shape[1]) == inputs["input_ids"].shape[1] - 1, 5, -100)
    with pytest.raises(ValueError, match="cannot be traced on top of"):
        dyvte.trace_batch(model, inputs | {"labels": labels[None]}, pruning=EAS(adapters))
