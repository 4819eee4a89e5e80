"""One question about images as every source gives it, and what all sources have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from PIL import Image

from dyvte.data.errors import DamageError, SampleError

IMAGE_MARK = "<image>"  # where a picture stands inside a text
MAX_CHARACTERS = 100_000  # far beyond what visual tokens are a matter of; text is paid for at every exit


@dataclass(frozen=True)
class Sample:
    """One question about any number of images, after earlier turns if there were any.

    Where the user's texts (questions of earlier turns, and the question) hold ``<image>``, each mark is the place of
    the next image; where none of them does, all images come before the first of these texts.

    Attributes:
        id: unique within its source.
        images: RGB, in the order of the prompt.
        question: the prompt's text, template applied.
        answers: accepted answers, or one answer per annotator; with ``choices``, the letter of the right one.
        choices: the options of a multiple-choice question, in the order A, B, C ...; else empty.
        kind: a group to report on, such as the question type.
        history: earlier turns, (question, answer) each.
        system: the system prompt; empty for none.
    """

    id: str
    images: list[Image.Image]
    question: str
    answers: list[str]
    choices: list[str]
    kind: str
    history: list[tuple[str, str]] = field(default_factory=list)
    system: str = ""

    def messages(self) -> list[dict[str, Any]]:
        """The chat up to the answer, which is no part of it, as chat templates of transformers take it.

        Raises:
            ValueError: the number of ``<image>`` is not that of the images.
        """
        asked = [content(text) for text in (*(question for question, _ in self.history), self.question)]
        marks = sum(part["type"] == "image" for parts in asked for part in parts)
        if marks == 0:
            asked[0] = [{"type": "image"} for _ in self.images] + asked[0]
        elif marks != len(self.images):
            raise ValueError(f"sample {self.id!r} has {IMAGE_MARK} {marks} times for {len(self.images)} images")
        chat = [_message("system", [_text(self.system)])] if self.system else []
        for parts, (_, answer) in zip(asked, self.history):
            chat += [_message("user", parts), _message("assistant", [_text(answer)])]
        return [*chat, _message("user", asked[-1])]


def _message(role: str, parts: list[dict[str, str]]) -> dict[str, Any]:
    return {"role": role, "content": parts}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def content(text: str) -> list[dict[str, str]]:
    """A text as parts of a chat message. Pictures at its edges come first, those inside it stay where they are."""
    pieces = text.split(IMAGE_MARK)
    marks = len(pieces) - 1
    if marks and sum(bool(piece.strip()) for piece in pieces) <= 1:
        # LLaVA's data has the picture before or after the text; its models always see it before.
        pieces = [""] * marks + [text.replace(IMAGE_MARK, "").strip()]
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(pieces):
        parts += [{"type": "image"}] * (index > 0)
        parts += [_text(piece)] * bool(piece)
    return parts


class Source(Sequence[Sample]):
    """Samples by index; a slice gives a list. What is wrong with a sample is said when it is read.

    Attributes:
        fingerprint: see :func:`dyvte.data.fingerprints.fingerprint`.
        origin: the file or the data set that the rows are in.
        ids: the samples' ids, known without reading them.
        left_out: why rows were left out, and how many.
        lengths: characters of text of the rows that the samples are from, where they are known without reading them.
        max_characters: the longest text of a sample: system prompt, all turns and the answers.
    """

    fingerprint: str
    origin: str
    ids: Sequence[str]
    left_out: Mapping[str, int] = {}
    lengths: Sequence[int] | None = None
    max_characters: int = MAX_CHARACTERS

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        try:
            sample = self.read(index)
            check(sample, self.max_characters)
        except DamageError as damage:
            raise SampleError(self.ids[index], damage.file or self.origin, damage.reason) from damage
        return sample

    def read(self, index: int) -> Sample:
        """Sample ``index``, 0 ... len - 1.

        Raises:
            DamageError: it cannot be used.
        """
        raise NotImplementedError


def check(sample: Sample, max_characters: int = MAX_CHARACTERS) -> None:
    """Raises ``DamageError`` if no model could be asked this."""
    asked = [*(question for question, _ in sample.history), sample.question]
    told = [sample.system, *(answer for _, answer in sample.history), *sample.answers]
    length = sum(map(len, asked + told))
    if length > max_characters:
        raise DamageError(f"{length:,} characters of text, more than the {max_characters:,} of `max_characters`")
    try:
        "".join(asked + told).encode()
    except UnicodeEncodeError as error:
        raise DamageError(f"text that is no Unicode: half a surrogate pair, {error.object[error.start]!r}") from None
    if not sample.question.replace(IMAGE_MARK, "").strip():
        raise DamageError("the question is empty")
    marks = sum(text.count(IMAGE_MARK) for text in asked)
    if marks not in (0, len(sample.images)):
        raise DamageError(f"{IMAGE_MARK} stands {marks} times for {len(sample.images)} images")
    if any(IMAGE_MARK in text for text in told):
        raise DamageError(f"{IMAGE_MARK} in a text that is not the user's")


def batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Runs of ``batch_size`` samples; the last one may be shorter."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
    for start in range(0, len(samples), batch_size):
        yield [samples[i] for i in range(start, min(start + batch_size, len(samples)))]
