"""Exits in lmms-eval: its own models answer as under `dyvte.visual_exit`, and what is reported of them is true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lmms_tasks import write_task
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import dyvte
from dyvte.data.scenes.source import samples
from dyvte.evaluation.costs import prefill_flops
from dyvte.integrations.benchmark import benchmarks

pytest.importorskip("lmms_eval", reason="lmms-eval has an environment of its own: make test-lmms")

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

ROOT = Path(__file__).parents[1]
MLLM, HEADS = ROOT / "checkpoints/reference-mllm", ROOT / "checkpoints/reference-heads"
SCENES, SEED, RISK = 24, 31, 0.2
BASE = f"base=llava_hf,pretrained={MLLM},dtype=float32,device_map=cpu"
ITSELF = BASE.partition(",")[2]
EXITS = f"{BASE},heads={HEADS},risk={RISK}"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "scenes_a", SCENES, SEED)
    write_task(folder, "scenes_b", 6, SEED + 1)
    return folder


@pytest.fixture(scope="module")
def truth():
    """Answers of both kinds to the scenes of `scenes_a`, exit layers and FLOPs, without lmms-eval."""
    model = AutoModelForImageTextToText.from_pretrained(MLLM, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(MLLM)
    policy = dyvte.LearnedExit(dyvte.ExitHeads.from_pretrained(HEADS), risk=RISK)
    dense, exits, layers, flops = [], [], [], [0, 0]
    for sample in samples("test", SCENES, SEED):
        content = [{"type": "image"}, {"type": "text", "text": sample["question"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[sample["image"]], text=text, return_tensors="pt")
        start = inputs["input_ids"].shape[1]

        def answer(inputs=inputs, start=start):
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            return processor.decode(out[0, start:], skip_special_tokens=True)

        dense.append(answer())
        with dyvte.visual_exit(model, policy) as handle:
            exits.append(answer())
        layers += handle.layers.tolist()
        visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
        config = model.config.get_text_config()
        for kind, layer in enumerate((layers[-1], handle.num_layers)):
            flops[kind] += prefill_flops(config, start - visual, visual, layer)
    return {"dense": dense, "exits": exits, "layers": layers, "flops": flops, "num_layers": handle.num_layers}


def evaluate(arguments: str, tasks: Path, names=("scenes_a",), **options) -> dict:
    manager = TaskManager("ERROR", include_path=str(tasks), include_defaults=False, model_name="dyvte")
    given = {"model": "dyvte", "model_args": arguments, "batch_size": 1, "device": "cpu"} | options
    return simple_evaluate(tasks=list(names), task_manager=manager, bootstrap_iters=0, **given)


def answers(results: dict, task: str = "scenes_a") -> list[str]:
    return [sample["filtered_resps"][0] for sample in sorted(results["samples"][task], key=lambda s: s["doc_id"])]


def test_answers_exit_layers_and_savings(tasks, truth, tmp_path, capsys):
    results = evaluate(f"{EXITS},compare=true,record={tmp_path}/new/dyvte.json", tasks, ["scenes_a", "scenes_b"])
    assert answers(results) == truth["exits"] != truth["dense"]
    record = json.loads((tmp_path / "new/dyvte.json").read_text())
    task, layers = record["tasks"]["scenes_a"], truth["layers"]
    assert task["samples"] == SCENES and task["exit_layers"] == {str(e): layers.count(e) for e in sorted(set(layers))}
    assert task["mean_exit_layer"] == pytest.approx(sum(layers) / SCENES)
    assert task["visual_layers_removed"] == pytest.approx(1 - sum(layers) / SCENES / truth["num_layers"])
    assert task["flops_removed"] == pytest.approx(1 - truth["flops"][0] / truth["flops"][1])
    pairs = list(zip(truth["dense"], truth["exits"]))
    changed = [{"doc_id": i, "dense": d, "exits": e} for i, (d, e) in enumerate(pairs) if d != e]
    assert task["changed"] == changed and task["agreement"] == pytest.approx(1 - len(changed) / SCENES)
    assert 0 < task["prefill_seconds"] < 5 and 0 < task["dense_prefill_seconds"] < 5
    assert record["tasks"]["scenes_b"]["samples"] == 6 and record["settings"]["risk"] == RISK
    assert (
        f"| scenes_a | {SCENES} | {sum(layers) / SCENES:.2f} | {100 * task['agreement']:.1f} % |"
        in capsys.readouterr().out
    )


def test_dense_answers_are_those_of_the_base_itself(tasks, truth, tmp_path):
    dense = evaluate(f"{BASE},record={tmp_path}/dyvte.json", tasks)
    assert answers(dense) == truth["dense"] == answers(evaluate(ITSELF, tasks, model="llava_hf"))
    task = json.loads((tmp_path / "dyvte.json").read_text())["tasks"]["scenes_a"]
    assert task["mean_exit_layer"] is task["agreement"] is None and task["prefill_seconds"] > 0


def test_the_simple_form_of_a_base(tasks):
    template = "chat_template=USER: {{ messages[0].content }} ASSISTANT:"
    simple = [
        evaluate(f"{arguments},{template}", tasks, ["scenes_b"], model=model, force_simple=True)
        for model, arguments in (("dyvte", f"{EXITS},compare=true"), ("dyvte", BASE), ("llava_hf", ITSELF))
    ]
    assert answers(simple[1], "scenes_b") == answers(simple[2], "scenes_b")
    assert all(s["config"]["model_backend"] == "dyvte.integrations.lmms.SimpleExits (simple)" for s in simple[:2])


def test_requests_are_as_they_were(tasks, truth, monkeypatch):
    """The dense run before must not change what the run with exits is asked."""
    from lmms_eval.models.chat.llava_hf import LlavaHf

    inner, seen = LlavaHf.generate_until, []

    def generate_until(self, requests):
        seen.append([dict(request.args[2]) for request in requests])
        return inner(self, requests)

    monkeypatch.setattr(LlavaHf, "generate_until", generate_until)
    monkeypatch.setattr("dyvte.integrations.lmms.AT_ONCE", 10)
    assert answers(evaluate(f"{EXITS},compare=true", tasks)) == truth["exits"]
    assert [len(requests) for requests in seen] == [10, 10, 10, 10, 4, 4]
    assert all(arguments == seen[0][0] for requests in seen for arguments in requests)


def test_errors_that_a_model_keeps_to_itself(tasks, monkeypatch):
    """llava_hf logs an error of its model and answers nothing, which would count as an answer."""
    generate, calls = LlavaForConditionalGeneration.generate, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", failing)
    with pytest.raises(ValueError, match=f"answered {SCENES} requests with {SCENES - 1} prompts"):
        evaluate(EXITS, tasks)


@pytest.mark.parametrize(
    "arguments, fault",
    [
        (f"pretrained={MLLM}", "needs base=NAME"),
        (f"base=dyvte,pretrained={MLLM}", "needs base=NAME"),
        ("base=nothing", "'nothing' not found in available models"),
        (f"{BASE},risk=0.1", "give heads=FOLDER"),
        (f"{BASE},heads={MLLM}", "holds neither a promise nor exit heads"),
        (f"{BASE},heads={HEADS},risk=0.000001", "cannot show a risk as low as"),
    ],
)
def test_bad_arguments(tasks, arguments, fault):
    with pytest.raises(ValueError, match=fault):
        evaluate(arguments, tasks)


def test_other_kinds_of_requests_are_refused(tasks):
    from dyvte.integrations.lmms import Exits

    model = Exits.create_from_arg_string(EXITS, {"device": "cpu"})
    for kind in ("loglikelihood", "generate_until_multi_round", "generate_visual_cot"):
        with pytest.raises(ValueError, match="run others with the base model itself"):
            getattr(model, kind)([])


def test_ready_benchmarks_are_tasks_of_lmms_eval_with_these_metrics():
    from lmms_eval.utils import load_yaml_config

    manager = TaskManager("ERROR")
    for benchmark in benchmarks(None):
        assert benchmark.task in manager.all_subtasks, benchmark
        config = load_yaml_config(manager.task_index[benchmark.task]["yaml_path"], mode="simple")
        assert set(benchmark.metrics) <= {metric["metric"] for metric in config["metric_list"]}, benchmark
        filters = {entry["name"] for entry in config.get("filter_list", [])} or {"none"}
        assert benchmark.filter in filters and config["output_type"] == "generate_until", benchmark


def test_the_commands_of_dyvte_benchmark_fill_its_table(tasks, truth, tmp_path):
    model = dict(pair.split("=") for pair in f"{BASE},heads={HEADS}".split(","))
    config = {
        "models": {"reference": model},
        "benchmarks": {"Scenes": {"task": "scenes_a", "metrics": ["exact_match"], "scale": 100}},
        "risks": [RISK],
        "output": "results",
        "include_path": str(tasks),
        "device": "cpu",
        "launcher": f"{sys.executable} -m lmms_eval",
    }
    (tmp_path / "benchmark.yaml").write_text(json.dumps(config))
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for command in ("-m dyvte.cli.main benchmark benchmark.yaml", None, "-m dyvte.cli.main benchmark benchmark.yaml"):
        words = ["sh", "results/commands.sh"] if command is None else [sys.executable, *command.split()]
        subprocess.run(words, cwd=tmp_path, env=offline, check=True, timeout=600)
    table = json.loads((tmp_path / "results/table.json").read_text())
    agreement = sum(d == e for d, e in zip(truth["dense"], truth["exits"])) / SCENES
    assert [(row["risk"], row["agreement"]) for row in table["rows"]] == [(None, None), (RISK, agreement)]
    assert not table["missing"] and not table["damaged"]
