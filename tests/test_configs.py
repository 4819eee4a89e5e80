"""Configs of well-known models: what they name is there, and each of them trains heads for a shrunken model."""

from __future__ import annotations

import dataclasses
import random
import zlib
from pathlib import Path

import families
import pytest
import torch
import transformers
from data_files import llava, said
from families import FAMILIES, Family
from stand_ins import install, tokenizer
from transformers import BatchFeature
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

import dyvte
from dyvte.cli.arguments import parse_arguments
from dyvte.config import TrainConfig
from dyvte.data import read_config
from dyvte.data.config import check_config
from dyvte.loading import Mllm, load_mllm
from dyvte.ranks import Ranks
from dyvte.training import recipes

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs/models").glob("*.yaml")) + [ROOT / "configs/paper/dyvte-13b.yaml"]
# What the models on the hub say of themselves.
MODEL_TYPES = {
    "llava-hf/llava-1.5-7b-hf": "llava",
    "llava-hf/llava-1.5-13b-hf": "llava",
    "llava-hf/llava-v1.6-vicuna-7b-hf": "llava_next",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": "llava_onevision",
    "OpenGVLab/InternVL3-8B-hf": "internvl",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl",
    "Qwen/Qwen3.5-27B": "qwen3_5",
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": "smolvlm",
    "google/gemma-3-12b-it": "gemma3",
}
LOADERS = {
    "Efficient-Large-Model/VILA1.5-13b": "vila",
    "NVEagle/Eagle-X5-7B": "eagle",
    "OpenGVLab/InternVL3-8B": "internvl_chat",
}
SHRUNKEN = FAMILIES | {
    "qwen3_5": Family(
        "qwen3_5", families.qwen3_5, "Qwen3_5ForConditionalGeneration", families.grid, extra=families.token_types
    )
}


def read(file: Path) -> TrainConfig:
    return parse_arguments(TrainConfig, [str(file)], prog="train")


class TinyProcessor:
    """Prompts of a family of tiny models: as many text tokens as there are words, drawn by what is said."""

    chat_template = "words"

    def __init__(self, family: Family):
        self.family, self.tokenizer = family, tokenizer()

    def apply_chat_template(self, messages, **_):
        parts = [part for message in messages for part in message["content"]]
        return " ".join("<image>" if part["type"] == "image" else part["text"] for part in parts)

    def __call__(self, images, text, **_):
        prompts = []
        for prompt in text:
            first, *rest = prompt.split("<image>")
            prompts.append([len(first.split()), *(piece for words in rest for piece in ("image", len(words.split())))])
        return BatchFeature(self.family.batch(*prompts, seed=zlib.crc32("".join(text).encode())))


def test_all_of_them_are_known():
    named = {read(file).model for file in FILES}
    assert named == MODEL_TYPES.keys() | LOADERS.keys()
    for file in FILES:
        config = read(file)
        assert file.stem in config.output or file.parent.name == "paper"
        assert config.loader == (f"dyvte.loaders.{LOADERS[config.model]}:load" if config.model in LOADERS else None)
        for data in filter(None, (config.data, config.held_out)):
            check_config(read_config(ROOT / data))
    for model_type in MODEL_TYPES.values():
        if model_type in CLASSES:  # not in every version
            assert CLASSES[model_type] == SHRUNKEN[model_type].model and hasattr(transformers, CLASSES[model_type])


def test_the_published_recipe():
    """The figures of DyVTE's training script."""
    config = read(ROOT / "configs/paper/dyvte-13b.yaml")
    data = read_config(ROOT / config.data)
    assert (data["turns"], data["fraction"]) == ("single", 0.01) and "13b" in config.model
    fit = config.fit
    assert (fit.epochs, fit.batch_size, fit.lr, fit.weight_decay) == (1, 16 * 8, 6e-5, 0)
    assert (fit.form, fit.width, fit.label_rule) == ("original", 2048, "original")
    assert config.alpha is None and config.answers == "dataset"


