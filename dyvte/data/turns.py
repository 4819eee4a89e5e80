"""The turns of a conversation, from either of the two layouts that data sets use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from dyvte.data.columns import is_blank
from dyvte.data.errors import DamageError
from dyvte.data.samples import IMAGE_MARK, content

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Conversation:
    """What was said, in order.

    Attributes:
        system: the system prompt; empty for none.
        questions: what the user said, ``<image>`` where a picture stands.
        answers: what the assistant said to each; the last question may have none.
    """

    system: str
    questions: list[str]
    answers: list[str]

    @classmethod
    def parse(cls, messages: Any) -> Conversation:
        """A conversation from its messages, ``{from, value}`` or ``{role, content}`` each.

        Raises:
            DamageError: it does not go from question to answer, after a system prompt or none.
        """
        if not isinstance(messages, list) or not messages:
            raise DamageError("the row has no conversation")
        said = [_message(message) for message in messages]
        system = said.pop(0)[1] if said[0][0] == "system" else ""
        for (role, _), expected in zip_longest(said, ["user", "assistant"] * (len(said) // 2), fillvalue="user"):
            if role != expected:
                raise DamageError(f"questions and answers do not alternate: {', '.join(role for role, _ in said)}")
        if len(said) < 2:
            raise DamageError("no question is answered")
        return cls(system, [text for _, text in said[::2]], [text for _, text in said[1::2]])

    def marks(self) -> list[int]:
        """How many pictures stand in each question."""
        return [question.count(IMAGE_MARK) for question in self.questions]

    def until(self, turn: int) -> tuple[list[tuple[str, str]], str, str]:
        """The turns before one, its question and its answer.

        Pictures at the beginning, where they are by default, lose their ``<image>``.

        Raises:
            DamageError: one of these texts is empty.
        """
        questions, answers = self.questions[: turn + 1], self.answers[: turn + 1]
        for number, (question, answer) in enumerate(zip(questions, answers), start=1):
            if is_blank(question.replace(IMAGE_MARK, "")):
                raise DamageError(f"the question of turn {number} is empty")
            if is_blank(answer):
                raise DamageError(f"the answer of turn {number} is empty")
        marks, parts = self.marks()[: turn + 1], content(questions[0])
        if marks[0] == sum(marks) == len(parts) - 1:  # all pictures, then one text
            questions[0] = parts[-1]["text"]
        return list(zip(questions[:-1], answers[:-1])), questions[-1], answers[-1]


def _message(message: Any) -> tuple[str, str]:
    """Role and text of a message; a picture among the parts of its content becomes ``<image>``."""
    if not isinstance(message, Mapping):
        raise DamageError(f"a message is a mapping, not {type(message).__name__}")
    name, text = ("from", "value") if "from" in message else ("role", "content")
    role = ROLES.get(str(message.get(name)).lower())
    if role is None:
        raise DamageError(f"a message by {message.get(name)!r}: known are {', '.join(ROLES)}")
    value = message.get(text)
    if isinstance(value, list):
        value = "".join(map(_part, value))
    if not isinstance(value, str | None):
        raise DamageError(f"the text of a message is {type(value).__name__}")
    return role, value or ""


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("text", "image"):
        raise DamageError(f"a part of a message is text or image, not {kind!r}")
    return IMAGE_MARK if kind == "image" else str(part.get("text") or "")
