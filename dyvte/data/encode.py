"""Samples as inputs of a model: the chat through its template, and all through its processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import BatchFeature

from dyvte.data.samples import Sample

# For generate(): the most likely token, whatever the model's own generation config would do to it.
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


def encode(processor: Any, samples: Sequence[Sample], template: str | None = None) -> BatchFeature:
    """The prompts of a batch as a model takes them: left-padded ids, their mask, the pixels of all images.

    A prompt is the chat up to the answer: system prompt, earlier turns, question.

    Args:
        processor: an ``AutoProcessor`` of a multimodal model.
        samples: the batch; where images stand is said in :class:`Sample`.
        template: a Jinja chat template, where the processor has none.

    Raises:
        ValueError: no sample, no chat template, or one that does not take the chat or leaves some of it out.
    """
    if len(samples) == 0:
        raise ValueError("there is nothing to encode: give at least one sample")
    if template is None and getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"{type(processor).__name__} has no chat template, so it does not say what a prompt looks like: "
            "give one as `template` in the data config (a Jinja template over `messages`)"
        )
    texts = [_prompt_text(processor, sample, template) for sample in samples]
    images: Any = [sample.images for sample in samples]
    if not all(images):  # a nested list with empty entries is not understood everywhere; a flat one is
        images = [image for some in images for image in some] or None
    bos = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    return processor(
        images=images,
        text=texts,
        padding=True,
        padding_side="left",
        # A template that writes the first token itself must not get a second one.
        add_special_tokens=not (bos and texts[0].startswith(bos)),
        return_tensors="pt",
    )


def _prompt_text(processor: Any, sample: Sample, template: str | None) -> str:
    messages = sample.messages()
    chosen = {} if template is None else {"chat_template": template}
    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **chosen)
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"the chat template does not take sample {sample.id!r}: {error}. Give one as `template` in the data "
            "config that goes through all `messages` and the parts of their `content`"
        ) from error
    for message in messages:
        for part in message["content"]:
            # Not the answers of earlier turns: some templates take a model's reasoning out of them.
            if message["role"] != "assistant" and part.get("text", "").strip() not in text:
                raise ValueError(
                    f"the chat template leaves the {message['role']}'s {part['text']!r} of sample {sample.id!r} out: "
                    "give one as `template` in the data config that goes through all `messages`"
                )
    return text
