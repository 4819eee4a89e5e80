from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dyvte import ExitPolicy, FixedExit, RandomExit, visual_exit
from dyvte.data import Sample, encode, load_samples
from dyvte.evaluation.costs import prefill_flops
from dyvte.evaluation.policies import PerSampleExit
from dyvte.evaluation.runner import evaluate

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
LAYERS, TOKENS = 4, 4
SETTINGS = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 9,
        "projection_dim": 16,
    },
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
    },
}


@pytest.fixture(scope="module")
def mllm():
    from reference_mllm import build_model, build_processor

    torch.manual_seed(0)
    processor = build_processor(9)
    model = build_model(SETTINGS, len(processor.tokenizer)).eval()
    model.generation_config.eos_token_id = [2, 19]  # 19 is frequent: answers of several lengths
    return model, processor


@pytest.fixture(scope="module")
def samples():
    return load_samples({"scenes": {"split": "dev", "n": 10}})


class Counting(ExitPolicy):
    """Exits at 2, and counts prompts."""

    def __init__(self):
        self._calls = 0

    def plan(self, batch_size, num_layers):
        self._calls += batch_size
        return torch.full((batch_size,), 2)


def alone(model, processor, sample: Sample, policy: ExitPolicy | None) -> list[int]:
    inputs = encode(processor, [sample])
    with visual_exit(model, policy or FixedExit(LAYERS)):
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def test_rows_and_summary_are_what_single_runs_give(mllm, samples, tmp_path):
    model, processor = mllm
    oracle = PerSampleExit({sample.id: 1 + i % LAYERS for i, sample in enumerate(samples)})
    policies = {
        "fixed-2": FixedExit(2),
        "random": RandomExit(0.5, seed=1),
        "oracle": oracle,
        "never": FixedExit(LAYERS),
    }
    summary = evaluate(
        model, processor, samples, policies, tmp_path, batch_size=4, max_new_tokens=TOKENS, timing_batches=2,
        pictures=3, config={"data": {"note": "kept"}}, progress=False,
    )  # fmt: skip
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ["dense", *policies]
    }
    dense = summary["policies"]["dense"]
    assert dense["agreement"] == 1 and dense["flops_removed"] == 0 and dense["exit_layers"] == [0, 0, 0, len(samples)]
    for name, policy in {"dense": None, "fixed-2": FixedExit(2), "never": None}.items():
        for sample, row in zip(samples, rows[name]):
            assert row["ids"] == alone(model, processor, sample, policy)
            assert row["answer"] == processor.tokenizer.decode(row["ids"], skip_special_tokens=True).strip()
    assert len({len(row["ids"]) for row in rows["dense"]}) > 1  # answers of several lengths, so padding was cut off
    assert [row["exit_layer"] for row in rows["oracle"]] == [1 + i % LAYERS for i in range(len(samples))]
    for name in policies:
        together = summary["policies"][name]
        agree = [row["ids"] == full["ids"] for row, full in zip(rows[name], rows["dense"])]
        assert together["agreement"] == pytest.approx(sum(agree) / len(samples))
        assert together["disagreements"] == agree.count(False)
        assert together["n"] == len(samples) == sum(together["exit_layers"])
        assert sum(kind["n"] for kind in together["by_kind"].values()) == len(samples)
    assert summary["policies"]["never"]["agreement"] == 1
    half = summary["policies"]["fixed-2"]
    assert half["visual_layers_removed"] == pytest.approx(0.5) and half["mean_exit_layer"] == 2
    row, config = rows["fixed-2"][0], model.config.get_text_config()
    text = encode(processor, [samples[0]])["input_ids"].shape[1] - 100
    assert (row["text_tokens"], row["visual_tokens"]) == (text, 100)
    assert row["flops"] == prefill_flops(config, text, 100, 2)
    assert row["kv_bytes"] == 2 * 2 * 8 * 4 * (2 * (text + 100) + 2 * text)  # K and V, two heads of 8, four bytes
    assert summary["config"]["data"] == {"note": "kept"} and summary["layers"] == LAYERS
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert {f"{i}.png" for i in range(3)} <= {path.name for path in (tmp_path / "images").iterdir()}


def test_times_and_the_measured_cache(mllm, samples, tmp_path):
    model, processor = mllm
    options = {"batch_size": 2, "max_new_tokens": TOKENS, "timing_batches": 2, "progress": False}
    summary = evaluate(model, processor, samples[:4], {"one": FixedExit(1)}, tmp_path, **options)
    timing = summary["policies"]["one"]["timing"]
    assert timing["batches"] == 2 and timing["batch_size"] == 2
    for side in ("dense", "exit"):
        assert timing["decode_seconds"][side] > 0
        assert 0 < timing["decoder_seconds"][side] < timing["prefill_seconds"][side]
    shorter = timing["cache_bytes"]["exit"] / timing["cache_bytes"]["dense"]
    assert 1 / LAYERS < shorter < 0.4  # one layer of four holds the visual tokens, the text is a tenth


