"""Loaders of other code bases, on packages that stand in for them."""

from __future__ import annotations

import importlib

import pytest
import torch
from models import LAYERS, masked_visual_columns
from PIL import Image
from stand_ins import MEDIA, install, tokenizer
from test_sentinel_models import CONTEXT, SENTINEL, TOKENS

import dyvte
from dyvte.config import ModelConfig
from dyvte.data import GREEDY, Sample, encode

BASES = {
    "llava": "some/llava-v1.5-7b",
    "eagle": "NVEagle/Eagle-X5-7B",
    "vila": "some/VILA1.5-3b",
    "nvila": "some/NVILA-8B",
    "internvl_chat": "internvl",
}
MARK = {"nvila": MEDIA, "internvl_chat": CONTEXT}
RED, WIDE = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (16, 8), (0, 90, 255))
SAMPLES = [
    Sample("1", [RED], "what is this", ["red"], [], "all"),
    Sample("2", [WIDE], "is that red", ["no"], [], "all", [("what is this", "red")], "no"),
    Sample("3", [RED, WIDE], "is <image> this <image> that", ["no"], [], "all"),
]


@pytest.fixture(params=BASES)
def loaded(request, monkeypatch, tmp_path):
    return request.param, *load(request.param, monkeypatch, tmp_path)


def load(name, monkeypatch, folder, **settings):
    install(monkeypatch, name)
    model = BASES[name]
    if name == "internvl_chat":
        model = str(folder)
        tokenizer().save_pretrained(folder)
    module = importlib.import_module(f"dyvte.loaders.{name.removeprefix('n')}")
    return module.load(ModelConfig(model=model, device="cpu", loader=f"{module.__name__}:load", **settings))


def words(name, *parts):
    """Ids of a prompt by hand: images are marks, or as many of them as there are visual tokens."""
    ids = []
    for part in parts:
        if isinstance(part, int):  # an image of so many tiles
            ids += [61, *[CONTEXT] * TOKENS * part, 62] if name == "internvl_chat" else [MARK.get(name, SENTINEL)]
        else:
            ids += tokenizer()(part, add_special_tokens=False).input_ids
    return [1, *ids]


def test_prompts_and_images(loaded):
    """The code base's own prompts, padded on the left; the images of the batch in order."""
    name, _, processor, _, _ = loaded
    inputs = encode(processor, SAMPLES)
    system = [] if name == "nvila" else ["be brief"]
    expected = [
        words(name, *system, "USER:", 1, "what is this ASSISTANT:"),
        words(name, *(["SYSTEM: no"] if name == "nvila" else ["no"]), "USER:", 2,
              "what is this ASSISTANT: red USER: is that red ASSISTANT:"),
        words(name, *system, "USER: is", 1, "this", 2, "that ASSISTANT:"),
    ]  # fmt: skip
    length = max(map(len, expected))
    for row, ids in enumerate(expected):
        assert inputs["input_ids"][row].tolist() == [0] * (length - len(ids)) + ids
        assert inputs["attention_mask"][row].tolist() == [0] * (length - len(ids)) + [1] * len(ids)
    red, blue = [127 / 128, -1, -1, 1], [-1, 90 / 128 - 1, 127 / 128, 1]
    pixels = inputs["media"]["image"] if name == "nvila" else inputs.get("images", inputs.get("pixel_values"))
    seen = [red, blue, blue, red, blue, blue] if name == "internvl_chat" else [red, blue, red, blue]
    torch.testing.assert_close(torch.stack(list(pixels)), torch.tensor(seen))
    assert ("image_sizes" in inputs) == (name in ("llava", "eagle"))
    assert "question" in processor.chat_template


def visual_columns(name, rows):
    """Where the visual tokens stand in the decoder's sequence, written down from ids; what is no padding; which id."""
    spread = 1 if name == "internvl_chat" else TOKENS
    mark = MARK.get(name, SENTINEL)
    marks = [[m for one in row for m in ([True] * spread if one == mark else [False])] for row in rows]
    longest = max(map(len, marks))
    visual = torch.tensor([[False] * (longest - len(row)) + row for row in marks])
    valid = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in marks])
    return visual, valid


