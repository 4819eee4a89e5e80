"""Ranks that share a model trace in step: whatever they are left with, they end, with the bits of one process."""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import groups
import pytest
import torch
from test_sharded import BUILD, DEEPSPEED
from test_traces_on_disk import COUNT, SETTINGS, Damaged, files, mllm, samples  # noqa: F401 (a fixture)

from dyvte.config import ModelConfig
from dyvte.data import TooManyErrors
from dyvte.loading import load_mllm, sharing
from dyvte.ranks import RankError, Ranks
from dyvte.training.store import load_traces
from dyvte.training.write import write_traces

LONGER = SETTINGS | {"max_new_tokens": 4}  # so that answers differ in length


def ranked(folder, size, work, rank):
    """Calls ``work`` with the ranks of a run, as launchers start them."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    ranks = Ranks(rank, size, rank, store=torch.distributed.FileStore(str(folder / "ranks"), size))
    with ranks.together():
        return work(ranks)


def launch(size, folder, work):
    folder.mkdir()
    return partial(groups.run, size, folder, partial(ranked, folder, size, work))()


@pytest.fixture(scope="module")
def whole(mllm, tmp_path_factory):  # noqa: F811
    return write_traces(*mllm[:2], samples(), tmp_path_factory.mktemp("whole") / "traces", **LONGER)


def tokens_of(folder):
    rows = load_traces(folder).rows
    return {len(row["traced_answer"]) for row in rows}


@pytest.mark.parametrize(
    ("shard", "size", "gone"),
    [
        ("fsdp2", 2, range(6)),
        ("fsdp2", 3, (0, 2, 3, 4)),
        ("fsdp2", 2, (1, 3, 5)),
        ("tp", 2, (0, 1, 5)),
        pytest.param("zero3", 2, range(6), marks=DEEPSPEED),
        pytest.param("zero3", 2, (1, 3, 5), marks=DEEPSPEED),
    ],
)
def test_sharded_traces(mllm, whole, tmp_path, monkeypatch, shard, size, gone):  # noqa: F811
    """Odd units, ranks without any, units left that used to be one rank's, answers of many lengths."""
    folder = tmp_path / "traces"
    assert len(tokens_of(whole)) > 1
    write_traces(*mllm[:2], samples(), folder, **LONGER)
    for number in gone:
        (folder / f"units/{number:06d}.json").unlink()
    if shard == "zero3":  # ranks are forked with it imported and built: the limit is about their work alone
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        subprocess.run([sys.executable, "-c", BUILD], check=True, timeout=900)
        importlib.import_module("deepspeed")

    def work(ranks):
        loaded = load_mllm(ModelConfig(model=str(mllm[2]), dtype="float32", attention="eager", shard=shard), ranks)
        write_traces(loaded.model, loaded.processor, samples(), folder, **LONGER, ranks=ranks)
        return sharing(loaded.model)

    for found in launch(size, tmp_path / "run", work):
        assert found.get("result") == ("work" if shard == "tp" else "weights"), found.get("where")
    if shard == "fsdp2":
        assert files(folder) == files(whole)
        return
    made, expected = load_traces(folder), load_traces(whole)
    assert torch.equal(made.agreement, expected.agreement) and list(made.rows) == list(expected.rows)
    torch.testing.assert_close(made.state[:], expected.state[:], atol=2e-3, rtol=2e-3)  # stored in half precision


def test_a_damaged_unit_is_named_once_and_dealt_out(mllm, whole, tmp_path):  # noqa: F811
    folder = tmp_path / "traces"
    write_traces(*mllm[:2], samples(), folder, **LONGER)
    for number in (1, 3):
        (folder / f"units/{number:06d}.arrow").write_bytes(b"")
    made = launch(2, tmp_path / "run", lambda ranks: noted(mllm, folder, ranks))
    assert [one["result"] for one in made] == [[1], [3]] and files(folder) == files(whole)


def noted(mllm, folder, ranks):  # noqa: F811
    """The units that this rank writes."""
    import dyvte.training.write as write

    real, numbers = write.write_unit, []
    write.write_unit = lambda folder, number, *more: (numbers.append(number), real(folder, number, *more))
    write_traces(*mllm[:2], samples(), folder, **LONGER, ranks=ranks)
    return numbers


def test_all_ranks_together_may_skip_so_many(mllm, tmp_path):  # noqa: F811
    bad = Damaged(samples())
    bad.broken = (0, 5, 11, 17)

    def work(allowed, ranks):
        write_traces(*mllm[:2], bad, tmp_path / "traces", **SETTINGS, on_error="skip", max_errors=allowed, ranks=ranks)

    kinds = [one.get("kind") for one in launch(2, tmp_path / "many", partial(work, 3))]
    assert set(kinds) <= {TooManyErrors.__name__, RankError.__name__} and TooManyErrors.__name__ in kinds
    assert not any("error" in one for one in launch(2, tmp_path / "enough", partial(work, 4)))
    assert len(load_traces(tmp_path / "traces")) == COUNT - 4


def test_a_fault_of_one_rank_is_one_of_all(tmp_path):
    def work(ranks):
        total = ranks.counter()
        assert ranks.gather({"rank": ranks.rank}) == [{"rank": i} for i in range(3)]
        total(ranks.rank)
        ranks.wait()
        assert total(0) == 3
        if ranks.rank == 1:
            raise ValueError("the disk is full")
        ranks.wait()

    found = launch(3, tmp_path / "run", work)
    assert [one["kind"] for one in found] == ["RankError", "ValueError", "RankError"]
    assert all("rank 1 has failed (ValueError: the disk is full)" in found[rank]["error"] for rank in (0, 2))


def test_ranks_of_half_an_environment_are_refused():
    from dyvte.ranks import place

    assert place({}) == (0, 1, 0)
    whole = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "1"}
    assert place(whole) == (9, 16, 1)
    for missing in random.Random(0).sample([name for name in whole if name != "WORLD_SIZE"], 4):
        with pytest.raises(ValueError, match=f"without {missing}: start the ranks with torchrun"):
            place({name: value for name, value in whole.items() if name != missing})