def test_an_interrupted_run_goes_on_and_repeats_nothing(mllm, samples, tmp_path, monkeypatch):
    model, processor = mllm
    options = {"batch_size": 2, "max_new_tokens": TOKENS, "timing_batches": 0, "progress": False}
    monkeypatch.setattr("dyvte.evaluation.subject.Subject.check", lambda *arguments: None)
    whole = evaluate(model, processor, samples, {"two": Counting()}, tmp_path / "whole", **options)
    evaluate(model, processor, samples, {"two": Counting()}, tmp_path / "cut", **options)
    for name, keep in (("dense", 6), ("two", 5)):
        path = tmp_path / "cut" / f"{name}.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:keep]) + lines[keep][:20])
    policy = Counting()
    again = evaluate(model, processor, samples, {"two": policy}, tmp_path / "cut", **options)
    assert again["policies"] == whole["policies"]
    assert policy._calls == 6  # the batch that was cut, and the two after it
    done = Counting()
    evaluate(model, processor, samples, {"two": done}, tmp_path / "cut", **options)
    assert done._calls == 0
    more = evaluate(model, processor, samples, {"three": FixedExit(3)}, tmp_path / "cut", **options)
    assert set(more["policies"]) == {"dense", "three"}


def test_a_folder_of_something_else_is_refused(mllm, samples, tmp_path):
    model, processor = mllm
    options = {"max_new_tokens": 1, "timing_batches": 0, "progress": False}
    evaluate(model, processor, samples[:2], {"a": FixedExit(2)}, tmp_path, **options)
    with pytest.raises(ValueError, match="made with another a: choose another folder"):
        evaluate(model, processor, samples[:2], {"a": FixedExit(3)}, tmp_path, **options)
    with pytest.raises(ValueError, match="made with another max_new_tokens"):
        evaluate(model, processor, samples[:2], {"a": FixedExit(2)}, tmp_path, **options | {"max_new_tokens": 2})
    with pytest.raises(ValueError, match="made with another data, samples"):
        evaluate(model, processor, samples[:3], {"a": FixedExit(2)}, tmp_path, **options)
    evaluate(model, processor, samples[:2], {"a": FixedExit(2)}, tmp_path, **options, batch_size=1)


def test_anything_that_changes_the_model_is_a_policy(mllm, samples, tmp_path):
    model, processor = mllm

    @contextmanager
    def nothing(model):
        yield SimpleNamespace()

    options = {"max_new_tokens": 2, "timing_batches": 0, "progress": False}
    summary = evaluate(model, processor, samples[:3], {"nothing": nothing}, tmp_path, **options)
    assert summary["policies"]["nothing"]["agreement"] == 1
    assert summary["policies"]["nothing"]["mean_exit_layer"] == LAYERS


def test_visual_mask_stands_in_for_ids(mllm, samples, tmp_path):
    model, processor = mllm
    options = {"max_new_tokens": 2, "timing_batches": 0, "progress": False}
    direct = evaluate(model, processor, samples[:4], {"a": FixedExit(2)}, tmp_path / "ids", **options)
    seen = evaluate(
        model, processor, samples[:4], {"a": FixedExit(2)}, tmp_path / "mask",
        visual_mask=lambda inputs: inputs["input_ids"] == 4, **options,
    )  # fmt: skip
    assert seen["policies"] == direct["policies"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": {"dense": FixedExit(1)}}, "policy names"),
        ({"policies": {"a/b": FixedExit(1)}}, "policy names"),
        ({"policies": {"a": FixedExit(9)}}, "outside 1 ... 4"),
        ({"policies": {"a": PerSampleExit({})}}, "no exit layer for 1 samples"),
        ({"metric": "f2"}, "unknown metric"),
        ({"metric": "multiple_choice"}, "map `choices`"),
        ({"samples": []}, "no samples"),
        ({"batch_size": 0}, "must be 1 or more"),
    ],
)
def test_bad_input_is_refused_before_any_work(mllm, samples, tmp_path, changes, message):
    model, processor = mllm
    given = {"samples": samples, "policies": {}, "output_dir": tmp_path / "new", "progress": False} | changes
    with pytest.raises(ValueError, match=message):
        evaluate(model, processor, **given)
    assert not (tmp_path / "new").exists()
