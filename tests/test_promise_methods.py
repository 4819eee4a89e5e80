"""Any method: its family of settings, teacher forcing against real decoding, and the promise of a whole calibration."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from families import FAMILIES as MODELS
from models import LAYERS, PATCHES, batch_of, prompt, tiny_llava
from scipy.stats import beta
from tiny_llava import random_reference

import dyvte
import dyvte.training.outcomes as module
from dyvte.cli.main import main
from dyvte.config import MethodConfig
from dyvte.data import load_samples
from dyvte.methods import METHODS, by_name
from dyvte.methods.families import FAMILIES, Family, Shape, build
from dyvte.promise import Promise
from dyvte.runtime.decoder import DecoderSpec
from dyvte.training.agreement import dense_answers, keeps_answers
from dyvte.training.promise import calibrate_config, calibrate_method

RAGGED = [prompt(3, 5, seed=1), prompt(1, 9, seed=2), prompt(6, 1, seed=3), prompt(2, 4, images=2, seed=4)]
STEPS = 3


def family_of(model, method: str, **more) -> Family:
    return Family.of(method, Shape.of(DecoderSpec.of(model), PATCHES), **more)


@torch.no_grad()
def decoded(model, method, inputs) -> torch.Tensor:
    with dyvte.reduce_tokens(model, method) as handle:
        ids = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    shares = handle.record[0].counts.sum(0) / (handle.record[0].visual * handle.num_layers)
    return ids, 1 - shares.double()


def check_agreement(model, inputs, methods) -> set[bool]:
    """Every method says under teacher forcing what it does when it decodes."""
    ids, answer = dense_answers(model, inputs, STEPS)
    outcomes = set()
    for method in methods:
        same, saved = keeps_answers(model, method, inputs, ids, answer)
        real, real_saved = decoded(model, method, inputs)
        padded = torch.nn.functional.pad(real, (0, ids.shape[1] - real.shape[1]))
        assert same.tolist() == ((padded == ids) | ~answer).all(1).tolist(), vars(method)
        assert torch.allclose(saved, real_saved)
        outcomes |= set(same.tolist())
    return outcomes


@pytest.mark.parametrize("name", FAMILIES)
def test_teacher_forcing_is_what_decoding_does(name):
    """In ragged batches, padded on the left, with one or two images; from the safest setting to the boldest."""
    model, inputs = tiny_llava(), batch_of(*RAGGED)
    family = family_of(model, name)
    methods = [build(family.methods, setting) for setting in family.settings[:: max(1, len(family.settings) // 5)]]
    check_agreement(model, inputs, [*methods, build(family.methods, family.settings[-1])])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "idefics3"])
def test_on_other_families_of_models(name):
    model = MODELS[name].build()
    inputs = MODELS[name].batch([3, "image", 5], [1, "image", 9])
    layer = max(2, DecoderSpec.of(model).min_layer)
    methods = [dyvte.FastV(layer, 0.5), dyvte.FixedExit(layer), dyvte.FastV(layer, 0.3) & dyvte.FixedExit(layer + 1)]
    check_agreement(model, inputs, methods)


@pytest.mark.parametrize("rows", ["prompt", "all"])
def test_what_is_skipped_in_prompts_is_not_skipped_in_answers(rows):
    methods = [by_name("skip_computations", layers=[1, 3], part=part, rows=rows) for part in ("ffn", "block")]
    check_agreement(tiny_llava(), batch_of(*RAGGED), methods)


def test_both_outcomes_happen():
    model, inputs = tiny_llava(), batch_of(*RAGGED)
    assert check_agreement(model, inputs, [dyvte.FixedExit(e) for e in range(1, LAYERS + 1)]) == {True, False}


def test_every_method_declares_its_settings():
    assert set(FAMILIES) == set(METHODS) - {"never", "eas"}  # trained adapters, which only the user can name
    model, inputs = tiny_llava(), batch_of(*RAGGED)
    ids, answer = dense_answers(model, inputs, STEPS)
    for name in FAMILIES:
        family = family_of(model, name)
        first, last = (build(family.methods, family.settings[i]) for i in (0, -1))
        for setting in family.settings:
            build(family.methods, setting).check(DecoderSpec.of(model))
        if name not in ("layer_cut", "image_text_interaction"):  # these cannot do nothing
            same, saved = keeps_answers(model, first, inputs, ids, answer)
            assert same.all() and (saved == 0).all(), name
        if not isinstance(last, dyvte.LayerEdit):
            assert (keeps_answers(model, last, inputs, ids, answer)[1] > 0).any(), name


@pytest.mark.parametrize(
    "method, more, match",
    [
        ("never", {}, "no settings are declared for 'never'"),
        ("fast-v", {"settings": [{"keep": 1}]}, "no family of settings for methods"),
        ("fastv & fixed", {}, "give settings="),
        ("fastv & fixed", {"settings": [{"fastv.keep": 1}]}, "must be named method.argument"),
        ("fastv", {"settings": [{"keep": 1}, {"layer": 2}]}, "must name the same arguments"),
        ("fastv", {"settings": []}, "must be a list of mappings"),
    ],
)
def test_settings_that_are_none(method, more, match):
    with pytest.raises(ValueError, match=match):
        family_of(tiny_llava(), method, **more)


def test_declared_settings_can_be_changed():
    model = tiny_llava()
    family = family_of(model, "fastv", fixed={"layer": 3})
    assert all(setting["fastv.layer"] == 3 for setting in family.settings)
    path = [{"fastv.layer": 2, "fastv.keep": keep, "fixed.layer": exit} for keep, exit in ((1, 6), (0.5, 6), (0.5, 4))]
    method = build(("fastv", "fixed"), family_of(model, "fastv & fixed", settings=path).settings[2])
    assert [type(part).__name__ for part in method.parts()] == ["FastV", "FixedExit"]


@pytest.fixture(scope="module")
def mllm():
    return random_reference()


def scenes(n=80, seed=5):
    return load_samples({"scenes": {"split": "dev", "n": n, "seed": seed}})


class Renamed(list):
    """Other samples that say they are the same."""

    def __init__(self, n: int, seed: int):
        super().__init__(scenes(n, seed))
        self.fingerprint = scenes(n).fingerprint


def run(mllm, folder, method="fastv", **more):
    samples = more.pop("samples", None) or scenes()
    settings = {"alpha": 0.3, "max_new_tokens": STEPS, "progress": False, "batch_size": 16} | more
    return calibrate_method(*mllm, samples, folder, method, **settings)


def test_a_calibration_from_samples_to_a_method_at_work(mllm, tmp_path):
    promise = run(mllm, tmp_path)
    family = family_of(mllm[0], "fastv")
    tried = len(promise.curve)
    assert [promise.curve.setting(i) for i in range(tried)] == list(family.settings[:tried])
    # Fixed-sequence testing, by its definition: one setting after the other, up to the first whose bound is too high.
    for risk, bound in zip(promise.curve.risk, promise.curve.bound):
        k = round(risk * 80)
        assert bound == pytest.approx(beta.ppf(0.9, k + 1, 80 - k) if k < 80 else 1)
    assert all(bound <= 0.3 for bound in promise.curve.bound[:-1]) and promise.bound <= 0.3
    assert promise.curve.bound[-1] > 0.3 and promise.chosen == tried - 2
    method = dyvte.load(tmp_path)
    assert method.promise == promise and method.method.keep == promise.setting["fastv.keep"]
    # The share of changed answers is what decoding with the loaded method gives.
    model, processor = mllm
    from dyvte.data import encode

    changed = 0
    for start in range(0, 80, 40):
        inputs = encode(processor, scenes()[start : start + 40])
        with torch.no_grad():
            dense = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
            with dyvte.reduce_tokens(model, method):
                changed += int((model.generate(**inputs, max_new_tokens=STEPS, do_sample=False) != dense).any(1).sum())
    assert changed / 80 == pytest.approx(promise.risk)
    bolder = dyvte.load(tmp_path, risk=0.9)
    assert bolder.promise.alpha == 0.9 and bolder.method.keep == promise.curve.settings["fastv.keep"][-1]


def test_it_goes_on_where_it_stopped(mllm, tmp_path, monkeypatch):
    whole = run(mllm, tmp_path / "once")
    real, calls = module.keeps_answers, []

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "keeps_answers", stops)
    with pytest.raises(KeyboardInterrupt):
        run(mllm, tmp_path / "twice")
    assert not (tmp_path / "twice/promise.json").exists()
    assert run(mllm, tmp_path / "twice") == whole
    passes = len(calls)
    monkeypatch.setattr(module, "dense_answers", None)  # nothing is answered or tried again
    assert run(mllm, tmp_path / "twice") == whole and len(calls) == passes
    assert run(mllm, tmp_path / "twice", alpha=0.2).chosen <= whole.chosen and len(calls) == passes
    (next((tmp_path / "twice/work/settings").iterdir())).write_text("{")
    with pytest.warns(UserWarning, match="is damaged"):
        assert run(mllm, tmp_path / "twice") == whole


def test_it_is_about_this_model_and_these_samples(mllm, tmp_path):
    run(mllm, tmp_path / "it")
    model, processor = mllm
    other = type(model)(model.config).eval()
    with pytest.raises(ValueError, match="holds traces made otherwise .*other weights"):
        run((other, processor), tmp_path / "it")
    with pytest.raises(ValueError, match="another image or text than when it was answered"):
        run(mllm, tmp_path / "it", samples=Renamed(80, seed=6))
    method = dyvte.load(tmp_path / "it")
    for attached in (method, method & dyvte.FixedExit(2)):
        with pytest.raises(ValueError, match="this promise is about other weights"):
            dyvte.attach(other, attached)
    dyvte.attach(other, dyvte.load(tmp_path / "it", other_weights=True)).detach()
    record = json.loads((tmp_path / "it/promise.json").read_text())
    shutil.copytree(tmp_path / "it", tmp_path / "forged")
    record["curve"]["bound"][record["chosen"] + 1] = record["alpha"]
    (tmp_path / "forged/promise.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="calibrate again"):
        dyvte.load(tmp_path / "forged")
    with pytest.raises(ValueError, match="neither a promise nor exit heads"):
        dyvte.load(tmp_path)


def test_bad_calibrations_say_what_to_do(mllm, tmp_path):
    with pytest.raises(ValueError, match="at least 230 held-out samples"):
        run(mllm, tmp_path, alpha=0.01)
    with pytest.raises(ValueError, match="outside 0 ... 4"):
        run(mllm, tmp_path, fixed={"layer": 9})
    with pytest.raises(ValueError, match="calibrated on traces"):
        run(mllm, tmp_path, "learned", settings=[{"threshold": 1}])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="not even the safest setting, .*layer': 1}, keeps the risk below"):
        run(mllm, tmp_path, "fixed", settings=[{"layer": 1}], alpha=0.03)


def test_from_a_config_and_from_the_command_line(mllm, tmp_path, capsys):
    for part in mllm:
        part.save_pretrained(tmp_path / "model")
    data = {"scenes": {"split": "dev", "n": 40, "seed": 5}}
    told = {"model": str(tmp_path / "model"), "data": data, "output": str(tmp_path / "it"), "dtype": "float32"}
    settings = [{"layer": 4}, {"layer": 1}]
    config = MethodConfig(method="fixed", settings=settings, alpha=0.2, max_new_tokens=STEPS, batch_size=20, **told)
    promise = calibrate_config(config)
    assert promise == Promise.read(tmp_path / "it") and promise.data[0]["scenes"] == data["scenes"]
    dyvte.attach(mllm[0], dyvte.load(tmp_path / "it")).detach()  # the same weights
    with pytest.raises(ValueError, match="alpha is what is promised"):
        calibrate_config(replace(config, alpha=None))
    told |= {"method": "fixed", "settings": settings, "max_new_tokens": STEPS, "batch_size": 20}
    (tmp_path / "method.yaml").write_text(yaml.safe_dump(told))
    main(["calibrate", str(tmp_path / "method.yaml"), f"output={tmp_path / 'again'}", "alpha=0.2"])
    assert json.loads(capsys.readouterr().out)["alpha"] == 0.2
    again = Promise.read(tmp_path / "again")
    assert (again.setting, again.curve) == (promise.setting, promise.curve)
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", "method=fixed", "--help"])
    assert stopped.value.code == 0 and "method=" in capsys.readouterr().out
