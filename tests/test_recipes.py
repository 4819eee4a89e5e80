"""The recipes in one process: what they write, that they go on, and what they refuse before any work is done."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from test_traces_on_disk import files, mllm  # noqa: F401 (a fixture)

from dyvte.config import FitConfig, FitSettings, OnlineSettings, TraceConfig, TrainConfig
from dyvte.heads import ExitHeads
from dyvte.ranks import Ranks
from dyvte.training import recipes

ROOT = Path(__file__).parents[1]

FIT = FitSettings(epochs=4, batch_size=16)


def scenes(split, n, seed):
    return {"scenes": {"split": split, "n": n, "seed": seed}}


def config(mllm, folder, **more):  # noqa: F811
    asked = {
        "model": str(mllm[2]),
        "dtype": "float32",
        "data": scenes("train", 70, 1),
        "held_out": scenes("dev", 41, 2),
        "max_new_tokens": 3,
        "alpha": 0.4,
        "fit": FIT,
        "work": str(folder / "work"),
        "output": str(folder / "heads"),
    }
    return TrainConfig(**asked | more)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_stages_and_each_by_itself(mllm, here):  # noqa: F811
    whole = config(mllm, here)
    heads = recipes.train(whole, Ranks())
    assert heads.config.calibration["samples"] == 41 and "calibration_auroc" in heads.config.training
    assert {p.name for p in (here / "heads").iterdir()} >= {"config.json", "model.safetensors", "README.md"}
    made = {p: p.stat().st_mtime_ns for p in (here / "work").rglob("units/*")}
    first = (here / "heads/model.safetensors").read_bytes()
    recipes.train(whole, Ranks())  # goes on: nothing is made again
    assert {p: p.stat().st_mtime_ns for p in (here / "work").rglob("units/*")} == made and len(made) == 10
    assert (here / "heads/model.safetensors").read_bytes() == first
    shared = {"model": whole.model, "dtype": "float32", "max_new_tokens": 3}
    for name, data in (("train", whole.data), ("held-out", whole.held_out)):
        recipes.trace(TraceConfig(**shared, data=data, output=str(here / name)), Ranks())
        assert files(here / name) == files(here / "work" / name)
    again = FitConfig(traces="train", calibration="held-out", output=str(here / "again"), fit=FIT, alpha=0.4)
    assert recipes.fit(again, Ranks()).config.threshold == heads.config.threshold
    assert (here / "again/model.safetensors").read_bytes() == first


def test_online(mllm, here):  # noqa: F811
    online = OnlineSettings(buffer=64, updates=2, batch_size=16)
    heads = recipes.train(config(mllm, here, mode="online", online=online), Ranks())
    saved = ExitHeads.from_pretrained(here / "heads").config
    assert heads.config.threshold == saved.threshold and saved.calibration["samples"] == 41
    assert not (here / "work/train").exists() and saved.training["online"]["buffer"] == 64


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"held_out": None}, "a promise needs held-out samples: name some"),
        ({"alpha": 0.01}, "41 traces cannot show a risk below 0.01.*230 held-out"),
        ({"tracking": "wandb"}, "pip install wandb"),
        ({"data": {"path": "nowhere.json", "format": "llava"}}, "there is no JSON file nowhere.json"),
    ],
)
def test_faults_are_said_before_a_model_is_loaded(mllm, here, monkeypatch, more, match):  # noqa: F811
    def load(*_):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(recipes, "load_mllm", load)
    with pytest.raises(ValueError, match=match):
        recipes.train(config(mllm, here, **more), Ranks())


def test_samples_of_training_are_refused_before_anything_is_trained(mllm, here):  # noqa: F811
    with pytest.raises(ValueError, match="41 of the 41 samples to calibrate on are those the heads were trained on"):
        recipes.train(config(mllm, here, held_out=scenes("train", 41, 1)), Ranks())
    assert not (here / "heads").exists() and not (here / "work/fit").exists()


@pytest.mark.parametrize(
    ("script", "keys", "fault"),
    [
        ("trace", "model=m data=nowhere.yaml output=out", "there is no data config nowhere.yaml"),
        ("fit", "traces=nowhere output=out alpha=null", "nowhere holds no traces: make some with `dyvte trace`"),
        ("train", "model=m data=nowhere.yaml output=out alpha=null", "there is no data config nowhere.yaml"),
        ("train", "model=m data={scenes: {split: dev, n: 4}} output=out alpha=null shard=zero9", "shard must be"),
    ],
)
def test_scripts_end_with_fault_and_remedy(script, keys, fault, tmp_path, monkeypatch, capsys):
    """As the program does: exit code 2 and no traceback."""
    monkeypatch.chdir(tmp_path)
    arguments = re.split(r" (?=\w+=)", keys)
    monkeypatch.setattr("sys.argv", [script, *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / f"train/{script}.py"), run_name="__main__")
    assert stopped.value.code == 2 and f"error: {fault}" in capsys.readouterr().err
