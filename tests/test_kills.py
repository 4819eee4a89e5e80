"""Trainings that are killed: the same command goes on, loses nothing and ends with the same bits."""

from __future__ import annotations

import json
import random
import time
from functools import partial
from pathlib import Path

import groups
import pytest
import torch
from test_fitting import made_up_traces

import dyvte.training.state as state
from dyvte.heads import ExitHeads
from dyvte.training.calibrate import calibrate
from dyvte.training.fit import FitSettings, fit_heads

SETTINGS = FitSettings(epochs=8, width=8, batch_size=64, save_every=2)


def command(traces, held_out, folder: Path, rank: int) -> None:
    """What a training does: fit, save, calibrate, save again."""
    heads = fit_heads(traces, SETTINGS, progress=False, work=folder / "work")
    if rank == 0:
        heads.save_pretrained(folder / "heads")
        calibrate(heads, held_out, alpha=0.1)
        heads.save_pretrained(folder / "heads")


def files(folder: Path) -> dict[str, bytes]:
    """All that is left, but for the lock."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def counted(monkeypatch, log: Path) -> None:
    """Notes every state that is written, also by other processes."""
    real = state.TrainingState._write

    def noted(self, number, progress, tensors):
        real(self, number, progress, tensors)
        with log.open("a") as file:
            file.write(f"{self.folder}/{number}\n")

    monkeypatch.setattr(state.TrainingState, "_write", noted)


def test_twenty_kills_cost_not_a_bit(tmp_path, monkeypatch):
    """At random points of fit, save and calibrate; of one process, of one rank of two, and of both."""
    traces, held_out = made_up_traces(400), made_up_traces(400, seed=3)
    took = {}
    for size in (1, 2):
        began = time.perf_counter()
        groups.results(size, tmp_path / f"ranks-{size}", partial(command, traces, held_out, tmp_path / f"whole-{size}"))
        took[size] = time.perf_counter() - began
    counted(monkeypatch, tmp_path / "log")
    draw, kills, runs, finished = random.Random(5), 0, 0, {1: 0, 2: 0}
    while kills < 20:
        size = draw.choice([1, 1, 2])
        folder = tmp_path / f"{size}-{finished[size]}"
        runs += 1
        pids = groups.start(size, tmp_path / f"run-{runs}", partial(command, traces, held_out, folder))
        time.sleep(draw.random() * took[size] / 2)
        killed = groups.kill([pids.pop(draw.randrange(len(pids)))])
        if draw.random() < 0.5 or not groups.wait(pids, 5):  # one that waits for the other to join would do so for long
            killed |= groups.kill(pids)
        kills += killed
        finished[size] += not killed  # a new folder where the last was done too soon
    for size, last in finished.items():
        for number in range(last + 1):
            folder = tmp_path / f"{size}-{number}"
            runs += 1
            groups.results(size, tmp_path / f"run-{runs}", partial(command, traces, held_out, folder))
            assert files(folder) == files(tmp_path / f"whole-{size}")
    written = (tmp_path / "log").read_text().split()
    expected = 4 * sum(last + 1 for last in finished.values())
    assert len(written) == len(set(written))  # nothing twice
    assert expected - kills <= len(written) <= expected  # killed between the state and the note of it


def test_heads_are_replaced_as_a_whole(tmp_path):
    """Killed in the midst of saving, again and again: one heads or the other, and never a part of each."""
    settings = FitSettings(epochs=1, width=8)
    versions = [fit_heads(made_up_traces(60, seed=s), settings, progress=False) for s in (0, 1)]
    versions[1].trained_on = {name: torch.tensor([1, 2]) for name in ("samples", "images")}
    for number, heads in enumerate(versions):
        heads.save_pretrained(tmp_path / f"{number}")
    whole = [files(tmp_path / f"{number}") for number in (0, 1)]
    folder, draw = tmp_path / "heads", random.Random(1)
    versions[0].save_pretrained(folder)
    (folder / "notes").mkdir()
    (folder / "notes/mine.txt").write_text("stays")
    whole = [some | {"notes/mine.txt": b"stays"} for some in whole]

    def saves(rank: int) -> None:
        for number in range(10**6):
            versions[1 - number % 2].save_pretrained(folder)

    for run in range(10):
        pids = groups.start(1, tmp_path / "run", saves)
        time.sleep(0.02 + draw.random() / 10)
        assert groups.kill(pids) and files(folder) in whole, run
    versions[1].save_pretrained(folder)
    assert files(folder) == whole[1] and torch.equal(
        ExitHeads.from_pretrained(folder).guard.mean, versions[1].guard.mean
    )
    assert not list(tmp_path.glob(".*"))  # what the killed left is gone


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("state-000008.safetensors", lambda content: content[:-10]),
        ("state-000008.safetensors", lambda content: b""),
        ("state-000008.safetensors", lambda content: content[:3000] + bytes(64) + content[3064:]),
        ("state-000008.safetensors", None),
        ("state.json", lambda content: content[: len(content) // 2]),
    ],
)
def test_a_damaged_state_is_named(tmp_path, name, harm):
    traces = made_up_traces(60)
    fit_heads(traces, SETTINGS, progress=False, work=tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink() if harm is None else path.write_bytes(harm(content))
    with pytest.raises(ValueError, match=f"{name} is damaged .*remove .*state.json to begin"):
        fit_heads(traces, SETTINGS, progress=False, work=tmp_path)
    path.write_bytes(content)
    fit_heads(traces, SETTINGS, progress=False, work=tmp_path)


def test_a_state_of_something_else_is_refused(tmp_path, monkeypatch):
    traces = made_up_traces(60)
    heads = fit_heads(traces, SETTINGS, progress=False, work=tmp_path)
    with pytest.raises(ValueError, match="another training .traces was.*choose another folder"):
        fit_heads(made_up_traces(60, seed=1), SETTINGS, progress=False, work=tmp_path)
    with pytest.raises(ValueError, match="settings was"):
        fit_heads(traces, FitSettings(epochs=9, width=8, batch_size=64), progress=False, work=tmp_path)
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    monkeypatch.setattr("dyvte.training.learner.Learner.step", None)  # nothing is left to do
    again = fit_heads(traces, FitSettings(**vars(SETTINGS) | {"save_every": 5}), progress=False, work=moved)
    assert all(torch.equal(a, b) for a, b in zip(heads.state_dict().values(), again.state_dict().values()))


def test_a_full_disk_is_said_and_costs_nothing(tmp_path, monkeypatch):
    traces, real = made_up_traces(60), state.save_file

    def full(tensors, path):
        if "000004" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(ValueError, match="No space left on device.*goes on from the state before"):
        fit_heads(traces, SETTINGS, progress=False, work=tmp_path)
    assert json.loads((tmp_path / "state.json").read_text())["progress"]["epoch"] == 2
    monkeypatch.undo()
    fit_heads(traces, SETTINGS, progress=False, work=tmp_path)
    fit_heads(traces, SETTINGS, progress=False, work=tmp_path.with_name("whole"))
    assert files(tmp_path) == files(tmp_path.with_name("whole"))


def test_one_process_goes_on_where_two_stopped(tmp_path):
    """The state belongs to the training, whoever wrote it."""
    traces = made_up_traces(200)

    def log(epoch, losses):
        if epoch == 4:
            raise KeyboardInterrupt

    work = partial(fit_heads, traces, SETTINGS, progress=False, work=tmp_path / "work")
    groups.wait(groups.start(2, tmp_path / "run", lambda rank: work(log=log)))
    assert json.loads((tmp_path / "work/state.json").read_text())["progress"]["epoch"] == 4
    for found, expected in zip(work().state_dict().values(), fit_heads(traces, SETTINGS, False).state_dict().values()):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
