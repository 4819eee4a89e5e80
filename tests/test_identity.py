"""The promise is about one model and samples that trained nothing: what is refused, what is accepted."""

from __future__ import annotations

import copy
import os
import random
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from accelerate import cpu_offload
from models import LAYERS, batch_of, prompt, tiny_llava
from PIL import Image
from test_fitting import SIZE, made_up_traces
from tiny_llava import random_reference

import dyvte
import dyvte.identity as identity
from dyvte.cli.policies import make_policies
from dyvte.data import Sample, image_digest, sample_digest
from dyvte.heads import ExitHeads
from dyvte.identity import model_fingerprint, processor_fingerprint
from dyvte.methods.learned import LearnedExit
from dyvte.training.calibrate import calibrate, exits_at
from dyvte.training.content import Content
from dyvte.training.fit import FitSettings, fit_heads, probability_of, quality
from dyvte.training.held_out import check_held_out
from dyvte.training.store import load_traces
from dyvte.training.write import write_traces


def adapted(model):
    torch.manual_seed(0)
    settings = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    return peft.inject_adapter_in_model(settings, copy.deepcopy(model))


def one_value(model):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_decoder().layers[-1].mlp.down_proj.weight[-1, -1] += 1e-4
    return changed


def swapped(model):
    changed = copy.deepcopy(model)
    layers = changed.get_decoder().layers
    layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp
    return changed


def scaled(model):
    changed = adapted(model)
    for module in changed.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2
    return changed


def moved(model, folder):
    model.save_pretrained(folder / "a")
    shutil.move(folder / "a", folder / "b")
    for file in (folder / "b").iterdir():
        os.utime(file, (1, 1))
    return type(model).from_pretrained(folder / "b", dtype=torch.float32)


def test_the_fingerprint_follows_every_value_and_no_name_of_a_folder(tmp_path):
    model = tiny_llava()
    same = [model, copy.deepcopy(model), moved(model, tmp_path), cpu_offload(copy.deepcopy(model))]
    assert len({model_fingerprint(one) for one in same}) == 1
    other = [model, one_value(model), swapped(model), copy.deepcopy(model).half(), adapted(model), scaled(model)]
    assert len({model_fingerprint(one) for one in other}) == len(other)


def test_the_fingerprint_is_made_once_for_a_model(monkeypatch):
    model, made = tiny_llava(), []
    real = identity._digest_of
    monkeypatch.setattr(identity, "_digest_of", lambda model: made.append(1) or real(model))
    first = [model_fingerprint(model) for _ in range(3)]
    assert len(made) == 1 and len(set(first)) == 1
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert model_fingerprint(model) != first[0] and len(made) == 2
    with pytest.raises(ValueError, match="has no values"):
        model_fingerprint(torch.nn.Linear(2, 2, device="meta"))


@pytest.fixture(scope="module")
def mllm():
    return random_reference()


def test_the_fingerprint_of_a_processor(mllm):
    processor = mllm[1]
    before = processor_fingerprint(processor)
    processor.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)  # leaves its mark in the tokenizer
    assert processor_fingerprint(processor) == before
    assert processor_fingerprint(processor, "{{ messages }}") != before
    other = copy.deepcopy(processor)
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert processor_fingerprint(other) != before
    other = copy.deepcopy(processor)
    other.tokenizer.add_tokens(["never seen"])
    assert processor_fingerprint(other) != before


def samples() -> list[Sample]:
    draw = random.Random(0)
    images = [Image.frombytes("RGB", (90, 90), draw.randbytes(90 * 90 * 3)) for _ in range(8)]
    return [Sample(f"s{i}", [image], "what is", [f"a{i}"], [], "k") for i, image in enumerate(images)]


def dotted(image):
    changed = image.copy()
    changed.putpixel((4, 4), (1, 2, 3))
    return changed


