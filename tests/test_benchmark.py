"""`dyvte benchmark`: the table joined from what lmms-eval 0.7.3 wrote about the reference MLLM, see tests/lmms_results.

Made by the commands of the plan below, on 12 and 8 scenes, `tests/lmms_tasks.py`.
"""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch.distributed as dist

from dyvte.cli.main import main
from dyvte.integrations.benchmark import benchmarks
from dyvte.integrations.lmms_record import TaskRecord, joined
from dyvte.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
MODEL = {
    "base": "llava_hf",
    "pretrained": "checkpoints/reference-mllm",
    "heads": "checkpoints/reference-heads",
    "dtype": "float32",
    "device_map": "cpu",
}
TASKS = {
    "Scenes": {"task": "scenes_a", "metrics": ["exact_match"], "scale": 100},
    "More": {"task": "scenes_b", "metrics": ["exact_match"], "scale": 100},
}
COLUMNS = ["Scenes", "More"]
RISKS = [0.01, 0.2]


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(ROOT / "tests/lmms_results", tmp_path / "results")
    return tmp_path / "results"


def benchmark(folder: Path, capsys, **changed) -> tuple[dict, str]:
    """table.json, and what was printed."""
    config = {"models": {"reference": MODEL}, "benchmarks": TASKS, "risks": RISKS, "output": str(folder)} | changed
    path = folder.parent / "benchmark.yaml"
    path.write_text(json.dumps(config))
    main(["benchmark", str(path)])
    return json.loads((folder / "table.json").read_text()), capsys.readouterr().out


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.rglob(pattern)
    return path


def logged(run: Path) -> dict[int, str]:
    lines = only(run, "*.jsonl").read_text().splitlines()
    return {sample["doc_id"]: sample["filtered_resps"] for sample in map(json.loads, lines)}