@pytest.fixture
def mixture(tmp_path, monkeypatch):
    """LLaVA's mixture in miniature, where the configs look for it: one question about each picture."""
    draw = random.Random(0)
    words = "what is this that red no be brief".split()
    rows = [
        {
            "id": str(i),
            "image": f"coco/train2017/{i}.jpg",
            "conversations": said("<image>\n" + " ".join(draw.choices(words, k=2 + i % 5)), draw.choice(words)),
        }
        for i in range(60)
    ]
    rows.append({"id": "text", "conversations": said("what is this", "no")})
    made = llava(tmp_path / "data/llava", rows)
    Path(made["path"]).rename(tmp_path / "data/llava/llava_v1_5_mix665k.json")
    (tmp_path / "data/llava/images/coco").rename(tmp_path / "data/llava/coco")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_heads_of_a_shrunken_model(file, mixture, monkeypatch):
    """Everything as the config says, but for the sizes: the model, the data, the training, and what is promised."""
    config = read(file)
    monkeypatch.setattr(recipes, "load_mllm", lambda *_: tiny(config, mixture, monkeypatch))
    data = read_config(ROOT / config.data)
    held_out = None if config.held_out is None else read_config(ROOT / config.held_out) | {"skip": 40, "limit": 20}
    size = {"fraction": 40 / 60} if "fraction" in data else {"limit": 40}
    smaller = dataclasses.replace(
        config,
        data=data | size,
        held_out=held_out,
        output=str(mixture / "heads"),
        work=str(mixture / "work"),
        max_new_tokens=3,
        fit=dataclasses.replace(config.fit, width=8, epochs=2, batch_size=16, validation=0.15),
        **({} if config.alpha is None else {"alpha": 0.3, "delta": 0.3}),
    )
    recipes.train(smaller, Ranks())
    heads = dyvte.ExitHeads.from_pretrained(mixture / "heads")
    settings = heads.config
    assert (settings.form, settings.label_rule) == (config.fit.form, config.fit.label_rule)
    assert settings.training["traces"] + settings.training["validation_traces"] == 40
    layers = settings.num_layers
    stride = config.exits or 1
    first = settings.min_layer
    traced = sorted({*range(first, layers, stride), layers - 1})
    assert (settings.exits or list(range(first, layers))) == traced
    if config.alpha is None:
        assert settings.threshold == 0.5
    else:
        assert 0 < settings.threshold <= 1 and settings.calibration["samples"] == 20


def tiny(config: TrainConfig, folder: Path, monkeypatch) -> Mllm:
    """The shrunken model of a config: of its family, or by its loader from a package that stands in."""
    torch.manual_seed(0)
    if config.loader is None:
        family = SHRUNKEN[MODEL_TYPES[config.model]]
        return Mllm(family.build("eager"), TinyProcessor(family))
    install(monkeypatch, LOADERS[config.model])
    model = config.model
    if LOADERS[model] == "internvl_chat":
        model = str(folder / "internvl")
        tokenizer().save_pretrained(model)
    return load_mllm(dataclasses.replace(config, model=model, device="cpu", dtype="auto"))


def test_the_page_of_costs_is_that_of_its_formulas(monkeypatch):
    """And these are what scale demands: figures worked out by hand."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import costs_page

    assert costs_page.PAGE.read_text() == costs_page.page()
    small, medium = costs_page.SMALL, costs_page.MEDIUM
    assert (small.shape.sample_bytes, medium.shape.sample_bytes) == (532_740, 829_764)
    assert small.forwards == pytest.approx(1 + 31 / 2 * 77 / 653)
    assert 6.7e9 < small.shape.parameters < 7.1e9 and 12.9e9 < medium.shape.parameters < 13.4e9
    units = -(-15_000 // 32)
    assert costs_page.wall(small, 15_000, 64, "dense") == costs_page.span(-(-units // 64) * 32 * small.seconds("dense"))
