"""Traces on disk: nothing lost, nothing twice, the same bits however often it died and whoever computed it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_llava import random_reference, save_tiny_llava

import dyvte.training.write as write
from dyvte.data import Sample, SampleError, TooManyErrors, dataset_digest
from dyvte.ranks import Ranks
from dyvte.training.lock import one_run
from dyvte.training.plan import Plan
from dyvte.training.store import load_traces
from dyvte.training.write import write_traces

ROOT = Path(__file__).parents[1]
COUNT, UNIT = 22, 4
SETTINGS = {"batch_size": 2, "max_new_tokens": 2, "unit_size": UNIT}


@pytest.fixture(scope="module")
def mllm(tmp_path_factory):
    """A random LLaVA and its processor, and the folder they are saved in."""
    folder = save_tiny_llava(tmp_path_factory.mktemp("models") / "tiny")
    return *random_reference(), folder


def samples(count: int = COUNT) -> list[Sample]:
    draw = random.Random(0)
    images = [Image.frombytes("RGB", (90, 90), draw.randbytes(90 * 90 * 3)) for _ in range(count)]
    return [Sample(f"s{i}", [image], "what" + " is" * (i % 5), [f"a{i}"], [], "k") for i, image in enumerate(images)]


class Damaged(list):
    """Samples, some of which cannot be read."""

    broken = (3, 11)

    def __getitem__(self, index):
        if index in self.broken:
            raise SampleError(f"s{index}", f"{index}.png", "the picture is cut off")
        return super().__getitem__(index)


def files(folder: Path) -> dict[str, bytes]:
    """Everything that determines the traces."""
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def whole(mllm, tmp_path_factory):
    """Traces made in one go."""
    return write_traces(*mllm[:2], samples(), tmp_path_factory.mktemp("traces") / "whole", **SETTINGS)


def counted(monkeypatch, log: Path) -> None:
    """Notes every unit that is written, also by other processes."""
    real = write.write_unit

    def noted(folder, number, rows, manifest):
        real(folder, number, rows, manifest)
        with log.open("a") as file:
            file.write(f"{folder}/{number}\n")

    monkeypatch.setattr(write, "write_unit", noted)


def test_a_plan_holds_every_sample_once_and_like_with_like():
    lengths = [random.Random(i).randrange(1000) for i in range(1000)]
    plan = Plan.of(1000, 4, 32, seed=3, lengths=lengths)
    assert sorted(i for unit in plan.units for i in unit) == list(range(1000))
    assert [len(unit) for unit in plan.units] == [32] * 31 + [8] and plan == Plan.of(1000, 4, 32, 3, lengths)
    spread = [max(lengths[i] for i in unit) - min(lengths[i] for i in unit) for unit in plan.units]
    assert max(spread) < 100 and plan.units != Plan.of(1000, 4, 32, 4, lengths).units
    batches = plan.batches([(i, s) for i, s in enumerate(samples(9))])
    assert [[len(s.question) for _, s in batch] for batch in batches] == [[4, 4, 7, 7], [10, 10, 13, 13], [16]]
    for bad in ({"unit_size": 33}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Plan.of(**{"count": 9, "batch_size": 4, "unit_size": 32} | bad)


def test_what_is_loaded_is_what_was_given(mllm, whole):
    loaded, given = load_traces(whole), samples()
    assert [row["id"] for row in loaded.rows] == [sample.id for sample in given] and loaded.kinds == ["k"] * COUNT
    assert loaded.provenance["content"] == dataset_digest(given)
    assert [row["answers"] for row in loaded.rows] == [sample.answers for sample in given]
    chosen = loaded.select([5, 2, 5])
    assert torch.equal(chosen.state, loaded.state[:][[5, 2, 5]]) and chosen.rows[1]["id"] == "s2"
    assert (chosen.content.samples == loaded.content.samples[[5, 2, 5]]).all()
    assert (chosen.content.images == loaded.content.images[[5, 2, 5]]).all() and chosen.content.owner.tolist() == [
        0,
        1,
        2,
    ]
    twice = load_traces(whole, whole)
    assert len(twice) == 2 * COUNT and twice.rows[COUNT + 3] == loaded.rows[3]
    assert torch.equal(twice.state[torch.tensor([3])], twice.state[torch.tensor([COUNT + 3])])


def started(world: int, meet: Path, work) -> list[int]:
    """Runs ``work`` in one process for each of so many ranks."""
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                work(ranks=Ranks(rank, world, store=torch.distributed.FileStore(str(meet), world)))
            finally:
                os._exit(0)
        children.append(child)
    return children


def killed_after(seconds: float, children: list[int]) -> bool:
    """Kills all of them; False if one was done before."""
    time.sleep(seconds)
    for child in children:
        os.kill(child, signal.SIGKILL)
    return all([os.WIFSIGNALED(os.waitpid(child, 0)[1]) for child in children])


def test_kills_at_random_points_cost_a_unit_each_and_not_a_bit(mllm, whole, tmp_path, monkeypatch):
    began = time.perf_counter()
    write_traces(*mllm[:2], samples(), tmp_path / "timed", **SETTINGS)
    takes = time.perf_counter() - began
    counted(monkeypatch, tmp_path / "log")
    draw, kills, finished = random.Random(5), 0, 0
    while kills < 20:
        folder = tmp_path / str(finished)  # a new one where the last was finished too soon
        work = partial(write_traces, *mllm[:2], samples(), folder, **SETTINGS)
        children = started(draw.choice([1, 1, 2, 3]), tmp_path / f"meet-{kills}-{finished}", work)
        killed = killed_after(draw.random() * takes / 3, children)
        kills, finished = kills + killed, finished + (not killed)
    for number in range(finished + 1):
        folder = tmp_path / str(number)
        work = partial(write_traces, *mllm[:2], samples(), folder, **SETTINGS)
        for child in started(2, tmp_path / f"last-{number}", work):
            assert os.waitpid(child, 0)[1] == 0
        assert files(folder) == files(whole)
    written = (tmp_path / "log").read_text().split()
    assert len(written) == len(set(written)) == 6 * (finished + 1)  # no finished unit was made again


def test_two_ranks_of_torchrun_killed_and_finished_by_one(mllm, tmp_path):
    def command(folder, *launcher):
        pairs = {"model": mllm[2], "output": folder, "dtype": "float32", "max_new_tokens": 3, "unit_size": 2}
        data = "data={scenes: {split: dev, n: 120, seed: 5}}"
        return [*launcher, "train/trace.py", data, *(f"{key}={value}" for key, value in pairs.items())]

    from dyvte.cli.main import main

    folder = tmp_path / "traces"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    group = subprocess.Popen(
        command(folder, *launcher),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "log").open("w"),
    )
    while not list(folder.glob("units/0*.json")):
        assert group.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    ranks = Path(f"/proc/{group.pid}/task/{group.pid}/children").read_text().split()
    for process in (group.pid, *map(int, ranks)):  # not the launcher alone: its ranks outlive it
        os.kill(process, signal.SIGKILL)
    group.wait()
    done = {p: p.stat().st_mtime_ns for p in folder.glob("units/0*.json")}
    assert 0 < len(done) < 60
    main(["trace", *command(folder)[1:]])
    assert all(p.stat().st_mtime_ns == then for p, then in done.items())
    main(["trace", *command(tmp_path / "once")[1:]])
    assert files(folder) == files(tmp_path / "once")


@pytest.mark.parametrize("harm", ["truncated", "empty", "flipped", "missing", "manifest", "no manifest"])
def test_damage_is_named_and_made_again(mllm, whole, tmp_path, harm):
    write_traces(*mllm[:2], samples(), tmp_path, **SETTINGS)
    unit = tmp_path / "units/000002.arrow"
    content = unit.read_bytes()
    if harm == "truncated":
        unit.write_bytes(content[:-100])
    elif harm == "empty":
        unit.write_bytes(b"")
    elif harm == "flipped":
        unit.write_bytes(content[:2000] + bytes(64) + content[2064:])
    elif harm == "missing":
        unit.unlink()
    elif harm == "manifest":
        unit.with_suffix(".json").write_text('{"index": [1')
    else:
        unit.with_suffix(".json").unlink()
    with pytest.raises(
        ValueError, match="18 of 22 traces" if harm == "no manifest" else r"1 units are damaged.*000002"
    ):
        load_traces(tmp_path)
    if harm == "no manifest":
        write_traces(*mllm[:2], samples(), tmp_path, **SETTINGS)
    else:
        with pytest.warns(UserWarning, match=r"000002.*unit 2 is made again"):
            write_traces(*mllm[:2], samples(), tmp_path, **SETTINGS)
    assert files(tmp_path) == files(whole)


def test_samples_that_cannot_be_read_are_skipped_and_listed(mllm, tmp_path):
    bad = Damaged(samples())
    bad[5:6] = [replace(list.__getitem__(bad, 5), images=[])]
    with pytest.raises(SampleError, match="s11|s3|s5"):
        write_traces(*mllm[:2], bad, tmp_path / "stops", **SETTINGS)
    with pytest.raises(TooManyErrors, match="3 samples cannot be used, and max_errors allows 2"):
        write_traces(*mllm[:2], bad, tmp_path / "many", **SETTINGS, on_error="skip", max_errors=2)
    with pytest.raises(TooManyErrors):  # those of the run before count
        write_traces(*mllm[:2], bad, tmp_path / "many", **SETTINGS, on_error="skip", max_errors=2)
    folder = write_traces(*mllm[:2], bad, tmp_path / "skips", **SETTINGS, on_error="skip")
    assert [row["id"] for row in load_traces(folder).rows] == [f"s{i}" for i in range(COUNT) if i not in (3, 5, 11)]
    skipped = [one for p in folder.glob("units/0*.json") for one in json.loads(p.read_text())["skipped"]]
    assert sorted((one["index"], one["file"]) for one in skipped) == [(3, "3.png"), (5, "Damaged"), (11, "11.png")]
    write_traces(*mllm[:2], bad, folder, **SETTINGS, on_error="skip")


def test_two_runs_in_one_folder(mllm, whole, tmp_path):
    write_traces(*mllm[:2], samples(), tmp_path, **SETTINGS)
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        with one_run(tmp_path, "process 1 on elsewhere"):
            os.write(go, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(ValueError, match="in use by process 1 on elsewhere: wait for it"):
        write_traces(*mllm[:2], samples(), tmp_path, **SETTINGS)
    with one_run(tmp_path, "process 1 on elsewhere"), one_run(tmp_path, "process 1 on elsewhere"):
        pass  # its ranks share it
    os.kill(child, signal.SIGKILL)  # the lock goes with the process
    os.waitpid(child, 0)
    write_traces(*mllm[:2], samples(), tmp_path, **SETTINGS)
    assert files(tmp_path) == files(whole)


def test_disks_that_take_nothing(mllm, whole, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="does not take what is written .Not a directory.*choose another folder"):
        write_traces(*mllm[:2], samples(), tmp_path / "file/traces", **SETTINGS)
    real, folder = os.fsync, tmp_path / "traces"

    def full(descriptor):
        if len(list(folder.glob("units/0*.json"))) == 2:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device.*the same command goes on"):
        write_traces(*mllm[:2], samples(), folder, **SETTINGS)
    monkeypatch.undo()
    noted = (folder / "provenance.json").read_text()
    (folder / "provenance.json").write_text(noted[:50])
    for reads in (lambda: write_traces(*mllm[:2], samples(), folder, **SETTINGS), lambda: load_traces(folder)):
        with pytest.raises(ValueError, match="provenance.json is damaged"):
            reads()
    (folder / "provenance.json").write_text(noted)
    assert len(list(folder.glob("units/*"))) == 4  # no half of a unit
    write_traces(*mllm[:2], samples(), folder, **SETTINGS)
    assert files(folder) == files(whole)
