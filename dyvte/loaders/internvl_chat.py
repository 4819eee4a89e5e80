"""InternVL-Chat, of https://github.com/OpenGVLab/InternVL: ``loader: dyvte.loaders.internvl_chat:load``.

The package is ``internvl``, in the folder internvl_chat of the repository.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from dyvte.config import ModelConfig
from dyvte.loaders.packages import device_of, finish, import_package, refuse, take_new_arguments
from dyvte.loaders.processor import ConversationProcessor, left_padded
from dyvte.runtime.calls import VisualMask

REPOSITORY = "https://github.com/OpenGVLab/InternVL"
START, CONTEXT, END = "<img>", "<IMG_CONTEXT>", "</img>"
DECODER = "language_model.model"


def load(config: ModelConfig) -> tuple[nn.Module, ConversationProcessor, VisualMask, str]:
    """An InternVL-Chat with its own classes, prompts and tiles.

    Raises:
        ValueError: the package is not installed, or cannot do what the config asks for.
    """
    refuse(config, "attention", remedy="the model chooses the attention by itself; leave it out")
    chat = import_package("internvl.model.internvl_chat", REPOSITORY)
    images = import_package("internvl.train.dataset", REPOSITORY)
    templates = import_package("internvl.conversation", REPOSITORY)
    from transformers import AutoTokenizer

    source: dict[str, Any] = {} if config.revision is None else {"revision": config.revision}
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    tokenizer = AutoTokenizer.from_pretrained(
        config.model, trust_remote_code=config.trust_remote_code, use_fast=False, **source
    )
    model = chat.InternVLChatModel.from_pretrained(config.model, dtype=dtype, **source).to(device_of(config))
    finish(model, config)
    model.img_context_token_id = tokenizer.convert_tokens_to_ids(CONTEXT)
    take_new_arguments(model)
    _count_all_tiles(model)
    processor = _processor(tokenizer, model, images, templates)
    end = tokenizer.convert_tokens_to_ids(processor.template(model.template).sep.strip())
    model.language_model.generation_config.eos_token_id = end
    model.generation_config = model.language_model.generation_config
    return model, processor, lambda call: call["input_ids"] == model.img_context_token_id, DECODER


def _count_all_tiles(model: nn.Module) -> None:
    """``forward`` wants to be told which of the tiles belong to an image, which in training not all do."""
    forward = model.forward

    @functools.wraps(forward)
    def counted(pixel_values: torch.Tensor, *args: Any, image_flags: torch.Tensor | None = None, **given: Any) -> Any:
        if image_flags is None:
            image_flags = torch.ones(len(pixel_values), 1, dtype=torch.long, device=pixel_values.device)
        return forward(pixel_values, *args, image_flags=image_flags, return_dict=True, **given)

    model.forward = counted


def _processor(tokenizer: Any, model: nn.Module, images: Any, templates: Any) -> ConversationProcessor:
    config = model.config
    size = config.force_image_size or config.vision_config.image_size
    transform = images.build_transform(is_train=False, input_size=size)

    def tiles(image: Any) -> torch.Tensor:
        if not config.dynamic_image_size:
            return transform(image)[None]
        parts = images.dynamic_preprocess(
            image,
            min_num=config.min_dynamic_patch,
            max_num=config.max_dynamic_patch,
            image_size=size,
            use_thumbnail=config.use_thumbnail,
        )
        return torch.stack([transform(part) for part in parts])

    def inputs(texts: list[str], pictures: list[Any]) -> dict[str, Any]:
        pixels = [tiles(picture) for picture in pictures]
        waiting, rows = iter(pixels), []
        for text in texts:
            for _ in range(text.count("<image>")):
                visual = START + CONTEXT * model.num_image_token * len(next(waiting)) + END
                text = text.replace("<image>", visual, 1)
            rows.append(tokenizer(text).input_ids)
        batch: dict[str, Any] = left_padded(rows, tokenizer.pad_token_id)
        return batch | ({"pixel_values": torch.cat(pixels)} if pixels else {})

    def fresh(name: str) -> Any:
        conversation = templates.get_conv_template(name)
        if name == model.template:
            conversation.system_message = model.system_message
        return conversation

    names = list(templates.conv_templates)
    return ConversationProcessor(tokenizer, transform, fresh, names, model.template, inputs)
