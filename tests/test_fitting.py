"""Traces on disk, heads from traces, and the promise a threshold keeps."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from models import LAYERS, tiny_llava

from dyvte.heads import ExitHeads
from dyvte.methods.learned import LearnedExit
from dyvte.promise import boldest_safe
from dyvte.training.calibrate import (
    calibrate,
    clopper_pearson,
    compare,
    disagreement,
    exits_at,
    oracle_exits,
    risk_curve,
    samples_needed,
)
from dyvte.training.fit import FitSettings, exit_labels, features_of, fit_heads, logits_of, probability_of, quality
from dyvte.training.mapped import MappedRows
from dyvte.training.store import TraceSet

SIZE = 12


def made_up_traces(n=600, seed=0) -> TraceSet:
    """Samples with an earliest good exit that the state tells, with noise; later exits are good too."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(1, LAYERS + 1, (n,), generator=generator)
    column = torch.arange(1, LAYERS + 1)
    agreement = (column >= first[:, None]).float()
    flip = torch.rand(n, LAYERS, generator=generator) < 0.02
    flip[:, -1] = False
    agreement = torch.where(flip, 1 - agreement, agreement)
    state = torch.randn(n, LAYERS, 2 * SIZE, generator=generator)
    state[..., 0] += 3 * (column >= first[:, None])
    nll = 1.0 + 0.5 * (1 - agreement)
    rows = [{"id": str(i), "kind": f"k{int(f) % 2}"} for i, f in enumerate(first)]
    source = {"base_model": "some/model", "num_layers": LAYERS, "hidden_size": SIZE, "answers": "dense", "data": {}}
    visual = torch.randn(n, SIZE, generator=generator)
    return TraceSet(state.half(), visual.half(), agreement, nll, 1 - agreement, nll[:, -1], rows, source)


def test_labels():
    traces = made_up_traces(4)
    traces.agreement = torch.tensor([[1.0, 0.995, 0.5, 1.0, 1.0, 1.0]] * 4)
    traces.nll = torch.tensor([[1.0, 1.02, 1.0, 1.04, 1.0, 1.0]] * 4)
    traces.dense_nll = torch.ones(4)
    assert exit_labels(traces, "agreement")[0].tolist() == [True, False, False, True, True, True]
    assert exit_labels(traces, "original")[0].tolist() == [True, True, False, False, True, True]
    with pytest.raises(ValueError, match="unknown label rule"):
        exit_labels(traces, "mine")


@pytest.mark.parametrize("form", ["shared", "original"])
def test_heads_learn_what_the_state_tells(form):
    settings = FitSettings(form=form, width=32, epochs=30, lr=5e-3)
    heads = fit_heads(made_up_traces(), settings, progress=False)
    learned = quality(heads, made_up_traces(seed=1))
    assert learned["mean"]["auroc"] > 0.9
    assert len(learned["layers"]) == LAYERS - 1
    assert heads.config.base_model == "some/model" and heads.config.training["traces"] == 510


def test_the_same_seed_gives_the_same_heads():
    torch.manual_seed(7)
    first = fit_heads(made_up_traces(), FitSettings(epochs=2), progress=False).state_dict()
    torch.manual_seed(8)
    again = fit_heads(made_up_traces(), FitSettings(epochs=2), progress=False).state_dict()
    other = fit_heads(made_up_traces(), FitSettings(epochs=2, seed=1), progress=False).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_traces_that_teach_nothing():
    with pytest.raises(ValueError, match="too few to train"):
        fit_heads(made_up_traces(10), progress=False)
    traces = made_up_traces(50)
    traces.agreement[:] = 1
    with pytest.raises(ValueError, match="nothing to learn"):
        fit_heads(traces, progress=False)


def test_exits_of_a_threshold():
    probability = torch.tensor([[0.1, 0.6, 0.9, 0.0], [0.1, 0.2, 0.3, 1.0]])
    assert exits_at(probability, 0.5).tolist() == [2, 4]
    assert exits_at(probability, 0.6).tolist() == [3, 4]  # it must be exceeded
    same = torch.tensor([[False, True, False, True], [True, True, True, True]])
    assert oracle_exits(same).tolist() == [2, 1]
    assert disagreement(same, torch.tensor([3, 4])).tolist() == [True, False]