SETTINGS = {"batch_size": 2, "max_new_tokens": 2, "unit_size": 4}
EDITS = {
    "weights": (lambda m, p, s: (one_value(m), p, s), {}, "weights was .*load the one that was traced"),
    "adapter": (lambda m, p, s: (adapted(m), p, s), {}, "weights was .*another adapter"),
    "dtype": (lambda m, p, s: (copy.deepcopy(m).bfloat16(), p, s), {}, "dtype was 'float32', is 'bfloat16'"),
    "attention": (
        lambda m, p, s: (attending_otherwise(m), p, s),
        {},
        "attention was '(sdpa|eager)', is '(sdpa|eager)'",
    ),
    "batch size": (lambda m, p, s: (m, p, s), {"batch_size": 4}, "batch_size was 2, is 4: padding changes bits"),
    "template": (lambda m, p, s: (m, p, s), {"template": "{{ messages }}"}, "processor was"),
    "answers": (lambda m, p, s: (m, p, s), {"answers": "dataset"}, "answers was 'dense'"),
    "exits": (lambda m, p, s: (m, p, s), {"exits": 2}, "exits was None, is .1, 3."),
    "image": (lambda m, p, s: (m, p, [*s[:7], replace(s[7], images=[dotted(s[7].images[0])])]), {}, "such as 's7'"),
    "text": (lambda m, p, s: (m, p, [replace(s[0], question="what if"), *s[1:]]), {}, "1 samples .*'s0'"),
    "given answer": (lambda m, p, s: (m, p, [replace(s[0], answers=["b"]), *s[1:]]), {}, "1 samples .*'s0'"),
    "more": (lambda m, p, s: (m, p, [*s, replace(s[0], id="new")]), {}, "samples was 8, is 9"),
    "nothing": (lambda m, p, s: (copy.deepcopy(m), copy.deepcopy(p), [replace(one, id=one.id) for one in s]), {}, None),
    "name": (lambda m, p, s: (renamed(m), p, s), {}, None),
}


def attending_otherwise(model):
    changed = copy.deepcopy(model)
    changed.set_attn_implementation("eager" if changed.config._attn_implementation == "sdpa" else "sdpa")
    return changed


def renamed(model):
    changed = copy.deepcopy(model)
    changed.config._name_or_path = "/somewhere/else"
    return changed


@pytest.fixture(scope="module")
def traced(mllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces") / "here"
    write_traces(*mllm, samples(), folder, **SETTINGS)
    there = folder.with_name("there")
    folder.rename(there)
    for file in there.rglob("*"):
        os.utime(file, (1, 1))
    return there


@pytest.mark.parametrize("edit", EDITS)
def test_a_trace_goes_on_only_with_the_same_model_and_samples(mllm, traced, edit):
    change, more, match = EDITS[edit]
    arguments = change(*mllm, samples())
    if match is None:
        write_traces(*arguments, traced, **SETTINGS | more)
    else:
        with pytest.raises(ValueError, match=match):
            write_traces(*arguments, traced, **SETTINGS | more)
    assert len(load_traces(traced)) == 8


def test_folders_of_different_models_do_not_mix(mllm, traced, tmp_path):
    write_traces(one_value(mllm[0]), mllm[1], samples(), tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="does not go together with the other traces: weights"):
        load_traces(traced, tmp_path)


def heads_for(model, **more) -> ExitHeads:
    heads = fit_heads(made_up_traces(), FitSettings(epochs=1, width=8, guard=None), progress=False)
    config = heads.config.to_dict() | {"hidden_size": 32, "base_model": "models/tiny"} | more
    config["identity"] = {"weights": model_fingerprint(model), "dtype": "float32"} if model is not None else None
    return ExitHeads(type(heads.config)(**config))


def test_heads_run_on_the_weights_they_were_made_for(tmp_path):
    model, inputs = tiny_llava(), batch_of(prompt(3, 5))
    heads = heads_for(model)
    heads.save_pretrained(tmp_path)
    heads = ExitHeads.from_pretrained(tmp_path)
    model.config._name_or_path = "elsewhere/renamed"
    with torch.no_grad(), dyvte.visual_exit(model, LearnedExit(heads)):
        model(**inputs)
    for other in (one_value(model), copy.deepcopy(model).bfloat16()):
        with pytest.raises(ValueError, match="made for other weights .*no promise holds"):
            with dyvte.visual_exit(other, LearnedExit(heads)):
                pass
        with dyvte.visual_exit(other, LearnedExit(heads, other_weights=True)):
            pass
    unmarked = heads_for(None)
    with pytest.raises(ValueError, match="trained for models/tiny, not for elsewhere/renamed"):
        LearnedExit(unmarked).check(dyvte.runtime.decoder.DecoderSpec.of(model))
    model.config._name_or_path = "elsewhere/tiny"
    LearnedExit(unmarked).check(dyvte.runtime.decoder.DecoderSpec.of(one_value(model)))  # nobody can tell


def content(*names: str, images: str = "") -> Content:
    """Of made-up samples; images are called as their samples are, unless they have a name of their own."""
    shown = list(images or "".join(names))
    pictures = {name: Image.new("RGB", (2, 2), (ord(name), 0, 0)) for name in {*shown}}
    made = [Sample(n, [pictures[i]], f"question {n}", [], [], "") for n, i in zip("".join(names), shown)]
    return Content.of([sample_digest(s) for s in made], [[image_digest(i) for i in s.images] for s in made])


def test_calibration_samples_are_held_out_by_content(tmp_path):
    trained_on = content("abc").sketch()
    assert check_held_out(trained_on, content("xyz")) == 0
    with pytest.raises(ValueError, match="1 of the 3 samples to calibrate on are those the heads were trained on"):
        check_held_out(trained_on, content("xyc"))
    with pytest.raises(ValueError, match="2 of the 3 images .*allow it with shared_images"):
        check_held_out(trained_on, content("xyz", images="abz"))
    assert check_held_out(trained_on, content("xyz", images="abz"), shared_images=True) == 2
    heads = fit_heads(made_up_traces(), FitSettings(epochs=1), progress=False)
    heads.trained_on = trained_on
    heads.save_pretrained(tmp_path)
    heads = ExitHeads.from_pretrained(tmp_path)
    assert {k: v.tolist() for k, v in heads.trained_on.items()} == {k: v.tolist() for k, v in trained_on.items()}
    traces = made_up_traces(1000, seed=3)
    traces.content = content("xyc")
    with pytest.raises(ValueError, match="those the heads were trained on"):
        calibrate(heads, traces, alpha=0.1)
    traces.content = content("xyz", images="abz")
    calibrate(heads, traces, alpha=0.1, shared_images=True)
    assert heads.config.promise.shared_images == 2
    heads.trained_on = None
    with pytest.warns(UserWarning, match="do not remember their training samples"):
        calibrate(heads, traces, alpha=0.1)


def test_the_oracle_knows_samples_by_content(traced):
    (oracle,) = make_policies({"oracle": {"traces": str(traced)}}, None).values()
    given = samples()
    exits = oracle.of([replace(one, id="another name") for one in given])
    best = (load_traces(traced).agreement >= 1).int().argmax(1) + 1
    assert exits.layer.tolist() == best.tolist()
    with pytest.raises(ValueError, match="no exit layer for 1 samples, such as 's2': give one for every image and"):
        oracle.of([*given[:2], replace(given[2], question="what if")])


def test_what_is_not_a_number_is_named(mllm, tmp_path):
    model = copy.deepcopy(mllm[0])
    norm = model.get_decoder().layers[2].input_layernorm

    def spoil(module, args, output):
        output[-1] = float("nan")

    hook = norm.register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"sample 's\d': .*(NaN|not finite).*bfloat16 or float32"):
        write_traces(model, mllm[1], samples(), tmp_path, **SETTINGS)
    hook.remove()
    traces = made_up_traces()
    traces.state[17, 2, 3] = float("inf")
    with pytest.raises(ValueError, match="states of sample '17' are not finite"):
        fit_heads(traces, FitSettings(epochs=9), progress=False)


