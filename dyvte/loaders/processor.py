"""Prompts of code bases that write them with conversation templates of their own, as ``dyvte.data.encode`` asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature

EXAMPLE = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "question"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "answer"}]},
    {"role": "user", "content": [{"type": "text", "text": "question"}]},
]


class ConversationProcessor:
    """Renders chats with a conversation template, and makes inputs of prompts and images.

    Args:
        tokenizer: of the model.
        image_processor: of the model.
        template: the name of a conversation template -> a fresh conversation, with ``roles``, ``append_message`` and
            ``get_prompt``.
        names: the templates there are.
        chosen: the one of this model; None if that is not known.
        inputs: (prompts, images of all of them in order) -> the model's inputs by name.
        image: what stands for a picture in a prompt.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        template: Callable[[str], Any],
        names: Sequence[str],
        chosen: str | None,
        inputs: Callable[[list[str], list[Any]], Mapping[str, Any]],
        image: str = "<image>",
    ):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.template, self.names, self.chosen, self.inputs, self.image = template, sorted(names), chosen, inputs, image

    @property
    def chat_template(self) -> str:
        """An example of what the template makes: part of what traces remember about a processor."""
        return "none" if self.chosen is None else self.apply_chat_template(EXAMPLE)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = False,
    ) -> str:
        """The prompt of a chat.

        Args:
            messages: as :meth:`dyvte.data.Sample.messages` gives them.
            chat_template: name of a conversation template; the model's own if not given.

        Raises:
            ValueError: there is no such template, or it has no place for a system prompt.
        """
        name = chat_template or self.chosen
        if name not in self.names:
            fault = "the name of the model does not tell its conversation template" if name is None else (
                f"there is no conversation template {name!r}"
            )  # fmt: skip
            raise ValueError(f"{fault}: give one as `template` in the data config: {', '.join(self.names)}")
        conversation = self.template(name)
        for message in messages:
            if message["role"] == "system":
                set_system(conversation, "".join(part["text"] for part in message["content"]))
            else:
                role = conversation.roles[message["role"] == "assistant"]
                conversation.append_message(role, self.text(message["content"]))
        conversation.append_message(conversation.roles[1], None)
        return conversation.get_prompt()

    def text(self, content: Sequence[Mapping[str, str]]) -> str:
        """A message as the code base writes it: pictures that come first have lines of their own."""
        text, begun = "", False
        for part in content:
            begun = begun or part["type"] != "image"
            text += part["text"] if part["type"] != "image" else self.image + ("" if begun else "\n")
        return text

    def __call__(self, images: Any = None, text: Sequence[str] = (), **_: Any) -> BatchFeature:
        """Inputs of a batch, prompts padded on the left.

        Args:
            images: those of each prompt, or of all prompts in order.
            text: prompts, with a mark for every image.

        Raises:
            ValueError: some of the prompts have images and some have none.
        """
        flat = [image for some in images or [] for image in (some if isinstance(some, list) else [some])]
        marks = [prompt.count("<image>") for prompt in text]
        if 0 in marks and any(marks):
            raise ValueError("prompts with and without images do not go into one batch here: use batch_size=1")
        if sum(marks) != len(flat):
            raise ValueError(f"<image> stands {sum(marks)} times in the prompts of a batch with {len(flat)} images")
        return BatchFeature(self.inputs(list(text), flat))


def set_system(conversation: Any, text: str) -> None:
    """Gives a conversation another system prompt.

    Raises:
        ValueError: the template has its own mark-up around it, which is not known.
    """
    if hasattr(conversation, "system_message"):
        conversation.system_message = text
    elif "<|" in conversation.system:
        raise ValueError("this conversation template keeps its system prompt: leave `system` out of the data")
    else:
        conversation.system = text


def left_padded(rows: Sequence[Sequence[int]], pad: int | None) -> dict[str, torch.Tensor]:
    """Ids of prompts of different lengths, and their mask: long [batch, longest]."""
    longest = max(map(len, rows))
    ids = [[pad or 0] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
