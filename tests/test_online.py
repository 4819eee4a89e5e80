"""Heads that learn while the model is traced."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import groups
import pytest
import torch
from PIL import Image
from test_traces_on_disk import mllm  # noqa: F401

from dyvte.config import FitSettings, OnlineSettings, PromiseSettings, TraceSettings
from dyvte.data import Sample
from dyvte.heads import ExitHeadsConfig
from dyvte.training.learner import Learner
from dyvte.training.online import train_online
from dyvte.training.parallel import Group
from dyvte.training.replay import Example, Replay, Stream
from dyvte.training.store import load_traces

SETTINGS = FitSettings(width=8, validation=0.2, lr=1e-2)
ONLINE = OnlineSettings(buffer=20, round_size=10, updates=3, batch_size=16, passes=2, settling=5, save_every=2)
FREE = PromiseSettings(alpha=None)
SHORT = {"trace": TraceSettings(batch_size=2), "max_new_tokens": 2, "progress": False}


def samples(count: int, seed: int) -> list[Sample]:
    draw = random.Random(seed)
    images = [Image.frombytes("RGB", (90, 90), draw.randbytes(90 * 90 * 3)) for _ in range(count)]
    return [Sample(f"{seed}-{i}", [one], "what" + " is" * (i % 5), ["a"], [], "k") for i, one in enumerate(images)]


def trained(mllm, work, count=47, settings=SETTINGS, log=None):  # noqa: F811
    return train_online(*mllm[:2], samples(count, 1), None, work, settings, ONLINE, FREE, log=log, **SHORT)


def test_from_a_model_to_heads_with_a_promise(mllm, tmp_path, monkeypatch):  # noqa: F811
    train, held_out, promise = samples(40, 1), samples(30, 2), PromiseSettings(alpha=0.5)
    given = (*mllm[:2], train, held_out, tmp_path, SETTINGS, ONLINE, promise)
    heads = train_online(*given, **SHORT)
    training = heads.config.training
    assert (training["traces"], training["validation_traces"], training["steps"]) == (32, 8, 33)
    assert heads.config.calibration["samples"] == 30 and heads.config.calibration["alpha"] == 0.5
    assert heads.config.identity == {n: load_traces(tmp_path / "held-out").provenance[n] for n in heads.config.identity}
    assert heads.guard.radius.isfinite().all() and len(heads.trained_on["samples"]) == 40
    monkeypatch.setattr(Stream, "run", None)  # all is done
    again = train_online(*given, **SHORT)
    assert again.config.to_dict() == heads.config.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(heads.state_dict().values(), again.state_dict().values()))


def test_samples_in_both_sets_are_refused_before_anything_is_traced(mllm, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Stream, "run", None)
    mixed = samples(39, 2) + samples(5, 1)[4:]
    promise = PromiseSettings(alpha=0.5)
    with pytest.raises(ValueError, match="1 of the 40 samples to calibrate on are those the heads were trained on"):
        train_online(*mllm[:2], samples(40, 1), mixed, tmp_path, SETTINGS, ONLINE, promise, **SHORT)
    with pytest.raises(ValueError, match="at least 230 held-out samples"):
        train_online(*mllm[:2], samples(40, 1), mixed, tmp_path, SETTINGS, ONLINE, PromiseSettings(), **SHORT)
    with pytest.raises(ValueError, match="a promise needs held-out samples"):
        train_online(*mllm[:2], samples(40, 1), None, tmp_path, SETTINGS, ONLINE, promise, **SHORT)
    with pytest.raises(ValueError, match="9 samples are too few"):
        trained(mllm, tmp_path, count=9)


def test_a_run_that_died_ends_with_the_same_bits_and_ranks_with_the_same_heads(mllm, tmp_path, monkeypatch):  # noqa: F811
    whole = trained(mllm, tmp_path / "whole")

    def dies(number, losses):
        if number == 7:  # the state is that of round 6, and the buffer holds parts of rounds 4 to 6
            os._exit(1)

    assert groups.wait(groups.start(1, tmp_path / "run", lambda rank: trained(mllm, tmp_path / "work", log=dies)))
    steps, real = [], Learner.step
    monkeypatch.setattr(Learner, "step", lambda *given: steps.append(given[0].steps) or real(*given))
    again = trained(mllm, tmp_path / "work")
    assert steps == list(range(18, 33))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="another training .settings was"):
        trained(mllm, tmp_path / "work", settings=replace(SETTINGS, seed=1))
    ranks = groups.results(2, tmp_path / "two", lambda rank: trained(mllm, tmp_path / "ranks").state_dict())
    for name, weight in whole.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert (ranks[0][name] - weight).norm() <= 1e-6 * weight.norm() or name.startswith("guard.")
        torch.testing.assert_close(ranks[0][name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sharing", ["none", "weights", "work"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_rounds_are_the_same_on_any_ranks(sharing, size, monkeypatch):
    monkeypatch.setattr(Group, "sum", lambda self, values: values)
    calls = []

    def trace(batch):
        calls.append(batch)
        return [{"sample": one, "batch": batch} for one in batch]

    def traced(group):
        made = {"round_size": 10, "batch_size": 3, "passes": 2, "sharing": sharing}
        stream = Stream([f"s{i}" for i in range(30)], range(4, 29), trace, group, **made)
        assert len(stream) == 6 and [stream.seen(number) for number in range(7)] == [0, 10, 20, 25, 35, 45, 50]
        return [stream.run(number) for number in range(6)]

    alone, counts = traced(Group()), []
    assert sorted(row["sample"] for rows in alone[:3] for row in rows.values()) == sorted(f"s{i}" for i in range(4, 29))
    found: list[dict] = [{} for _ in alone]
    for rank in range(size):
        calls.clear()
        for together, rows in zip(found, traced(Group(rank, size))):
            assert not together.keys() & rows.keys()
            together |= rows
        counts.append(len(calls))
    assert found == alone
    assert sharing == "none" or len(set(counts)) == 1  # ranks that wait for each other call the model equally often


def test_the_buffer_keeps_the_latest():
    config = ExitHeadsConfig(num_layers=3, hidden_size=2)
    one = Example("", torch.zeros(3, 4).half(), torch.zeros(2).half(), torch.zeros(2, dtype=torch.bool))
    buffers = [Replay(8, config) for _ in range(2)]
    for start in range(0, 20, 5):
        for rank, buffer in enumerate(buffers):
            buffer.add({i: replace(one, id=str(i)) for i in range(start, start + 5) if i % 2 == rank}, start + 5)
    assert sorted(i for buffer in buffers for i in buffer.examples) == list(range(12, 20))
    batches = [buffer.draw(6, seed=3) for buffer in buffers]
    assert {count for count, _, _ in batches} == {6}
    assert sorted(place for _, places, _ in batches for place in places) == list(range(6))
    ids = [name for _, places, read in batches for name in read(places)[2](list(range(len(places))))]
    assert len(set(ids)) == 6 and {int(name) for name in ids} <= set(range(12, 20))
    assert buffers[0].draw(6, seed=3)[2]([])[0].shape == (0, 3, 4) and buffers[0].draw(100, seed=3)[0] == 8
