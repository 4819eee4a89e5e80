"""Tiny random models, prompts for them, and the definition of an exit that everything is checked against."""

from __future__ import annotations

import inspect
from contextlib import contextmanager

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from dyvte.runtime.compat import call_cache
from dyvte.runtime.locate import find_decoder

IMAGE_ID = 90
PATCHES = 16
LAYERS = 6
# What this version of transformers calls the argument that holds the cache.
CACHE = next(name for name in ("cache", "past_key_values") if name in inspect.signature(LlamaModel.forward).parameters)


@torch.no_grad()
def draw_weights(model, seed: int = 0, spread: float = 0.2):
    """Weights of a tiny model that do not depend on how a version of transformers draws them; in eval mode.

    Far from uniform attention, so that a wrong mask shows. What starts out constant (norms, biases) stays.
    """
    for number, weight in enumerate(model.parameters()):
        if weight.unique().numel() > 1:
            weight.normal_(0, spread, generator=torch.Generator().manual_seed(1000 * seed + number))
    return model.eval()


def llama_config(**changes) -> LlamaConfig:
    sizes = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**sizes | changes)


def tiny_llava(attention: str = "sdpa", seed: int = 0) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=llama_config(), image_token_index=IMAGE_ID, image_seq_length=PATCHES
    )
    config._attn_implementation = attention
    model = draw_weights(LlavaForConditionalGeneration(config), seed)
    # Answers of full length, without placeholders that no image belongs to.
    model.generation_config.eos_token_id = IMAGE_ID
    model.generation_config.suppress_tokens = [IMAGE_ID]
    model.generation_config.pad_token_id = 0
    return model


def tiny_llama(attention: str = "sdpa", seed: int = 0) -> LlamaForCausalLM:
    config = llama_config()
    config._attn_implementation = attention
    return draw_weights(LlamaForCausalLM(config), seed)


def prompt(before: int, after: int, images: int = 1, seed: int = 0) -> list[int]:
    """Text, images (a text token between two of them), text."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 80, (before + after + images,), generator=generator).tolist()
    ids = text[:before]
    for image in range(images):
        ids += [IMAGE_ID] * PATCHES
        if image < images - 1:
            ids.append(text[before + after + image])
    return ids + text[before : before + after]


def batch_of(*prompts: list[int], side: str = "left", seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of a LLaVA: padded ids, their mask, and the pixels of every image."""
    length = max(map(len, prompts))
    pads = [[0] * (length - len(ids)) for ids in prompts]
    ids = [pad + p if side == "left" else p + pad for p, pad in zip(prompts, pads)]
    ones = [[1] * len(p) for p in prompts]
    mask = [pad + one if side == "left" else one + pad for one, pad in zip(ones, pads)]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    images = int((inputs["input_ids"] == IMAGE_ID).sum()) // PATCHES
    if images:
        generator = torch.Generator().manual_seed(seed)
        inputs["pixel_values"] = torch.randn(images, 3, 16, 16, generator=generator)
    return inputs


@contextmanager
def masked_visual_columns(model, visual: torch.Tensor, exits: torch.Tensor):
    """The definition of an exit: from layer e on, no non-visual query sees a visual key. Nothing is dropped.

    Works on any eager model and in every way it may be run: prompts, whole sequences (``use_cache=False``), further
    tokens on a cache (sliding layers hold only the last columns of it), beams (rows of one sample stand together). In
    a later turn nothing, new images included, sees what has left before.

    Args:
        visual: bool [samples, sequence], of the whole conversation.
        exits: long [samples], or [samples, sequence]: the exit layer of the image that a visual column belongs to.
    """
    exits = exits[:, None].expand_as(visual) if exits.ndim == 1 else exits

    def hook(index):
        def before(module, args, kwargs):
            mask, cache = kwargs["attention_mask"], call_cache(kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            assert mask is not None and mask.ndim == 4, "the definition needs an eager model"
            batch, new = hidden.shape[:2]
            past = cache.get_seq_length(index) if cache is not None else 0
            total, rows = past + new, batch // len(visual)
            see = torch.zeros(len(visual), max(total, visual.shape[1]), dtype=torch.bool)
            see[:, : visual.shape[1]] = visual
            gone = torch.zeros_like(see)
            gone[:, : visual.shape[1]] = visual & (exits <= index)
            query = ~see[:, past:total].repeat_interleave(rows, 0)
            key = gone[:, total - mask.shape[-1] : total].repeat_interleave(rows, 0)
            before = torch.arange(total - mask.shape[-1], total) < past
            blocked = ((query[:, :, None] | before) & key[:, None, :])[:, None]
            mask = mask.expand(batch, -1, -1, -1).masked_fill(blocked, torch.finfo(mask.dtype).min)
            return args, kwargs | {"attention_mask": mask}

        return before

    hooks = [
        layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(find_decoder(model).layers)
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def masked_columns(model, gone_from: torch.Tensor):
    """The definition of any schedule: nothing sees column c in layers from ``gone_from[:, c]`` on, but itself.

    Like :func:`masked_visual_columns`, it works on any eager model and in every way it may be run.

    Args:
        gone_from: long [samples, sequence], of the whole conversation.
    """

    def hook(index):
        def before(module, args, kwargs):
            mask = kwargs["attention_mask"]
            cache = call_cache(kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            assert mask is not None and mask.ndim == 4, "the definition needs an eager model"
            batch, new = hidden.shape[:2]
            past = cache.get_seq_length(index) if cache is not None else 0
            total, rows = past + new, batch // len(gone_from)
            gone = torch.zeros(len(gone_from), max(total, gone_from.shape[1]), dtype=torch.bool)
            gone[:, : gone_from.shape[1]] = gone_from <= index
            keys = torch.arange(total - mask.shape[-1], total)
            itself = torch.arange(past, total)[:, None] == keys
            blocked = gone[:, keys].repeat_interleave(rows, 0)[:, None, None, :] & ~itself
            mask = mask.expand(batch, -1, -1, -1).masked_fill(blocked, torch.finfo(mask.dtype).min)
            return args, kwargs | {"attention_mask": mask}

        return before

    layers = find_decoder(model).layers
    hooks = [layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def without_image(logits: torch.Tensor) -> torch.Tensor:
    """As ``generate`` chooses from: the image's placeholder is never next."""
    return logits.index_fill(-1, torch.tensor([IMAGE_ID]), float("-inf"))


@torch.no_grad()
def greedy_by_definition(model, inputs: dict, visual: torch.Tensor, exits: torch.Tensor, steps: int):
    """Greedy tokens and their logits under the definition, without a cache: ids [batch, steps], logits per step."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    chosen, logits = [], []
    with masked_visual_columns(model, visual, exits):
        for _ in range(steps):
            position = (mask.cumsum(1) - 1).clamp(min=0)
            out = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False, **rest).logits
            logits.append(out[:, -1])
            chosen.append(without_image(out[:, -1]).argmax(-1))
            ids = torch.cat([ids, chosen[-1][:, None]], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.stack(chosen, 1), logits
