"""Exits on top of a pruning: traces of the pruned model, and one promise for both."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import beta
from tiny_llava import LAYERS, random_reference

import dyvte
from dyvte.data import encode, load_samples
from dyvte.methods import DivPrune, Folder, HiMAP, HollowAttention
from dyvte.training.agreement import dense_answers, keeps_answers
from dyvte.training.calibrate import calibrate, exits_at
from dyvte.training.fit import FitSettings, fit_heads, probability_of
from dyvte.training.store import load_traces
from dyvte.training.together import calibrate_together, declare_path, save_together
from dyvte.training.tracer import append_answer
from dyvte.training.write import write_traces

STEPS = 3
PRUNINGS = [{"fastv.layer": 1, "fastv.keep": keep} for keep in (1.0, 0.7, 0.4)]


@pytest.fixture(scope="module")
def mllm():
    return random_reference()


def scenes(n, seed):
    return load_samples({"scenes": {"split": "dev", "n": n, "seed": seed}})


@pytest.mark.parametrize(
    "pruning",
    [
        dyvte.FastV(1, 0.5),
        dyvte.FastV(2, 0.0),
        dyvte.RandomPruning(2, 0.3),
        HiMAP((1, 3), (0.6, 0.2)),
        DivPrune(0.4),
        Folder(0.6),
        dyvte.FastV(1, 0.5) & dyvte.FixedExit([3, 4, 1, 2, 4, 4, 2, 3]),
    ],
    ids=lambda pruning: "+".join(type(part).__name__ for part in pruning.parts()),
)
def test_a_trace_under_a_pruning_is_what_both_do_together(mllm, pruning):
    model, processor = mllm
    inputs = encode(processor, scenes(8, seed=3)[:8])
    ids, answer = dense_answers(model, inputs, STEPS)
    trace = dyvte.trace_batch(model, append_answer(dict(inputs), ids, answer), pruning=pruning)
    visual = (inputs["input_ids"] == model.config.image_token_index).sum(1)
    for layer in range(1, LAYERS + 1):
        same, saved = keeps_answers(model, pruning & dyvte.FixedExit(layer), inputs, ids, answer)
        assert (trace.agreement[:, layer - 1] >= 1).tolist() == same.tolist()
        assert torch.allclose(1 - trace.visual_counts[:, :layer].sum(1) / (visual * LAYERS).double(), saved)


def test_what_cannot_be_traced_so(mllm):
    model, processor = mllm
    inputs = dict(encode(processor, scenes(2, seed=3)[:2]))
    with pytest.raises(ValueError, match="needs the dense answer"):
        dyvte.trace_batch(model, inputs, pruning=dyvte.FastV(1, 0.5))
    ids, answer = dense_answers(model, inputs, STEPS)
    with pytest.raises(ValueError, match="HollowAttention changes what layers compute"):
        dyvte.trace_batch(model, append_answer(inputs, ids, answer), pruning=HollowAttention(None, 4))


@pytest.fixture(scope="module")
def traced(mllm, tmp_path_factory):
    """Traces of three sets of samples, under every pruning."""
    folder = tmp_path_factory.mktemp("traces")
    found = {}
    for name, n, seed in (("train", 60, 1), ("path", 60, 2), ("calibration", 120, 3)):
        for number, pruning in enumerate(PRUNINGS):
            place = folder / f"{name}-{number}"
            settings = {"max_new_tokens": STEPS, "batch_size": 16, "pruning": pruning, "provenance": {"seed": seed}}
            write_traces(*mllm, scenes(n, seed), place, **settings)
            found.setdefault(name, []).append(place)
    return found


def test_one_promise_for_both(mllm, traced, tmp_path):
    heads = fit_heads(load_traces(*traced["train"]), FitSettings(epochs=4, width=16), progress=False)
    sets = {name: [load_traces(place) for place in places] for name, places in traced.items()}
    path = declare_path(heads, sets["path"])
    assert path.settings[0] == PRUNINGS[0] | {"learned.threshold": 1.0}
    promise = calibrate_together(heads, sets["calibration"], path, alpha=0.3)
    assert promise.methods == ["fastv", "learned"] and promise.curve.settings.keys() == path.settings[0].keys()
    assert 0 < promise.saved and promise.bound <= 0.3
    save_together(heads, promise, tmp_path)
    method = dyvte.load(tmp_path)
    assert [type(part).__name__ for part in method.parts()] == ["FastV", "LearnedExit"]
    # What decoding with the loaded method does to the calibration samples is what was promised.
    model, processor = mllm
    inputs = encode(processor, scenes(120, 3)[:120])
    ids, answer = dense_answers(model, inputs, STEPS)
    with torch.no_grad(), dyvte.reduce_tokens(model, method) as handle:
        real = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    real = torch.nn.functional.pad(real, (0, ids.shape[1] - real.shape[1]))
    changed = int(((real != ids) & answer).any(1).sum())
    assert changed / 120 == pytest.approx(promise.risk, abs=1 / 120)  # traces hold states in half precision
    assert promise.bound == pytest.approx(beta.ppf(0.9, round(promise.risk * 120) + 1, 120 - round(promise.risk * 120)))
    left_out = 1 - handle.counts.double().mean() / handle.record[-1].visual.double().mean()
    assert float(left_out) == pytest.approx(promise.saved, abs=0.01)
    number = PRUNINGS.index({name: promise.setting[name] for name in PRUNINGS[0]})
    exits = exits_at(probability_of(heads, sets["calibration"][number]).double(), promise.setting["learned.threshold"])
    assert (handle.layers == exits).double().mean() > 0.98
    assert "fastv.keep" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="carry no risk curve"):
        dyvte.LearnedExit(dyvte.ExitHeads.from_pretrained(tmp_path), risk=0.1)  # alone they promise nothing


def test_what_would_break_the_promise_is_refused(traced):
    train = load_traces(*traced["train"])
    heads = fit_heads(train, FitSettings(epochs=1, width=16), progress=False)
    sets = {name: [load_traces(place) for place in places] for name, places in traced.items()}
    with pytest.raises(ValueError, match="of a pruned model .*calibrate both"):
        calibrate(heads, sets["calibration"][1], alpha=0.3)
    path = declare_path(heads, sets["path"])
    with pytest.raises(ValueError, match="those the heads were trained on"):
        calibrate_together(heads, sets["train"], path, alpha=0.3)
    with pytest.raises(ValueError, match="that declared the path count as training here"):
        calibrate_together(heads, sets["path"], path, alpha=0.3)
    with pytest.raises(ValueError, match="no traces of the pruning"):
        calibrate_together(heads, sets["calibration"][:1], path, alpha=0.3)
    with pytest.raises(ValueError, match="differ in content"):
        declare_path(heads, [sets["path"][0], sets["calibration"][1]])
    with pytest.raises(ValueError, match="must be of one pruning"):
        declare_path(heads, [train])
