"""Adapters chosen per sample (peft's ``adapter_names``): every sample of a batch as it would be alone with its own."""

from __future__ import annotations

import peft
import pytest
import torch
from models import LAYERS, batch_of, prompt, tiny_llava

import dyvte

NAMES = ["first", "second", "__base__", "first"]
PROMPTS = [prompt(3, 5, seed=1), prompt(1, 9, seed=2), prompt(6, 4, seed=3), prompt(2, 5, seed=4)]
EXITS = [2, LAYERS, 2, 4]
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def adapted(model, targets=("q_proj", "v_proj", "down_proj")):
    torch.manual_seed(5)
    model = peft.get_peft_model(model, lora(targets), adapter_name="first").eval()
    model.add_adapter("second", lora(targets))
    return model


def lora(targets) -> peft.LoraConfig:
    decoder = rf".*(language_model.*\.({'|'.join(targets)})|lm_head)$" if "lm_head" in targets else None
    return peft.LoraConfig(
        r=4, target_modules=decoder or rf".*language_model.*\.({'|'.join(targets)})", init_lora_weights=False
    )


def alone(model, run):
    """``run(inputs, row)`` for every sample by itself, with its adapter switched on for the whole model."""
    results = []
    for row, (name, ids) in enumerate(zip(NAMES, PROMPTS)):
        inputs = batch_of(ids)
        inputs["pixel_values"] = together()["pixel_values"][row : row + 1]
        if name == "__base__":
            with model.disable_adapter():
                results.append(run(inputs, row))
        else:
            model.set_adapter(name)
            results.append(run(inputs, row))
    return results


def together(side: str = "left") -> dict:
    return batch_of(*PROMPTS, side=side)


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_generation(beams):
    model = adapted(tiny_llava())
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}

    def run(inputs, row):
        with dyvte.visual_exit(model, dyvte.FixedExit(EXITS[row])):
            return model.generate(**inputs, **settings)[0, -5:].tolist()

    each = torch.tensor(EXITS).repeat_interleave(beams)
    with dyvte.visual_exit(model, dyvte.FixedExit(each)) as handle:
        answers = model.generate(**together(), adapter_names=NAMES, **settings)[:, -5:]
    assert answers.tolist() == alone(model, run)
    assert handle.layers.tolist() == each.tolist()
    assert answers.tolist() != model.generate(**together(), **settings)[:, -5:].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_forward(side):
    model, inputs = adapted(tiny_llava()), together(side)

    def run(inputs, row):
        with dyvte.visual_exit(model, dyvte.FixedExit(EXITS[row])):
            return model(**inputs).logits[0, -1]

    with dyvte.visual_exit(model, dyvte.FixedExit(EXITS)):
        logits = model(**inputs, adapter_names=NAMES).logits
    column = torch.arange(logits.shape[1]) * inputs["attention_mask"]
    found = logits[torch.arange(len(NAMES)), column.argmax(1)]
    torch.testing.assert_close(found, torch.stack(alone(model, run)), atol=1e-5, rtol=1e-5)


def test_traces():
    model = adapted(tiny_llava())
    expected = alone(model, lambda inputs, row: dyvte.trace_batch(model, inputs))
    found = dyvte.trace_batch(model, together(), adapter_names=NAMES)
    for name, value in vars(found).items():
        one_by_one = torch.cat([getattr(trace, name) for trace in expected])
        torch.testing.assert_close(value, one_by_one, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found.state, dyvte.trace_batch(model, together()).state, atol=1e-2)


def test_traces_with_an_adapted_head_are_refused():
    model = adapted(tiny_llava(), targets=("q_proj", "lm_head"))
    with pytest.raises(ValueError, match="language-model head has adapters"):
        dyvte.trace_batch(model, together(), adapter_names=NAMES)
