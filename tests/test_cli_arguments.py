"""Command lines become typed configs, or a fault with its remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from dyvte.cli.arguments import parse_arguments, read_arguments
from dyvte.cli.configs import EvaluateConfig, ReportConfig
from dyvte.config import CalibrateConfig, FitConfig, TraceConfig, TrainConfig

ROOT = Path(__file__).parents[1]
GQA = ROOT / "configs/data/gqa.yaml"
NEEDED = ["model=m", "output=o", "data={scenes: {n: 5}}"]


def parse(config_class, *arguments):
    return parse_arguments(config_class, arguments, prog="prog")


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["batch_size=4"], "batch_size", 4),
        (["--batch_size=4"], "batch_size", 4),
        (["--batch_size", "4"], "batch_size", 4),
        (["batch_size=4", "batch_size=5"], "batch_size", 5),
        (["alpha=1e-3"], "alpha", 0.001),
        (["alpha=null"], "alpha", None),
        (["model=123"], "model", "123"),
        (["model='1 2'"], "model", "1 2"),
        (["model=a=b"], "model", "a=b"),
        (["exits=[1, 2]"], "exits", [1, 2]),
        (["exits=2"], "exits", 2),
        (["data.scenes.n=500", "data.scenes.split=dev"], "data", {"scenes": {"n": 500, "split": "dev"}}),
        ([f"data={GQA}"], "data", str(GQA)),
        ([f"data={GQA}", "data.limit=7"], "data", yaml.safe_load(GQA.read_text()) | {"limit": 7}),
        (["data={where: {answer: 'no'}, x: '12', y: 1e-3}"], "data", {"where": {"answer": "no"}, "x": "12", "y": 1e-3}),
        (["held_out.path=a"], "held_out", {"path": "a"}),
        (["--plan"], "plan", True),
        (["--plan", "seed=3"], "plan", True),
        (["--plan", "false"], "plan", False),
    ],
)
def test_values(arguments, key, value):
    found = getattr(parse(TrainConfig, *NEEDED, *arguments), key)
    assert found == value and type(found) is type(value)


def test_settings_within_settings(tmp_path):
    assert parse(TrainConfig, *NEEDED, "fit={epochs: 3}", "fit.lr=1e-4").fit.lr == 1e-4
    (tmp_path / "fit.yaml").write_text("epochs: 3\nlr: 1e-4\n")
    fit = parse(TrainConfig, *NEEDED, f"fit={tmp_path / 'fit.yaml'}", "fit.epochs=4").fit
    assert (fit.epochs, fit.lr, fit.width) == (4, 1e-4, 128)
    assert parse(CalibrateConfig, "traces=[a, b]", "vtw.eta=1e-3").vtw.eta == 0.001


def test_pairs_win_over_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\noutput: o\nbatch_size: 3\nseed: 7\n")
    config = parse(TraceConfig, str(tmp_path / "run.yaml"), "seed=8")
    assert (config.batch_size, config.seed) == (3, 8)
    assert parse_arguments(ReportConfig, ["runs/x"], prog="prog", positional="directory").directory == "runs/x"


@pytest.mark.parametrize("name", ["trace", "train", "evaluate"])
def test_shipped_configs_are_read(name):
    config_class = {"trace": TraceConfig, "train": FitConfig, "evaluate": EvaluateConfig}[name]
    assert parse(config_class, str(ROOT / f"configs/{name}.yaml"), "output=elsewhere").output == "elsewhere"


@pytest.mark.parametrize("noted", [None, "5"])
def test_what_a_launcher_adds(monkeypatch, noted):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if noted is not None:
        monkeypatch.setenv("LOCAL_RANK", noted)
    else:
        monkeypatch.setenv("LOCAL_RANK", "")  # so that it is put back
        monkeypatch.delenv("LOCAL_RANK")
    parse(TraceConfig, "--local_rank=2", str(ROOT / "configs/trace.yaml"))
    assert os.environ["LOCAL_RANK"] == (noted or "2")


@pytest.mark.parametrize(
    ("argument", "fault"),
    [
        ("btach_size=3", "unknown key btach_size for `prog`: did you mean batch_size"),
        ("fit.epoch=3", "unknown key fit.epoch for `prog`: did you mean fit.epochs"),
        ("epochs=3", "did you mean fit.epochs"),
        ("fit.zzz=3", "choose from form, width"),
        ("batch_size=0", "batch_size must be 1 or more, not 0"),
        ("batch_size=many", "batch_size must be a whole number 1 or more, not 'many'"),
        ("batch_size=true", "batch_size must be a whole number"),
        ("batch_size=null", "batch_size must be a whole number"),
        ("exits=1.5", "exits must be a whole number, a list of whole numbers or null"),
        ("alpha=1", "alpha must be above 0 and below 1, not 1"),
        ("fit.lr=.nan", "fit.lr must be above 0, not nan"),
        ("fit.dropout=1", "fit.dropout must be 0 or more and below 1"),
        ("online.passes=0", "online.passes must be 1 or more"),
        ("plan=maybe", "plan must be true or false"),
        ("mode=x", "mode must be one of offline, online, not 'x'"),
        ("fit=3", "fit must be a mapping"),
        ("quantization=[1]", "quantization must be a mapping or null"),
        ("model.x=3", "model is 'm' and has no keys"),
        ("data.scenes.n.x=3", "data.scenes.n is 5 and has no keys"),
        ("data={a", "the value of data is not YAML"),
        ("data={a: 1, a: 2}", "the key 'a' is there twice"),
        ("oops", "'oops' is not key=value"),
        ("-x", "'-x' is not key=value"),
        ("--seed", "--seed has no value"),
    ],
)
def test_faults(argument, fault, capsys):
    arguments = [*NEEDED, argument]
    with pytest.raises(SystemExit) as stop:
        read_arguments(TrainConfig, arguments, prog="prog")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and fault in error


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="`prog` needs data, output: set them"):
        parse(TraceConfig, "model=m")


@pytest.mark.parametrize("config_class", [TrainConfig, EvaluateConfig, CalibrateConfig])
def test_help_explains_every_key(config_class, capsys):
    with pytest.raises(SystemExit) as stop:
        read_arguments(config_class, ["--help"], prog="prog", examples=["prog a=b"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "prog a=b" in out and "`" not in out
    lines = [line.split() for line in out.splitlines() if line.startswith("  ") and line[2] != " "]
    keys = [words for words in lines if words[:2] != ["prog", "a=b"]]
    assert len(keys) > 9 and all(len(words) > 2 for words in keys)