def test_the_bound_is_the_exact_one():
    # "Rule of three": no error in n trials bounds the rate by 1 - delta^(1/n)
    assert clopper_pearson(0, 100, 0.1).item() == pytest.approx(1 - 0.1 ** (1 / 100))
    assert clopper_pearson(100, 100, 0.1).item() == 1
    for alpha in (0.005, 0.01, 0.2):
        needed = samples_needed(alpha, 0.1)
        assert clopper_pearson(0, needed, 0.1) <= alpha < clopper_pearson(0, needed - 1, 0.1)


def test_the_promise_is_kept():
    """Thresholds chosen on one half keep the risk on the other, in at least 1 - delta of many splits."""
    traces, alpha, delta = made_up_traces(4000, seed=2), 0.1, 0.1
    heads = fit_heads(made_up_traces(), FitSettings(epochs=5, width=16), progress=False)
    probability, same = probability_of(heads, traces), traces.agreement >= 1
    broken, saved, trials = 0, 0.0, 60
    for seed in range(trials):
        order = torch.randperm(len(traces), generator=torch.Generator().manual_seed(seed))
        held, test = order[:2000], order[2000:]
        curve = risk_curve(probability[held], same[held], delta, points=200)
        chosen = boldest_safe(curve.bound.tolist(), alpha)
        exits = exits_at(probability[test].double(), float(curve.threshold[chosen]))
        broken += disagreement(same[test], exits).float().mean().item() > alpha
        saved += float(curve.saved[chosen]) / trials
    # The share of broken splits has a binomial error of its own.
    assert broken / trials <= delta + 2 * (delta * (1 - delta) / trials) ** 0.5
    assert saved > 0.05  # never exiting would keep any promise


def test_calibrated_heads_say_how():
    heads, traces = fit_heads(made_up_traces(), FitSettings(epochs=10), progress=False), made_up_traces(2000, seed=3)
    calibrate(heads, traces, alpha=0.05)
    assert heads.config.promise.bound <= 0.05 and heads.config.promise.samples == 2000
    assert 0 < heads.config.threshold < 1
    result = compare(heads, traces)
    assert result["learned"]["agreement"] == pytest.approx(1 - heads.config.promise.risk)
    assert result["oracle"] == {"agreement": 1.0, "mean_exit_layer": pytest.approx(3.4, abs=0.3), "oracle_share": 1.0}
    assert [row["mean_exit_layer"] for row in result["fixed"]] == list(range(1, LAYERS + 1))
    assert json.loads(json.dumps(result)) == result


def test_another_risk_from_the_stored_curve(tmp_path):
    heads, traces = fit_heads(made_up_traces(), FitSettings(epochs=10), progress=False), made_up_traces(2000, seed=3)
    calibrate(heads, traces, alpha=0.05)
    heads.save_pretrained(tmp_path)
    loaded = ExitHeads.from_pretrained(tmp_path)
    for alpha in (0.02, 0.05, 0.2):
        calibrate(heads, traces, alpha=alpha)
        assert LearnedExit(loaded, risk=alpha).threshold == heads.config.threshold
    with pytest.raises(ValueError, match="cannot show a risk as low as 0.0001"):
        LearnedExit(loaded, risk=0.0001)
    with pytest.raises(ValueError, match="a threshold or a risk, not both"):
        LearnedExit(loaded, threshold=0.5, risk=0.01)
    with pytest.raises(ValueError, match="carry no risk curve"):
        LearnedExit(fit_heads(made_up_traces(), FitSettings(epochs=1), progress=False), risk=0.01)