@torch.no_grad()
def test_exits_and_traces_equal_the_definition(loaded):
    name, model, processor, mask, decoder = loaded
    inputs = encode(processor, SAMPLES).to(model.device, model.dtype)
    given = dict(inputs)
    if name in ("llava", "eagle"):
        given["inputs"] = given.pop("input_ids")
    settings = GREEDY | {"max_new_tokens": 4}
    answers = model.generate(**given, **settings)
    with dyvte.visual_exit(model, dyvte.NeverExit(), mask, decoder):
        assert torch.equal(model.generate(**given, **settings), answers)
    rows = [ids[keep.bool()].tolist() for ids, keep in zip(inputs["input_ids"], inputs["attention_mask"])]
    exits = torch.tensor([2, 1, 4])
    with masked_visual_columns(model, visual_columns(name, rows)[0], exits):
        expected = model.generate(**given, **settings)
    with dyvte.visual_exit(model, dyvte.FixedExit(exits), mask, decoder) as handle:
        assert model.generate(**given, **settings).tolist() == expected.tolist()
    assert handle.layers.tolist() == exits.tolist() and answers.tolist() != expected.tolist()

    # The dense answers behind the prompts, as traces have them.
    traced = dict(inputs) | {
        "input_ids": torch.cat([inputs["input_ids"], answers], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(answers)], 1),
    }
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answers], 1)
    trace = dyvte.trace_batch(model, traced | {"labels": labels}, mask, decoder)
    visual, valid = visual_columns(name, [row + answer.tolist() for row, answer in zip(rows, answers)])
    asked = slice(-answers.shape[1] - 1, -1)
    dense = model(**traced, use_cache=False).logits[:, asked]
    assert torch.equal(dense.argmax(-1), answers) and trace.agreement.min() < 1
    for exit_layer in range(1, LAYERS):
        with masked_visual_columns(model, visual, torch.full((len(rows),), exit_layer)):
            logits = model(**traced, use_cache=False).logits[:, asked]
        agreement = (logits.argmax(-1) == answers).float().mean(1)
        nll = -logits.log_softmax(-1).gather(-1, answers[..., None]).mean((1, 2))
        torch.testing.assert_close(trace.agreement[:, exit_layer - 1], agreement)
        torch.testing.assert_close(trace.nll[:, exit_layer - 1], nll, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", BASES)
def test_a_package_that_is_missing(name):
    module = importlib.import_module(f"dyvte.loaders.{name.removeprefix('n')}")
    with pytest.raises(ValueError, match="is not installed: clone the repository"):
        module.load(ModelConfig(model=BASES[name], device="cpu", loader=f"{module.__name__}:load"))


def test_packages_of_one_name(monkeypatch):
    for installed, wanted, fault in (("vila", "llava", "is VILA's"), ("llava", "vila", "is LLaVA's")):
        install(monkeypatch, installed)
        module = importlib.import_module(f"dyvte.loaders.{wanted}")
        with pytest.raises(ValueError, match=fault):
            module.load(ModelConfig(model=BASES[wanted], device="cpu"))


@pytest.mark.parametrize("name, setting, fault", [
    ("llava", {"revision": "abc"}, "takes no revision"),
    ("vila", {"revision": "abc"}, "takes no revision"),
    ("vila", {"attention": "sdpa"}, "takes no attention"),
    ("internvl_chat", {"attention": "sdpa"}, "takes no attention"),
])  # fmt: skip
def test_settings_that_cannot_be_followed(name, setting, fault, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=fault):
        load(name, monkeypatch, tmp_path, **setting)


def test_settings_that_are_followed(monkeypatch, tmp_path):
    model, *_ = load("llava", monkeypatch, tmp_path, attention="sdpa", dtype="bfloat16")
    assert model.config._attn_implementation == "sdpa" and model.dtype == torch.bfloat16
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())


def test_a_conversation_that_is_not_known(monkeypatch, tmp_path):
    """By the name of a folder nothing is known; the data config may say it."""
    monkeypatch.setitem(BASES, "llava", "runs/mine")
    model, processor, _, _ = load("llava", monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="give one as `template` in the data config: llama_3, llava_v1"):
        encode(processor, SAMPLES[:1])
    with pytest.raises(ValueError, match="no conversation template 'other'"):
        encode(processor, SAMPLES[:1], template="other")
    assert encode(processor, SAMPLES[:1], template="llava_v1")["images"].shape == (1, 4)


def test_batches_that_do_not_go_together(loaded):
    name, model, processor, _, _ = loaded
    alone = Sample("4", [], "is that red", ["no"], [], "all")
    with pytest.raises(ValueError, match="with and without images"):
        encode(processor, [SAMPLES[0], alone])
    assert not encode(processor, [alone]).keys() & {"images", "media", "pixel_values"}
