"""The untrained MLLM and its processor: CLIP tower, two-layer projector, LLaMA decoder, a tokenizer of whole words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from dyvte.data import scenes

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
PAD, BOS, EOS = 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_processor(patch: int) -> LlavaProcessor:
    """Word-level tokenizer and image processor; scenes are drawn at the tower's size, so nothing is resized."""
    words = SPECIAL + ["USER:", "ASSISTANT:"] + scenes.vocabulary()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("?", " ?"), normalizers.Replace(".", " .")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": scenes.CANVAS}, crop_size={"height": scenes.CANVAS, "width": scenes.CANVAS}
    )
    return LlavaProcessor(
        image_processor,
        fast,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(settings: Mapping[str, Any], vocab_size: int) -> LlavaForConditionalGeneration:
    """The model with random weights; ``settings`` holds its vision_config and text_config."""
    vision = CLIPVisionConfig(image_size=scenes.CANVAS, **settings["vision_config"])
    text = LlamaConfig(
        vocab_size=vocab_size, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, **settings["text_config"]
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=(scenes.CANVAS // vision.patch_size) ** 2,
        vision_feature_layer=-1,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config._attn_implementation = "eager"  # the fastest for short sequences under autocast on CPU
    return LlavaForConditionalGeneration(config)


def normalise(images: torch.Tensor, processor: LlavaProcessor) -> torch.Tensor:
    """uint8 [n, H, W, 3] -> pixel values [n, 3, H, W], as the image processor makes them."""
    image = processor.image_processor
    mean, std = torch.tensor(image.image_mean), torch.tensor(image.image_std)
    return ((images.float() * image.rescale_factor - mean) / std).permute(0, 3, 1, 2)
