"""LLaVA, of https://github.com/haotian-liu/LLaVA: ``loader: dyvte.loaders.llava:load``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from dyvte.config import ModelConfig
from dyvte.loaders.packages import device_of, finish, import_package, refuse, take_new_arguments
from dyvte.loaders.processor import ConversationProcessor, left_padded
from dyvte.runtime.splice import SplicedVisualMask

REPOSITORY = "https://github.com/haotian-liu/LLaVA"
# What the name of a model says about its conversation template, the first that fits.
TEMPLATES = (
    ("llama-2", "llava_llama_2"),
    ("mistral", "mistral_instruct"),
    ("v1.6-34b", "chatml_direct"),
    ("v1", "llava_v1"),
    ("mpt", "mpt"),
)
Loaded = tuple[nn.Module, ConversationProcessor, SplicedVisualMask, None]


def load(config: ModelConfig) -> Loaded:
    """A LLaVA with its own builder, prompts and images.

    Raises:
        ValueError: the package is not installed, is VILA's of the same name, or cannot do what the config asks for.
    """
    return load_style(config, "llava", REPOSITORY, TEMPLATES)


def load_style(config: ModelConfig, package: str, repository: str, templates: Sequence[tuple[str, str]]) -> Loaded:
    """A model of LLaVA's code base or of one that has kept its builder.

    Args:
        package: name of the code base, which its builder looks for in the names of models, too.
        repository: where it comes from.
        templates: parts of names, and the conversation templates of such models.
    """
    refuse(config, "revision", remedy="its builder has no such setting; download the model, and name the folder")
    build = import_package(f"{package}.model.builder", repository).load_pretrained_model
    if "model_base" != list(inspect.signature(build).parameters)[1]:
        raise ValueError(
            f"the package {package} that is installed is VILA's, of the same name, not that of {repository}"
        )
    tools, conversation = (import_package(f"{package}.{name}", repository) for name in ("mm_utils", "conversation"))
    name = tools.get_model_name_from_path(config.model)
    if package not in name.lower():
        name = f"{package}-{name}"  # else the builder takes it for a language model
    chosen: dict[str, Any] = {}
    if config.attention == "flash_attention_2":
        chosen["use_flash_attn"] = True
    elif config.attention:
        chosen["attn_implementation"] = config.attention
    device = device_of(config)
    tokenizer, model, image_processor, _ = build(config.model, None, name, device_map=device, device=device, **chosen)
    finish(model, config)
    take_new_arguments(model)
    pad_left(model.config)
    template = next((template for part, template in templates if part in name.lower()), None)
    processor = sentinel_processor(tokenizer, image_processor, model.config, tools, conversation, template)
    return model, processor, SplicedVisualMask(model), None


def pad_left(config: Any) -> None:
    """Batches are generated from their last column; and a prompt that is cut off would lose its answer unnoticed."""
    config.tokenizer_padding_side = "left"
    config.tokenizer_model_max_length = None


def sentinel_processor(
    tokenizer: Any,
    image_processor: Any,
    config: Any,
    tools: Any,
    conversation: Any,
    template: str | None,
    sizes: bool = True,
) -> ConversationProcessor:
    """The processor of models that take one -200 per image in ``input_ids``, and ``images``.

    Args:
        config: of the model.
        tools: the module mm_utils of the code base.
        conversation: its module of that name.
        template: name of the model's conversation template.
        sizes: whether the model takes ``image_sizes``.
    """

    def inputs(texts: list[str], images: list[Any]) -> dict[str, Any]:
        rows = [tools.tokenizer_image_token(text, tokenizer) for text in texts]
        batch: dict[str, Any] = left_padded(rows, tokenizer.pad_token_id)
        if images:
            batch["images"] = tools.process_images(images, image_processor, config)
            batch |= {"image_sizes": [image.size for image in images]} if sizes else {}
        return batch

    marked = getattr(config, "mm_use_im_start_end", False)
    return ConversationProcessor(
        tokenizer,
        image_processor,
        lambda name: conversation.conv_templates[name].copy(),
        list(conversation.conv_templates),
        template,
        inputs,
        image="<im_start><image><im_end>" if marked else "<image>",
    )