def test_the_guard_keeps_unusual_samples_dense(tmp_path):
    heads = fit_heads(made_up_traces(), FitSettings(epochs=10, width=16, guard=0.9), progress=False)
    usual = made_up_traces(500, seed=4)
    unusual = usual.select(torch.arange(500))
    unusual.state = usual.state.flip(-1)  # nothing like what it was
    free, guarded = logits_of(heads, usual.state).sigmoid(), probability_of(heads, usual)
    stopped = (guarded == 0).float().mean(0)
    assert (0.06 < stopped).all() and (stopped < 0.35).all()
    assert torch.equal(guarded[guarded > 0], free[guarded > 0])
    seen = heads.usual_images(usual.visual)
    # Exact, by its definition: further from the training features than 0.9 of the validation traces.
    features = features_of(heads, usual.state)[:, 2] - heads.guard.mean[2]
    spread = torch.linalg.inv(heads.guard.whiten[2].T @ heads.guard.whiten[2])
    distance = (features * torch.linalg.solve(spread, features.T).T).sum(1)
    far = distance > heads.guard.radius[2]
    assert ((far | ~seen) == (guarded[:, 2] == 0)).float().mean() > 0.99  # but for rounding
    assert exits_at(probability_of(heads, unusual), 0.5).float().mean() > exits_at(guarded, 0.5).float().mean()
    heads.save_pretrained(tmp_path)
    loaded = ExitHeads.from_pretrained(tmp_path)
    assert torch.equal(probability_of(loaded, usual), guarded)
    usual_images = loaded.usual_images(usual.visual)
    assert 0.03 < (~usual_images).float().mean() < 0.2
    assert not loaded.usual_images(usual.visual * 4).float().mean() > 0.2
    policy = LearnedExit(loaded, threshold=1e-6)
    assert torch.equal(policy.admits(usual.visual.float()), usual_images)
    leaves = policy.leaves(3, usual.state[:, 2].float()) & usual_images
    assert leaves.tolist() == (guarded[:, 2] > 1e-6).tolist()


def test_heads_that_look_ahead_keep_the_promise():
    traces, held_out, test = made_up_traces(), made_up_traces(2000, seed=3), made_up_traces(2000, seed=7)
    heads = fit_heads(traces, FitSettings(epochs=10, width=16, lookahead=1, guard=0.99), progress=False)
    found = quality(heads, test)
    assert [row["exit_layer"] for row in found["layers"]] == list(range(2, LAYERS))
    assert 0.65 < found["mean"]["auroc"] < 0.75  # the state a layer earlier tells less: 0.69 at best
    calibrate(heads, held_out, alpha=0.1)
    exits = exits_at(probability_of(heads, test), heads.config.threshold)
    assert 2 <= exits.min() and exits.min() < LAYERS
    assert disagreement(test.agreement >= 1, exits).float().mean() < 0.12


def test_too_few_samples_for_the_promise():
    heads = fit_heads(made_up_traces(), FitSettings(epochs=2), progress=False)
    with pytest.raises(ValueError, match="at least 230 held-out samples"):
        calibrate(heads, made_up_traces(200), alpha=0.01)
    with pytest.raises(ValueError, match="alpha must lie"):
        calibrate(heads, made_up_traces(200), alpha=0)


def test_traces_of_another_model_do_not_calibrate():
    heads = fit_heads(made_up_traces(), FitSettings(epochs=2), progress=False)
    other = made_up_traces(2000)
    other.provenance = other.provenance | {"base_model": "some/other"}
    with pytest.raises(ValueError, match="trained for some/model"):
        calibrate(heads, other)


def test_states_are_read_a_part_at_a_time():
    """From rows that are mapped, units of 7 in any order: the same heads and threshold as from memory."""
    traces, held_out = made_up_traces(1500), made_up_traces(1500, seed=3)
    sizes = []

    class Spied(MappedRows):
        def __getitem__(self, index):
            found = super().__getitem__(index)
            sizes.append(len(found))
            return found

    def mapped(values: torch.Tensor) -> Spied:
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(1))
        place = order.argsort()
        parts = [part.flatten(1).numpy() for part in values[order].split(7)]
        units = SimpleNamespace(types={"x": parts[0].dtype}, rows=lambda name, unit, rows: parts[unit][rows])
        return Spied(units, "x", (place // 7).int(), (place % 7).to(torch.uint8), values.shape[1:])

    found = []
    for on_disk in (False, True):
        for part in (traces, held_out) if on_disk else ():
            part.state, part.visual = mapped(part.state), mapped(part.visual)
        heads = fit_heads(traces, FitSettings(epochs=2, width=16), progress=False)
        calibrate(heads, held_out, alpha=0.05)
        found.append([heads.config.threshold, quality(heads, held_out), *heads.state_dict().values()])
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*found))
    assert 0 < max(sizes) <= 512
    assert torch.equal(traces.state, made_up_traces(1500).state)  # as a whole, where somebody wants it


def test_tiny_llava_is_the_shape_these_tests_assume():
    assert len(tiny_llava().get_decoder().layers) == LAYERS
