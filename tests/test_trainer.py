"""Models with exits in the hands of accelerate and of transformers' trainers, and pipelines that batch."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from models import LAYERS, batch_of, tiny_llava
from test_learned_exit import PROMPTS, heads_for
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import dyvte

# What a LLaVA returns beside logits, which the trainer cannot gather, with or without exits.
BESIDE_LOGITS = ["past_key_values", "cache", "image_hidden_states", "image_outputs"]


class Prompts(torch.utils.data.Dataset):
    """The prompts as rows, with or without labels."""

    def __init__(self, labels: bool = False):
        self.inputs = batch_of(*PROMPTS)
        if labels:
            self.inputs["labels"] = self.inputs["input_ids"].clone()

    def __len__(self) -> int:
        return len(PROMPTS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[index] for name, values in self.inputs.items()}


@pytest.fixture
def model():
    return tiny_llava().eval()


@pytest.fixture
def policy(model):
    return dyvte.LearnedExit(heads_for(model, batch_of(*PROMPTS), "shared"))


def settings(kind, tmp_path, **more):
    return kind(str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True, **more)


def exits_of(handle) -> list[int]:
    return [layer for prompts in handle.record for layer in prompts.layers.tolist()]


def expected(model, policy):
    """Last logits, four greedy tokens and exit layers, with nothing around the model."""
    inputs = batch_of(*PROMPTS)
    with torch.no_grad(), dyvte.visual_exit(model, policy) as exits:
        logits = model(**inputs).logits[:, -1]
        answers = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    layers = exits.layers.tolist()
    assert len(set(layers)) > 2 and max(layers) <= LAYERS
    return logits, answers, layers


@pytest.fixture
def accelerator(request):
    """Its state is the process's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision=request.param)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("first", ["attached", "prepared"])
@pytest.mark.parametrize("accelerator", ["no", "bf16"], indirect=True)
def test_a_prepared_model(first, accelerator, model, policy):
    _, answers, layers = expected(model, policy)
    prepared = accelerator.prepare(model) if first == "prepared" else model
    handle = dyvte.attach(prepared, policy)
    if first == "attached":
        prepared = accelerator.prepare(model)
    with torch.no_grad():
        logits = prepared(**batch_of(*PROMPTS)).logits
        assert logits.dtype == torch.float32
        output = prepared.generate(**batch_of(*PROMPTS), max_new_tokens=4, do_sample=False)
    assert exits_of(handle)[: len(PROMPTS)] == exits_of(handle)[len(PROMPTS) :]
    if accelerator.mixed_precision == "no":
        assert handle.layers.tolist() == layers and output.tolist() == answers.tolist()
    handle.detach()
    assert prepared(**batch_of(*PROMPTS)).logits.shape[1] == batch_of(*PROMPTS)["input_ids"].shape[1]


def test_trainer_predicts_logits(model, policy, tmp_path):
    logits, _, layers = expected(model, policy)
    trainer = Trainer(model, settings(TrainingArguments, tmp_path))
    with dyvte.visual_exit(model, policy) as exits:
        predicted = trainer.predict(Prompts(), ignore_keys=BESIDE_LOGITS)
        assert exits_of(exits) == layers
        torch.testing.assert_close(torch.tensor(predicted.predictions)[:, -1], logits)
        assert "eval_runtime" in trainer.evaluate(Prompts())
        with pytest.raises(ValueError, match="labels do not work with visual exit"):
            trainer.evaluate(Prompts(labels=True))


def test_seq2seq_trainer_predicts_answers(model, policy, tmp_path):
    _, answers, layers = expected(model, policy)
    trainer = Seq2SeqTrainer(model, settings(Seq2SeqTrainingArguments, tmp_path, predict_with_generate=True))
    with dyvte.visual_exit(model, policy) as exits:
        predicted = trainer.predict(Prompts(), max_new_tokens=4, do_sample=False)
        assert exits_of(exits) == layers
        assert predicted.predictions[:, : answers.shape[1]].tolist() == answers.tolist()
        with pytest.raises(ValueError, match="labels do not work with visual exit"):
            trainer.predict(Prompts(labels=True), max_new_tokens=4)
