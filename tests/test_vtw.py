"""VTW from traces: the layer the original's rule picks, and what it is picked by."""

from __future__ import annotations

import json

import pytest
import torch
from models import batch_of, prompt, tiny_llava

import dyvte
from dyvte.training.store import TraceSet
from dyvte.training.vtw import ETA, calibrate, choose_exit, vtw_exit

LAYERS, N = 8, 60


def traces(by_layer: list[float], spread: float = 0.0, seed: int = 0) -> TraceSet:
    """Samples whose KL has these means by exit layer."""
    generator = torch.Generator().manual_seed(seed)
    factor = 1 + spread * torch.randn(N, 1, generator=generator)
    kl = (torch.tensor(by_layer) * factor).half().float()
    agreement = (kl < 0.01).float()
    rows = [{"id": f"s{i}", "kind": "k"} for i in range(N)]
    source = {"base_model": "some/model", "data": {"path": "somewhere"}}
    return TraceSet(
        torch.zeros(N, LAYERS, 4).half(), torch.zeros(N, 2).half(), agreement, kl, kl, kl[:, -1], rows, source
    )


FALLING = [1.0, 0.002, 0.5, 0.1, 0.05, 0.0029, 0.0004, 0.0]


@pytest.mark.parametrize(
    ("eta", "first", "layer"),
    [(0.003, 5, 6), (0.003, 1, 2), (0.003, 3, 6), (0.0005, 5, 7), (0.06, 5, 5), ("llava-1.5-7b", 5, 6), (5, 1, 1)],
)
def test_first_layer_that_qualifies(eta, first, layer):
    choice = choose_exit(traces(FALLING), eta=eta, first=first)
    assert choice.layer == layer and not choice.never
    assert choice.policy.layer == layer and isinstance(choice.policy, dyvte.FixedExit)
    assert choice.kl == pytest.approx(FALLING, rel=1e-3)
    assert f"exit layer {layer} of {LAYERS}" in choice.as_dict()["outcome"]


def test_never_is_said():
    choice = choose_exit(traces(FALLING), eta=ETA["llava-1.6-vicuna-7b"])
    assert choice.never and choice.layer == LAYERS and choice.agreement == 1
    assert choice.as_dict()["outcome"].startswith("never (8): no exit layer 5 ... 7")


def test_samples_are_chosen_by_seed():
    data = traces(FALLING, spread=0.5)
    one, same, other = (choose_exit(data, samples=20, seed=seed) for seed in (1, 1, 2))
    assert one == same and one.samples != other.samples and len(set(one.samples)) == 20
    index = [int(name[1:]) for name in one.samples]
    assert one.kl == pytest.approx(data.kl[index].double().mean(0).tolist())
    assert choose_exit(data, samples=N, seed=1).kl == pytest.approx(data.kl.double().mean(0).tolist())


def test_kl_from_a_trace_is_that_of_dropping_at_the_layer():
    """The criterion as the original has it: run with the tokens dropped, run without, compare the next token."""
    model, inputs = tiny_llava(), batch_of(prompt(3, 5), prompt(2, 7, seed=2))
    kl = dyvte.trace_batch(model, inputs).kl
    with torch.no_grad():
        dense = model(**inputs).logits[:, -1].log_softmax(-1)
        for e in (1, 3, 5):
            with dyvte.visual_exit(model, dyvte.FixedExit(e)):
                dropped = model(**inputs).logits[:, -1].log_softmax(-1)
            expected = (dropped.exp() * (dropped - dense)).sum(-1)
            torch.testing.assert_close(kl[:, e - 1], expected, atol=1e-5, rtol=1e-4)


def test_written_numbers(tmp_path):
    choice = calibrate(traces(FALLING), tmp_path / "new" / "vtw.json", samples=10)
    written = json.loads((tmp_path / "new" / "vtw.json").read_text())
    assert written == json.loads(json.dumps(choice.as_dict()))
    assert written["layer"] == 6 and written["base_model"] == "some/model" and len(written["samples"]) == 10
    assert vtw_exit(traces(FALLING), first=1).layer == 2


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"eta": -0.1}, "eta must be"),
        ({"eta": float("nan")}, "eta must be"),
        ({"eta": "llava"}, "no preset eta 'llava'"),
        ({"first": 0}, "first must be an exit layer 1 ... 7"),
        ({"first": 8}, "first must be an exit layer 1 ... 7"),
        ({"first": 2.0}, "first must be a whole number"),
        ({"samples": 0}, "0 samples were asked for"),
        ({"samples": 61}, "60 traces are there"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        choose_exit(traces(FALLING), **settings)


def test_unknown_settings():
    with pytest.raises(ValueError, match="unknown settings layer for VTW: choose from eta, first, samples, seed"):
        calibrate(traces(FALLING), layer=3)


def test_a_folder_without_traces(tmp_path):
    with pytest.raises(ValueError, match="holds no traces"):
        vtw_exit(str(tmp_path))
