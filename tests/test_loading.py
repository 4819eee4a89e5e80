"""Models as a config names them: adapters, quantised weights, other code bases; and what does not go together."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import peft
import pytest
import torch
from test_sentinel_models import SENTINEL, TOKENS, splice_model
from test_traces_on_disk import SETTINGS, mllm, samples  # noqa: F401 (a fixture)
from transformers import BatchFeature

import dyvte
from dyvte.config import ModelConfig, TraceSettings, TrainConfig
from dyvte.data import encode
from dyvte.identity import model_fingerprint
from dyvte.loading import load_mllm, sharing
from dyvte.ranks import Ranks
from dyvte.training.cost import plan
from dyvte.training.recipes import trace_data
from dyvte.training.shape import Shape
from dyvte.training.store import load_traces
from dyvte.training.write import write_traces

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
LLAVA_7B = Shape(32, 4096, 11008, 32064, tuple(range(1, 32)), 7_063_427_072, 14_126_854_144, 2, 8192)


def config(mllm, **more):  # noqa: F811
    return ModelConfig(model=str(mllm[2]), dtype="float32", **more)


def test_an_adapter_is_part_of_the_model(mllm, tmp_path):  # noqa: F811
    plain = load_mllm(config(mllm))
    torch.manual_seed(3)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(load_mllm(config(mllm)).model, lora)
    adapted.save_pretrained(tmp_path)
    loaded = load_mllm(config(mllm, adapter=str(tmp_path)))
    inputs = encode(plain.processor, samples()[:2])
    first, second, third = (model(**inputs).logits for model in (plain.model, adapted.eval(), loaded.model))
    assert torch.equal(second, third) and not torch.equal(first, third)
    folder = write_traces(loaded.model, loaded.processor, samples()[:4], tmp_path / "traces", **SETTINGS)
    assert load_traces(folder).provenance["weights"] != model_fingerprint(plain.model)
    assert not any(weight.requires_grad for weight in loaded.model.parameters()) and sharing(loaded.model) == "none"


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_quantised_weights(mllm, tmp_path):  # noqa: F811
    loaded = load_mllm(config(mllm, quantization={"load_in_8bit": True}))
    assert "Linear8bitLt" in {type(module).__name__ for module in loaded.model.modules()}
    folder = write_traces(loaded.model, loaded.processor, samples()[:4], tmp_path / "traces", **SETTINGS)
    traces = load_traces(folder)
    assert traces.state[:].isfinite().all() and traces.provenance["weights"] != model_fingerprint(mllm[0])


class SpliceProcessor:
    """As much of a processor as tracing asks for: text lengths become ids, an image one sentinel."""

    chat_template = "ids"
    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids.tolist())))

    def apply_chat_template(self, messages, **_):
        return "".join(part.get("text", "") for message in messages for part in message["content"])

    def __call__(self, images, text, **_):
        rows = [[5, SENTINEL, *range(6, 6 + len(words.split()))] for words in text]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        pixels = torch.tensor([[float(image.getpixel((0, i))[0]) / 255 for i in range(4)] for (image,) in images])
        return BatchFeature({"input_ids": ids, "attention_mask": (ids != 0).long(), "images": pixels})


def splice_loader(asked):
    model = splice_model("eager", "left")
    return model, SpliceProcessor(), dyvte.SplicedVisualMask(model), None


def test_a_model_of_another_code_base(tmp_path):
    """Its traces are those of ``trace_batch`` with the answers that its own ``generate`` gives."""
    loaded = load_mllm(ModelConfig(model="mine", loader="test_loading:splice_loader"))
    write = {"answers": "dense", "batch_size": 2, "max_new_tokens": 2}
    folder = write_traces(
        loaded.model,
        loaded.processor,
        samples()[:4],
        tmp_path,
        visual_mask=loaded.visual_mask,
        decoder=loaded.decoder,
        **write,
    )
    traces = load_traces(folder)
    for index, sample in enumerate(samples()[:4]):
        inputs = encode(loaded.processor, [sample])
        given = dict(inputs)
        ids = loaded.model.generate(given.pop("input_ids"), **given, max_new_tokens=2, do_sample=False)
        assert traces.rows[index]["traced_answer"] == loaded.processor.tokenizer.decode(ids[0])
        prompt = inputs["input_ids"]
        labelled = {
            "input_ids": torch.cat([prompt, ids], 1),
            "attention_mask": torch.ones(1, prompt.shape[1] + ids.shape[1], dtype=torch.long),
            "labels": torch.cat([torch.full_like(prompt, -100), ids], 1),
            "images": inputs["images"],
        }
        trace = dyvte.trace_batch(loaded.model, labelled, loaded.visual_mask)
        torch.testing.assert_close(traces.state[index].float(), trace.state[0], atol=5e-3, rtol=5e-3)
        assert torch.equal(traces.agreement[index], trace.agreement[0])
        assert traces.rows[index]["visual_tokens"] == TOKENS
        assert traces.rows[index]["text_tokens"] == prompt.shape[1] - 1


@pytest.mark.parametrize(
    ("more", "ranks", "match"),
    [
        ({"shard": "device_map"}, Ranks(0, 2), "gives all GPUs to one process"),
        ({"shard": "tp", "loader": "a:b"}, Ranks(), "not with a loader"),
        ({"shard": "fsdp2", "quantization": {"load_in_8bit": True}}, Ranks(), "does not go together with shard=fsdp2"),
        ({"quantization": {"bits": 4}}, Ranks(), "unknown quantization settings bits: .*load_in_4bit"),
        ({"loader": "no_such_package:load"}, Ranks(), "there is no loader no_such_package:load.*PYTHONPATH"),
        ({"loader": "test_loading.load"}, Ranks(), "package.module:function"),
        ({"loader": "test_loading:config"}, Ranks(), "must return"),
        ({"model": "/nowhere/model"}, Ranks(), "model=/nowhere/model cannot be loaded.*give a folder"),
    ],
)
def test_what_does_not_go_together_is_refused(mllm, more, ranks, match, monkeypatch):  # noqa: F811
    monkeypatch.setattr("test_loading.config", lambda *_: None) if more.get("loader", "").endswith("config") else None
    with pytest.raises(ValueError, match=match):
        load_mllm(ModelConfig(**{"model": str(mllm[2]), "dtype": "float32"} | more), ranks)


def test_costs_at_the_shape_of_llava_7b():
    assert LLAVA_7B.sample_bytes == 532_740
    assert LLAVA_7B.forwards(45, 45 + 576) == pytest.approx(1 + 31 / 2 * 45 / 621)
    few = Shape(**vars(LLAVA_7B) | {"exits": (4, 8, 12, 16, 20, 24, 28, 31)})
    assert few.forwards(600, 1176) == pytest.approx(1 + (7 * 16 + 1) / 32 * 600 / 1176)
    assert LLAVA_7B.pass_bytes(16, 173, 749, 128, True) > 8.2e9 > LLAVA_7B.pass_bytes(16, 173, 749, 128, False)
    lengths = 16, 77, 653, 32
    (dense, given) = (LLAVA_7B.device_bytes(*lengths, "none", 1, greedy) for greedy in (True, False))
    assert given - LLAVA_7B.weight_bytes == LLAVA_7B.pass_bytes(*lengths, False)
    assert dense - LLAVA_7B.weight_bytes > 16 * 653 * 32 * 2 * 4096 * 2 > given - LLAVA_7B.weight_bytes  # the cache


def test_a_plan_reads_no_weights(mllm, tmp_path, monkeypatch):  # noqa: F811
    def load(*_, **__):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load)
    scenes = {"scenes": {"split": "train", "n": 50, "seed": 1}}
    told = plan(TrainConfig(model=str(mllm[2]), data=scenes, held_out=scenes, output=str(tmp_path), batch_size=4))
    parameters, layers, size = sum(w.numel() for w in mllm[0].parameters()), 4, 16
    bytes_each = 2 * layers * 2 * size + 2 * size + 8 * layers + 4
    assert f"{parameters / 1e9:.3g} B parameters, {layers} layers of width {size}" in told
    assert told.count("50 samples in 2 units, batches of 4") == 2 and f"disk     {bytes_each} B a sample" in told
    assert "42 traces to learn from, 8 that train nothing" in told and "36 visual tokens" in told


def test_a_plan_tells_of_other_code_bases_what_their_files_do(mllm, tmp_path):  # noqa: F811
    scenes = {"scenes": {"split": "train", "n": 50, "seed": 1}}
    keys = {"data": scenes, "output": "out", "loader": "some.package:load", "alpha": None, "exits": 2}
    told = plan(TrainConfig(model=str(mllm[2]), **keys))
    weights = (mllm[2] / "model.safetensors").stat().st_size
    assert f"4 layers of width 16, {weights / 1000:.3g} kB of weights, a copy on each of 1 ranks" in told
    assert "1 + 1 w/n dense forwards" in told and "50 samples in 2 units" in told and "to learn from" in told
    for key, decoder in (("llm_cfg", "llm/config.json"), ("llm_config", "config.json")):  # VILA's, InternVL's
        (tmp_path / key / "llm").mkdir(parents=True)
        (tmp_path / key / "config.json").write_text(json.dumps({"model_type": "other", key: None}))
        text = json.loads((mllm[2] / "config.json").read_text())["text_config"]
        (tmp_path / key / decoder).write_text(json.dumps(text if "llm/" in decoder else {key: text}))
        assert "4 layers of width 16, a copy" in plan(TrainConfig(model=str(tmp_path / key), **keys))
    unknown = plan(TrainConfig(model=str(tmp_path), **keys))
    assert "config.json" in unknown and "50 samples in 2 units" in unknown


def test_tracking(mllm, tmp_path):  # noqa: F811
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from dyvte.tracking import Tracker

    scenes = {"scenes": {"split": "train", "n": 70, "seed": 1}}
    with Tracker("tensorboard", tmp_path, {"alpha": 0.1, "data": scenes}, Ranks()) as tracker:
        settings = TraceSettings(max_new_tokens=2, batch_size=16)
        trace_data(load_mllm(config(mllm)), scenes, tmp_path / "traces", settings, Ranks(), tracker)
        tracker.log({"fit/validation_log_loss": 0.5})
    logged = EventAccumulator(str(tmp_path / "tracking"))
    logged.Reload()
    assert logged.Scalars("trace traces/done")[-1].value == 70
    assert logged.Scalars("trace traces/per second")[-1].value > 0
    assert [event.value for event in logged.Scalars("fit/validation_log_loss")] == [0.5]
    for kind in ("trackio", "wandb"):
        if importlib.util.find_spec(kind) is None:
            with pytest.raises(ValueError, match=f"pip install {kind}"):
                Tracker(kind, tmp_path, {}, Ranks())
