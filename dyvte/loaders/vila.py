"""VILA-1.5 and NVILA, of https://github.com/NVlabs/VILA: ``loader: dyvte.loaders.vila:load``.

VILA-1.5 is the branch vila1.5 of the repository; its models splice images into the text as LLaVA's do. NVILA is the
main branch: media go in by name, and the tokenizer may bring the chat template.
"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from dyvte.config import ModelConfig
from dyvte.loaders.llava import pad_left, sentinel_processor
from dyvte.loaders.packages import device_of, finish, import_package, refuse, take_new_arguments
from dyvte.loaders.processor import ConversationProcessor, left_padded
from dyvte.runtime.splice import SplicedVisualMask

REPOSITORY = "https://github.com/NVlabs/VILA"
TEMPLATES = (
    ("1.5-3b", "vicuna_v1"),
    ("1.5-8b", "llama_3"),
    ("1.5-13b", "vicuna_v1"),
    ("1.5-40b", "hermes-2"),
    ("nvila", "auto"),
)
DECODER = "llm.model"


def load(config: ModelConfig) -> tuple[nn.Module, ConversationProcessor, SplicedVisualMask, str]:
    """A VILA with its own builder, prompts and images.

    Raises:
        ValueError: the package is not installed, is LLaVA's of the same name, or cannot do what the config asks for.
    """
    refuse(config, "revision", remedy="its builder has no such setting; download the model, and name the folder")
    refuse(config, "attention", remedy="its builder chooses the attention by itself; leave it out")
    build = import_package("llava.model.builder", REPOSITORY).load_pretrained_model
    if "model_name" != list(inspect.signature(build).parameters)[1]:
        raise ValueError(f"the package llava that is installed is LLaVA's, of the same name, not that of {REPOSITORY}")
    tools, conversation = (import_package(f"llava.{name}", REPOSITORY) for name in ("mm_utils", "conversation"))
    name, device = tools.get_model_name_from_path(config.model), device_of(config)
    tokenizer, model, image_processor, _ = build(config.model, name, None, device_map=device, device=device)
    finish(model, config)
    take_new_arguments(model)
    model.generation_config = model.llm.generation_config
    for one in (model.config, model.llm.config):
        pad_left(one)
    template = next((template for part, template in TEMPLATES if part in name.lower()), None)
    if not hasattr(model, "_embed"):
        processor = sentinel_processor(
            tokenizer, image_processor, model.config, tools, conversation, template, sizes=False
        )
        return model, processor, SplicedVisualMask(model), DECODER
    tokenizer.padding_side = "left"
    model._embed = _prepared(model, model._embed)
    processor = _media_processor(tokenizer, image_processor, model.config, tools, conversation, template)
    return model, processor, SplicedVisualMask(model, "_embed", mask_at=2, labels_at=1), DECODER


def _prepared(model: nn.Module, embed: Any) -> Any:
    """NVILA's ``_embed`` for batches padded on the left.

    It takes padding out of embeddings and labels, but then reads ids from the first column on; so rows are given to it
    with their padding last. Media come to where the model is.
    """

    @functools.wraps(embed)
    def prepared(
        input_ids: torch.Tensor,
        media: dict[str, list[torch.Tensor]] | None,
        media_config: dict[str, Any] | None,
        labels: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        *more: Any,
        **others: Any,
    ) -> Any:
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
            order = attention_mask.long().argsort(dim=1, descending=True, stable=True)
            input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
            labels = None if labels is None else labels.gather(1, order)
        weight = model.llm.get_input_embeddings().weight
        media = {name: [one.to(weight.device, weight.dtype) for one in some] for name, some in (media or {}).items()}
        config = defaultdict(dict) if media_config is None else media_config
        return embed(input_ids, media, config, labels, attention_mask, *more, **others)

    return prepared


def _media_processor(
    tokenizer: Any, image_processor: Any, config: Any, tools: Any, conversation: Any, template: str | None
) -> ConversationProcessor:
    config.image_processor = image_processor
    tiled = getattr(config, "image_aspect_ratio", None)
    if tiled == "dynamic_s2" and isinstance(config.s2_scales, str):
        config.s2_scales = [int(scale) for scale in config.s2_scales.split(",")]

    def inputs(texts: list[str], images: list[Any]) -> dict[str, Any]:
        """As the model's own ``generate_content`` has it: an image that is alone in its prompt is cut into tiles."""
        waiting, rows, pixels, blocks = iter(images), [], [], []
        for text in texts:
            own = [next(waiting) for _ in range(text.count("<image>"))]
            if len(own) == 1 and tiled == "dynamic":
                found = tools.process_image(own[0], config, None, enable_dynamic_res=True)
                text = text.replace("<image>", "<image>\n" * len(found))
                pixels += list(found)
            elif len(own) == 1 and tiled == "dynamic_s2":
                found, size = tools.process_image(own[0], config, None, enable_dynamic_s2=True)
                pixels += list(found)
                blocks.append(size)
            elif own:
                pixels += list(tools.process_images(own, image_processor, config))
                blocks += [None] * len(own)
            rows.append(tools.tokenizer_image_token(text, tokenizer))
        batch: dict[str, Any] = left_padded(rows, tokenizer.pad_token_id)
        if pixels:
            batch["media"] = {"image": pixels}
        if tiled == "dynamic_s2" and any(blocks):
            batch["media_config"] = defaultdict(dict, image={"block_sizes": blocks})
        return batch

    def fresh(name: str) -> Any:
        return _ByTokenizer(tokenizer) if name == "auto" else conversation.conv_templates[name].copy()

    names = {*conversation.conv_templates, "auto"}
    return ConversationProcessor(tokenizer, image_processor, fresh, list(names), template, inputs)


class _ByTokenizer:
    """A conversation that the tokenizer's own chat template writes."""

    roles = ("user", "assistant")

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.system, self.messages = tokenizer, "", []

    def append_message(self, role: str, message: str | None) -> None:
        self.messages += [] if message is None else [{"role": role, "content": message.strip()}]

    def get_prompt(self) -> str:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.tokenizer.apply_chat_template([*system, *self.messages], tokenize=False, add_generation_prompt=True)