def test_table(folder, capsys):
    table, printed = benchmark(folder, capsys)
    assert not table["missing"] and not table["damaged"]
    assert [(r["risk"], r["benchmark"]) for r in table["rows"]] == [(a, b) for a in (None, *RISKS) for b in COLUMNS]
    for row in table["rows"]:
        setting = "dense" if row["risk"] is None else f"risk-{row['risk']}"
        run, dense = (folder / "reference" / name / row["benchmark"] for name in (setting, "dense"))
        answers, dense_answers = logged(run), logged(dense)
        task = TASKS[row["benchmark"]]["task"]
        scores = json.loads(only(run, "*_results.json").read_text())["results"][task]
        assert row["score"] == 100 * scores["exact_match,none"] and row["samples"] == len(answers)
        record = json.loads((run / "dyvte.json").read_text())["tasks"][task]
        if row["risk"] is None:
            assert row["agreement"] is row["mean_exit_layer"] is row["prefill_ratio"] is None
            continue
        assert row["agreement"] == sum(answers[i] == dense_answers[i] for i in dense_answers) / len(answers)
        exits = [int(layer) for layer, n in record["exit_layers"].items() for _ in range(n)]
        assert len(exits) == row["samples"] and row["mean_exit_layer"] == pytest.approx(sum(exits) / len(exits))
        assert row["visual_layers_removed"] == pytest.approx(1 - sum(exits) / len(exits) / 10)  # all scenes are alike
        dense_record = json.loads((dense / "dyvte.json").read_text())["tasks"][task]
        assert row["prefill_ratio"] == record["prefill_seconds"] / dense_record["prefill_seconds"]
    assert {row["agreement"] for row in table["rows"]} > {None, 1.0}, (
        "nothing was changed: the fixture shows too little"
    )
    with (folder / "table.csv").open() as file:
        assert [float(row["score"]) for row in csv.DictReader(file)] == [row["score"] for row in table["rows"]]
    text = (folder / "table.md").read_text()
    assert text in printed and "| ≤ 20 % changed | 83.3 (83.3) | 87.5 (87.5) | 85.4% |" in text
    assert (folder / "commands.sh").read_text() == ""


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def cut(path: Path) -> None:
    path.write_text(path.read_text()[: path.stat().st_size // 2])


def drop_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def set_score(value):
    return lambda path: edit_json(path, lambda c: c["results"]["scenes_a"].update({"exact_match,none": value}))


DAMAGE = [
    ("*_results.json", cut, "cannot be read"),
    ("*_results.json", lambda path: path.write_text("[]"), "holds no results"),
    ("*_results.json", set_score(None), "has no number for exact_match,none of task scenes_a"),
    ("*_results.json", set_score(float("nan")), "has no number"),
    ("*_results.json", lambda path: edit_json(path, lambda c: c["config"].update(limit=4.0)), "limit 4.0, not None"),
    ("*_results.json", lambda path: edit_json(path, lambda c: c["config"].update(model="llava_hf")), "other arguments"),
    ("*.jsonl", cut, "cannot be read"),
    ("*.jsonl", drop_line, "11 samples are logged, 12 were scored and 12 recorded"),
    ("*.jsonl", Path.unlink, "cannot be read"),
    ("dyvte.json", Path.unlink, "cannot be read"),
    ("dyvte.json", cut, "cannot be read"),
    ("dyvte.json", lambda path: edit_json(path, lambda c: c["tasks"].clear()), "says nothing of task scenes_a"),
]


@pytest.mark.parametrize("pattern, damage, fault", DAMAGE)
def test_damaged_results_are_named_and_run_again(folder, capsys, pattern, damage, fault):
    damage(only(folder / "reference/risk-0.01/Scenes", pattern))
    table, printed = benchmark(folder, capsys)
    assert list(table["damaged"]) == ["reference, risk 0.01, Scenes"] and not table["missing"]
    assert fault in table["damaged"]["reference, risk 0.01, Scenes"] and fault in printed
    assert len(table["rows"]) == 5 and "| ≤ 1 % changed | – | 100.0 (100.0) |" in printed
    (command,) = (folder / "commands.sh").read_text().splitlines()
    assert "risk=0.01" in command and "--tasks scenes_a " in command


def test_other_settings_and_other_questions(folder, capsys):
    table, _ = benchmark(folder, capsys, models={"reference": MODEL | {"dtype": "bfloat16"}})
    assert len(table["damaged"]) == 6 and "other arguments (dtype)" in next(iter(table["damaged"].values()))
    run = folder / "reference/risk-0.01/Scenes"
    lines = only(run, "*.jsonl").read_text().replace('"doc_id": 0,', '"doc_id": 77,')
    only(run, "*.jsonl").write_text(lines)
    table, _ = benchmark(folder, capsys)
    assert "answers other questions" in table["damaged"]["reference, risk 0.01, Scenes"]


def test_times_that_were_taken_in_turns_count(folder, capsys):
    def compared(content):
        content["tasks"]["scenes_a"].update(prefill_seconds=0.3, dense_prefill_seconds=0.4)

    edit_json(folder / "reference/risk-0.01/Scenes/dyvte.json", compared)
    edit_json(folder / "reference/risk-0.2/Scenes/dyvte.json", lambda content: content["hardware"].update(threads=7))
    table, _ = benchmark(folder, capsys)
    ratios = {(row["risk"], row["benchmark"]): row["prefill_ratio"] for row in table["rows"]}
    assert ratios[0.01, "Scenes"] == pytest.approx(0.75) and ratios[0.2, "Scenes"] is None


def test_a_later_run_takes_the_place_of_a_damaged_one(folder, capsys):
    run = folder / "reference/dense/More"
    for pattern in ("*_results.json", "*.jsonl"):
        path = only(run, pattern)
        shutil.copy(path, path.with_name("99991231_235959" + path.name[15:]))
        cut(path)
    table, _ = benchmark(folder, capsys)
    assert not table["damaged"] and len(table["rows"]) == 6


def test_commands_of_all_ready_benchmarks(folder, capsys):
    shutil.rmtree(folder)
    table, printed = benchmark(
        folder, capsys, benchmarks=None, limit=100, compare=True, launcher="accelerate -m lmms_eval"
    )
    commands = [shlex.split(line) for line in (folder / "commands.sh").read_text().splitlines()]
    assert len(commands) == len(table["missing"]) == 16 * 3 and not table["rows"]
    assert "HallusionBench, MMB, MMB-CN, MathVista: an API model reads the answers" in printed
    for words in commands:
        assert words[:3] == ["accelerate", "-m", "lmms_eval"] and words[-1] == "--log_samples"
        options = dict(zip(words[3:-1:2], words[4:-1:2]))
        assert options["--model"] == "dyvte" and options["--limit"] == "100"
        given = dict(pair.split("=") for pair in options["--model_args"].split(","))
        assert Path(given.pop("record")).parent == Path(options["--output_path"])
        exits = {"risk": given["risk"], "compare": "true"} if "risk" in given else {}
        assert given == {key: value for key, value in (MODEL | exits).items() if exits or key != "heads"}
    assert {words[words.index("--tasks") + 1] for words in commands} == {b.task for b in benchmarks(None)}


BAD = [
    ({"models": {}}, "models is empty"),
    ({"models": {"m": {"base": "llava_hf"}}}, "models.m must be a mapping with base"),
    ({"models": {"a/b": MODEL}}, "cannot be 'a/b'"),
    ({"models": {"m": MODEL | {"risk": 0.1}}}, "sets risk, which the plan does"),
    ({"models": {"m": MODEL | {"pretrained": "a,b"}}}, "takes no , = or quotes"),
    ({"risks": [0.0]}, "strictly between 0 and 1"),
    ({"risks": ["low"]}, "a list of numbers"),
    ({"benchmarks": ["POPPE"]}, "did you mean POPE?"),
    ({"benchmarks": {"X": {"task": "x"}}}, "must be a mapping with task and metrics"),
    ({"benchmarks": {"X": {"task": "x", "metrics": "acc"}}}, "must be a list such as"),
    ({"benchmarks": {"X": {"task": "x", "metrics": ["a"], "scale": "%"}}}, "must be a number"),
]


@pytest.mark.parametrize("changed, fault", BAD)
def test_bad_plans(tmp_path, capsys, changed, fault):
    with pytest.raises(SystemExit) as stopped:
        benchmark(tmp_path / "results", capsys, **changed)
    assert stopped.value.code == 2 and fault in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_records_of_ranks_become_one(monkeypatch):
    mine = TaskRecord(samples=3, exits=Counter({2: 2, 5: 1}), places=90, dense_places=300, seconds=[1.0, 2.0, 9.0])
    mine.compare(["a", "b", "c"], ["1", "2", "3"], ["1", "2", "4"])
    other = TaskRecord(samples=1, exits=Counter({5: 1}), places=50, dense_places=100, seconds=[3.0])
    other.compare(["d"], ["x"], ["y"])

    def gather(into, tasks):
        into[:] = [tasks, {"t": other, "u": TaskRecord(samples=7)}]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    whole = joined({"t": mine})
    assert whole["u"]["samples"] == 7 and whole["u"]["mean_exit_layer"] is whole["u"]["agreement"] is None
    task = whole["t"]
    assert task["samples"] == 4 and task["mean_exit_layer"] == 14 / 4 and task["exit_layers"] == {"2": 2, "5": 2}
    assert task["visual_layers_removed"] == 1 - 140 / 400 and task["prefill_seconds"] == 2.5
    assert task["agreement"] == 0.5 and [change["doc_id"] for change in task["changed"]] == ["c", "d"]


def test_the_shipped_plan_names_heads_that_the_recipes_train():
    plan = read_yaml(ROOT / "configs/benchmark.yaml")
    recipes = [read_yaml(path) for path in (ROOT / "configs/models").glob("*.yaml")]
    trained = {(recipe["model"], recipe["output"]) for recipe in recipes}
    assert {(model["pretrained"], model["heads"]) for model in plan["models"].values()} <= trained
