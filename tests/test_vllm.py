"""Exits in vLLM: decisions and answers are those of transformers' side, alone and among other requests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import draw_weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaConfig, Qwen2Config, Qwen3Config

import dyvte
from dyvte.data import encode, load_samples

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

ROOT = Path(__file__).parents[1]
MLLM, HEADS = ROOT / "checkpoints/reference-mllm", ROOT / "checkpoints/reference-heads"
SCENES = int(os.environ.get("DYVTE_VLLM_SCENES", 32))
TOKENS = 8


def for_vllm(folder: Path) -> None:
    """vLLM knows the vision tower by the names it had before transformers 5."""
    weights = folder / "model.safetensors"
    old, new = "vision_tower.", "vision_tower.vision_model."
    tensors = {name.replace(new, old).replace(old, new): value for name, value in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / MLLM.name
    shutil.copytree(MLLM, folder)
    for_vllm(folder)
    return folder


def tiny(folder: Path, kind: type) -> Path:
    """A random LLaVA with another language model, and heads for it that let scenes leave at different layers."""
    config = LlavaConfig.from_pretrained(MLLM)
    sizes = config.text_config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
    names += ("bos_token_id", "eos_token_id", "pad_token_id")
    config.text_config = kind(num_hidden_layers=6, num_key_value_heads=2, **{name: sizes[name] for name in names})
    config.text_config.architectures = [kind.__name__.replace("Config", "ForCausalLM")]
    config.dtype = torch.float32
    model = draw_weights(AutoModelForImageTextToText.from_config(config, dtype=torch.float32), spread=0.1)
    with torch.no_grad():
        model.lm_head.weight[config.image_token_id] = 0  # no placeholders in answers
    model.generation_config.eos_token_id = sizes["eos_token_id"]
    processor = AutoProcessor.from_pretrained(MLLM)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    torch.manual_seed(3)
    heads = dyvte.ExitHeads(dyvte.ExitHeadsConfig(num_layers=6, hidden_size=sizes["hidden_size"], width=8)).eval()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=0.5)
        heads.heads.layer.zero_()  # or the layer alone would decide
        heads.heads.norm_bias.zero_()
        heads.heads.norm_weight.fill_(1)
        inputs = encode(processor, scenes())
        logits = heads(dyvte.trace_batch(model, inputs).state)[:, :-1]
    heads.config.threshold = logits.flatten().quantile(0.7).sigmoid().item()
    heads.save_pretrained(folder / "heads")
    for_vllm(folder / "model")
    return folder


def scenes():
    return load_samples({"scenes": {"split": "test", "n": SCENES, "seed": 7}})[:]


def of_transformers(model: Path, policy: dyvte.ExitPolicy) -> dict:
    """What :func:`of_vllm` gives, by definition: one prompt after the other."""
    mllm = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    processor, made = AutoProcessor.from_pretrained(model), {"prompts": [], "answers": [], "layers": []}
    with torch.no_grad(), dyvte.visual_exit(mllm, policy) as exits:
        for sample in scenes():
            inputs = encode(processor, [sample])
            length = inputs["input_ids"].shape[1]
            answer = mllm.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, length:]
            made["prompts"].append(inputs["input_ids"][0].tolist())
            made["answers"].append(answer.tolist())
            made["layers"].append(exits.layers.item())
    return made


def of_vllm(folder: Path, model: Path, concurrencies: str, **environment: str) -> dict:
    """Answers of an engine by concurrency."""
    output = folder / "answers.json"
    command = [sys.executable, str(Path(__file__).with_name("vllm_answers.py")), str(model), str(SCENES), concurrencies]
    done = subprocess.run(
        [*command, str(output)], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(output.read_text())


def test_the_dense_engine_answers_as_transformers_does(reference, tmp_path):
    expected = of_transformers(reference, dyvte.NeverExit())
    made = of_vllm(tmp_path, reference, "8")["8"]
    assert made["prompts"] == expected["prompts"]
    assert made["answers"] == expected["answers"]
    assert made["layers"] == [None] * SCENES


def test_exits_and_answers_are_those_of_transformers(reference, tmp_path):
    heads = dyvte.ExitHeads.from_pretrained(HEADS)
    expected = of_transformers(reference, dyvte.LearnedExit(heads))
    assert len(set(expected["layers"])) > 2, "scenes should leave at different layers"
    for concurrency, made in of_vllm(tmp_path, reference, "1,8,32", DYVTE_HEADS=str(HEADS)).items():
        assert made == expected, f"{concurrency} at once"


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config])
def test_other_language_models(kind, tmp_path):
    folder = tiny(tmp_path, kind)
    expected = of_transformers(folder / "model", dyvte.LearnedExit(dyvte.ExitHeads.from_pretrained(folder / "heads")))
    assert len(set(expected["layers"])) > 2, "scenes should leave at different layers"
    made = of_vllm(tmp_path, folder / "model", "8", DYVTE_HEADS=str(folder / "heads"))["8"]
    assert made == expected


def test_heads_for_other_weights_are_refused(reference, tmp_path):
    tensors = load_file(reference / "model.safetensors")
    other = tmp_path / reference.name
    shutil.copytree(reference, other)
    tensors["language_model.lm_head.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="made for other weights"):
        of_vllm(tmp_path, other, "1", DYVTE_HEADS=str(HEADS))


@pytest.fixture
def plugin(monkeypatch):
    from dyvte.integrations.vllm import plugin

    monkeypatch.setenv("DYVTE_HEADS", str(HEADS))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    for owner, name in (
        (plugin.EngineArgs, "create_engine_config"),
        (plugin.WorkerWrapperBase, "initialize_from_config"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # as it was, after the test
    plugin.install()
    return plugin


def test_what_exits_need_is_chosen_where_nothing_was_said(plugin, reference):
    config = plugin.EngineArgs(str(reference), dtype="float32").create_engine_config()
    assert not config.cache_config.enable_prefix_caching and not config.scheduler_config.enable_chunked_prefill
    assert config.model_config.enforce_eager


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"enable_prefix_caching": True}, "prefix caching.*--no-enable-prefix-caching"),
        ({"enable_chunked_prefill": True}, "chunked prefill.*--no-enable-chunked-prefill"),
        ({"compilation_config": {"mode": 3}}, "CUDA graphs.*--enforce-eager"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
        ({"enable_lora": True}, "LoRA"),
    ],
)
def test_what_cannot_be_right_is_refused_at_start(plugin, reference, arguments, fault):
    with pytest.raises(ValueError, match=fault):
        plugin.EngineArgs(str(reference), dtype="float32", max_model_len=256, **arguments).create_engine_config()


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("DYVTE_RISK", "little", "DYVTE_RISK is a share"),
        ("DYVTE_RISK", "0.00001", "cannot show a risk"),
        ("DYVTE_HEADS", str(ROOT / "tests"), "no exit heads"),
    ],
)
def test_bad_settings_are_named(plugin, reference, monkeypatch, name, value, fault):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=fault):
        plugin.EngineArgs(str(reference)).create_engine_config()


def test_another_version_is_refused(plugin, monkeypatch):
    monkeypatch.setattr(plugin.vllm, "__version__", "0.99.0")
    with pytest.raises(ValueError, match="pip install 'vllm==0.32"):
        plugin.install()