def test_heads_that_never_exit_are_said():
    heads, traces = fit_heads(made_up_traces(), FitSettings(epochs=5), progress=False), made_up_traces(60, seed=3)
    with pytest.raises(ValueError, match="at least 230 held-out samples are needed; 60 can show 0.0376 at best"):
        calibrate(heads, traces, alpha=0.01)
    traces = made_up_traces(240, seed=3)
    traces.agreement[:, :-1] = 0
    with pytest.warns(UserWarning, match=r"will never exit: alpha=.* with these 240 samples, or about \d+ samples"):
        calibrate(heads, traces, alpha=0.01)
    assert (exits_at(probability_of(heads, traces), heads.config.threshold) == LAYERS).all()


def test_exits_that_were_not_traced_are_not_chosen():
    traces, test = made_up_traces(), made_up_traces(900, seed=4)
    for part in (traces, test):
        part.provenance = part.provenance | {"exits": [2, 4]}
        untraced = [0, 2, 4]
        part.agreement[:, untraced], part.nll[:, untraced], part.kl[:, untraced] = 0, torch.nan, torch.nan
    for rule in ("agreement", "original"):
        heads = fit_heads(traces, FitSettings(epochs=10, width=16, label_rule=rule), progress=False)
        assert heads.config.exits == [2, 4] and LearnedExit(heads).layers == [2, 4]
        assert [row["exit_layer"] for row in quality(heads, test)["layers"]] == [2, 4]
        calibrate(heads, test, alpha=0.15)
        assert set(exits_at(probability_of(heads, test), heads.config.threshold).tolist()) == {2, 4, LAYERS}
    with pytest.raises(ValueError, match="decide exits .1, 2, 3, 4, 5., which|exits .1, 3, 5., which were not traced"):
        calibrate(fit_heads(made_up_traces(), FitSettings(epochs=1), progress=False), test, alpha=0.15)
    assert SIZE == traces.visual.shape[1]
