"""Heads that several ranks fit together are those of one process, and what fails on one rank fails on all."""

from __future__ import annotations

from dataclasses import replace

import groups
import pytest
import torch
from test_fitting import made_up_traces

from dyvte.training.fit import FitSettings, fit_heads
from dyvte.training.parallel import Group

SETTINGS = FitSettings(epochs=3, width=16, batch_size=50, validation=0.6, guard=0.9)


def fitted(traces, settings):
    heads = fit_heads(traces, settings, progress=False)
    return heads.state_dict(), heads.config.training


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {}),
        (3, {"batch_size": 2, "epochs": 1, "validation": 0.95}),  # a rank without a sample, in every batch
        (3, {"form": "original", "label_rule": "original", "batch_size": 47}),
    ],
)
def test_ranks_make_the_heads_of_one_process(size, changes, tmp_path):
    traces, settings = made_up_traces(601), replace(SETTINGS, **changes)
    weights, training = fitted(traces, settings)
    ranks = groups.results(size, tmp_path, lambda rank: fitted(traces, settings))
    for found, told in ranks:
        assert told == training | {"validation_log_loss": pytest.approx(training["validation_log_loss"], rel=1e-6)}
        assert told == ranks[0][1]
        for name, weight in weights.items():
            assert torch.equal(found[name], ranks[0][0][name])
            assert (found[name] - weight).norm() <= 1e-6 * weight.norm() or name.startswith("guard.")
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


def test_a_fault_of_one_rank_is_raised_on_all(tmp_path):
    traces = made_up_traces(300)
    settings = replace(SETTINGS, validation=0.1)

    class Torn(torch.Tensor):
        def __getitem__(self, index):
            raise OSError(5, "Input/output error")

    def fails(harm):
        def work(rank):
            own = replace(traces, state=traces.state.clone())
            harm(own, rank)
            fit_heads(own, settings, progress=False)

        return groups.run(2, tmp_path / harm.__name__, work)

    def infinite(own, rank):
        own.state[[17, 230], 2, 5] = torch.inf

    def torn(own, rank):
        own.state = own.state.as_subclass(Torn) if rank == 1 else own.state

    def other(own, rank):
        own.agreement = own.agreement.clone()
        own.agreement[5, 2] += rank

    said = [one["error"] for one in fails(infinite)]
    assert said[0] == said[1] and ("'17'" in said[0] or "'230'" in said[0]) and "states of sample" in said[0]
    first, second = fails(torn)
    assert (first["kind"], second["kind"]) == ("ValueError", "OSError") and "rank 1: [Errno 5]" in first["error"]
    assert all("different traces or settings" in one["error"] for one in fails(other))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_even_and_whole(size):
    for count in (0, 1, 5, 128):
        shares = [Group(rank, size).share(count) for rank in range(size)]
        assert [i for share in shares for i in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
