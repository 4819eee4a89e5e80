"""The command line, end to end on a tiny model: trace, train, calibrate, evaluate, report, convert."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_llava import LAYERS, save_tiny_llava

import dyvte
from dyvte.cli.main import COMMANDS, main
from dyvte.data import load_samples
from dyvte.promise import Promise
from dyvte.training.store import load_traces
from dyvte.training.write import write_traces


@pytest.fixture(scope="module")
def mllm(tmp_path_factory):
    return save_tiny_llava(tmp_path_factory.mktemp("models") / "tiny")


def trace(mllm, output, n=40, seed=5, **more):
    pairs = {"model": mllm, "output": output, "dtype": "float32", "max_new_tokens": 3, "unit_size": 16} | more
    scenes = f"data={{scenes: {{split: dev, n: {n}, seed: {seed}}}}}"
    main(["trace", scenes, *[f"{key}={value}" for key, value in pairs.items()]])


@pytest.fixture(scope="module")
def traces(mllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces") / "all"
    trace(mllm, folder, n=300)
    return folder


@pytest.fixture(scope="module")
def held_out(mllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces") / "held-out"
    trace(mllm, folder, n=200, seed=6)
    return folder


def test_a_trace_is_what_generation_does(mllm, traces):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from dyvte.data import encode

    loaded = load_traces(traces)
    assert loaded.state.shape == (300, LAYERS, 32) and loaded.state.dtype == torch.float16
    assert loaded.provenance["base_model"] == str(mllm) and loaded.provenance["answers"] == "dense"
    model = AutoModelForImageTextToText.from_pretrained(mllm, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(mllm)
    samples = load_samples({"scenes": {"split": "dev", "n": 300, "seed": 5}})[:24]
    inputs = encode(processor, samples)
    outcomes = set()
    for layer in range(1, LAYERS + 1):
        answers = []
        for policy in (dyvte.NeverExit(), dyvte.FixedExit(layer)):
            with torch.no_grad(), dyvte.visual_exit(model, policy):
                answers.append(model.generate(**inputs, max_new_tokens=3, do_sample=False))
        length = inputs["input_ids"].shape[1]
        for i in range(24):
            dense, left = (a[i, length:].tolist() for a in answers)
            end = dense.index(2) + 1 if 2 in dense else len(dense)
            same = dense[:end] == left[:end]
            assert same == (loaded.agreement[i, layer - 1].item() == 1)
            outcomes.add(same)
            row = loaded.rows[i]
            assert row["traced_answer"] == processor.decode(dense[:end], skip_special_tokens=True).strip()
            assert row["visual_tokens"] == 36 and row["question"] == samples[i].question
    assert outcomes == {True, False}


def test_traces_go_on_where_they_stopped(mllm, tmp_path, monkeypatch):
    trace(mllm, tmp_path / "once")
    import dyvte.training.write as module

    real, calls = module.trace_samples, []

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "trace_samples", stops)
    with pytest.raises(SystemExit) as stop:
        trace(mllm, tmp_path / "twice")
    assert stop.value.code == 130
    with pytest.raises(ValueError, match="16 of 40 traces"):
        load_traces(tmp_path / "twice")
    trace(mllm, tmp_path / "twice")
    assert len(calls) == 2 + 1 + 3  # a shard of two batches; one of the next, lost; what was left
    once, twice = load_traces(tmp_path / "once"), load_traces(tmp_path / "twice")
    assert torch.equal(once.state, twice.state) and once.rows == twice.rows


def test_given_answers_can_be_traced(mllm, tmp_path):
    trace(mllm, tmp_path, answers="dataset")
    loaded = load_traces(tmp_path)
    assert [row["traced_answer"] for row in loaded.rows] == [row["answers"][0] for row in loaded.rows]
    assert loaded.agreement[:, -1].eq(1).all() and not loaded.agreement.eq(1).all()


def test_from_traces_to_a_report(mllm, traces, held_out, tmp_path, capsys):
    heads, results = tmp_path / "heads", tmp_path / "results"
    arguments = [f"traces={traces}", f"output={heads}", "alpha=0.3", "fit.epochs=3"]
    main(["train", *arguments, f"calibration={held_out}"])
    assert json.loads(capsys.readouterr().out)["bound"] <= 0.3
    main(["calibrate", f"heads={heads}", f"traces={held_out}", "alpha=0.4"])
    assert dyvte.ExitHeads.from_pretrained(heads).config.promise.alpha == 0.4
    published = tmp_path / "published"
    fit = "fit={form: original, width: 32, label_rule: original, epochs: 2}"
    main(["train", f"traces={traces}", f"output={published}", "alpha=null", fit])
    assert dyvte.ExitHeads.from_pretrained(published).config.threshold == 0.5
    settings = {
        "model": str(mllm),
        "heads": str(heads),
        "dtype": "float32",
        "data": {"scenes": {"split": "test", "n": 12}},
        "policies": {
            "learned": {},
            "learned-published": {"heads": str(published)},
            "fixed-2": {"layer": 2},
            "random": {"p": 0.5},
            "fastv-50": {"layer": 1, "keep": 0.5, "exit": {"learned": {}}},
            "prune-50": {"layer": 1, "keep": 0.5},
        },
        "output": str(results),
    }
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(settings))
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "evaluate.yaml"), "batch_size=4", "max_new_tokens=3"])
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "policy" and lines[2:] == ["dense", *sorted(settings["policies"])]
    summary = json.loads((results / "summary.json").read_text())
    assert set(summary["policies"]) == {"dense", *settings["policies"]}
    assert summary["policies"]["fixed-2"]["mean_exit_layer"] == 2
    main(["report", str(results)])
    assert Promise.read(results) == dyvte.ExitHeads.from_pretrained(heads).config.promise
    capsys.readouterr()
    main(
        ["calibrate", "policy=vtw", f"traces={traces}", "vtw.first=1", "vtw.eta=100", f"output={tmp_path / 'vtw.json'}"]
    )
    assert json.loads((tmp_path / "vtw.json").read_text())["layer"] == 1
    main(
        [
            "inspect",
            *(f"{k}={json.dumps(settings[k])}" for k in ("model", "dtype", "data")),
            f"output={tmp_path / 'look'}",
        ]
    )
    assert (tmp_path / "look" / "inspect.png").stat().st_size > 10_000
    assert list(results.rglob("*.html"))


def test_gates_of_the_original_code(tmp_path):
    gates = {}
    for i in range(3):
        gates[f"model.visual_gates_router.{i}.w1.weight"] = torch.randn(6, 8)
        gates[f"model.visual_gates_router.{i}.w2.weight"] = torch.randn(2, 6)
    save_file(gates, tmp_path / "gates.safetensors")
    torch.save(gates, tmp_path / "gates.bin")
    for name in ("gates.safetensors", "gates.bin"):
        main(["convert", f"weights={tmp_path / name}", "base_model=some/model", f"output={tmp_path / name}-heads"])
        heads = dyvte.ExitHeads.from_pretrained(tmp_path / f"{name}-heads")
        assert torch.equal(heads.heads.w1[2], gates["model.visual_gates_router.2.w1.weight"])
        assert heads.config.base_model == "some/model" and heads.config.threshold == 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_within_a_second(command):
    code = f"""
import sys, time
from dyvte.cli.main import main
try:
    main(["{command}", "--help"])
except SystemExit as stop:
    assert stop.code == 0
assert time.process_time() < 1 and not {{"torch", "numpy"}} & set(sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith(f"usage: dyvte {command}") and "Examples:" in out


def test_the_program_alone_explains_itself(capsys):
    main([])
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {command} +[A-Z].*\.$", out, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize(
    ("change", "match"), [({"answers": "mine"}, "answers must be"), ({"samples": []}, "no samples")]
)
def test_traces_refuse(change, match, tmp_path):
    arguments = {"model": None, "processor": None, "samples": [1], "folder": tmp_path} | change
    with pytest.raises(ValueError, match=match):
        write_traces(**arguments)
