"""Rows of a table, a question each, their columns mapped as a config says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from dyvte.data.columns import (
    EMPTY,
    as_names,
    as_text,
    check_columns,
    check_template,
    head,
    is_blank,
    is_conversation,
    overlap,
    template_fields,
    value_at,
)
from dyvte.data.errors import DamageError
from dyvte.data.fingerprints import fingerprint
from dyvte.data.images import read_image
from dyvte.data.loading import Table, load_table
from dyvte.data.samples import MAX_CHARACTERS, Sample, Source
from dyvte.data.selection import selected, shuffled, unique

IMAGE_KEYS = {"name", "split", "key", "image", "reference"}


class TableSamples(Source):
    """Rows of a ``datasets`` table (see :mod:`dyvte.data.columns` for how columns are named)."""

    def __init__(self, config: Mapping[str, Any]):
        columns = config.get("columns")
        if not isinstance(columns, Mapping) or "question" not in columns:
            raise ValueError(
                "`columns` must say which column is the question: a mapping of image, question, answers, choices, id, "
                f"kind to columns, not {columns!r}"
            )
        if config.get("turns") is not None:
            raise ValueError("`turns` are those of conversations: set format to llava or messages")
        self.fingerprint = fingerprint(config)
        self.origin = str(config["path"])
        self.max_characters = config.get("max_characters") or MAX_CHARACTERS
        self.columns = {name: column for name, column in columns.items() if column is not None}
        self.folder = Path(self.origin).parent if Path(self.origin).is_file() else Path(self.origin)
        self.table = load_table(config, config.get("name"), config.get("split"))
        for column in self.columns.values():
            check_columns(self.table.column_names, column)
        self.prompt = config.get("prompt") or "{question}"
        self.optional = dict(config.get("optional") or {})
        self._check_templates()
        if len(self.table):
            self._refuse_conversations(self.table[0])
        ids = self._ids()
        rows = selected(shuffled(self._allowed(config), config), config)
        self.table, self.ids = self.table.select(rows), [ids[i] for i in rows]
        self._join_images(config)

    def read(self, index: int) -> Sample:
        row = self.table[index]
        self._refuse_conversations(row)
        choices = self._choices(row)
        fields = {
            name: as_text(value_at(row, column))
            for name, column in self.columns.items()
            if name not in ("image", "choices")
        }
        fields["choices"] = "\n".join(f"{chr(65 + i)}. {choice}" for i, choice in enumerate(choices) if choice)
        for name, text in self.optional.items():
            fields[name] = text.format_map(fields) if fields[name] else ""
        return Sample(
            id=self.ids[index],
            images=self._images(row),
            question=self.prompt.format_map(fields),
            answers=self._answers(row, choices),
            choices=choices,
            kind=fields.get("kind") or "all",
        )

    def _check_templates(self) -> None:
        check_template(self.prompt, {*self.columns, "question", "choices"})
        for name, text in self.optional.items():
            if name not in self.columns:
                raise ValueError(f"`optional` has {name!r}, which no column fills: add it to `columns`")
            check_template(text, set(self.columns))
        for field in template_fields("".join([self.prompt, *self.optional.values()])):
            told = overlap(self.columns.get(field), self.columns.get("answers"))
            if told:
                raise ValueError(f"the prompt would tell the answer: {{{field}}} is column {', '.join(told)}")

    def _refuse_conversations(self, row: Mapping[str, Any]) -> None:
        for name, column in self.columns.items():
            if name not in ("image", "id") and any(is_conversation(row.get(head(part))) for part in as_names(column)):
                raise ValueError(
                    f"column {column} holds conversations, whose answers would be part of the question: "
                    "set format to llava or messages"
                )

    def _allowed(self, config: Mapping[str, Any]) -> list[int]:
        """The rows that ``where`` lets pass."""
        rows = list(range(len(self.table)))
        for column, allowed in (config.get("where") or {}).items():
            if column not in self.table.column_names:
                raise ValueError(f"no column {column!r} to choose by: there are {', '.join(self.table.column_names)}")
            allowed = allowed if isinstance(allowed, list) else [allowed]
            values = self.table.column(column)
            rows = [i for i in rows if values[i] in allowed]
            if not rows:
                present = sorted({str(value) for value in values})[:20]
                raise ValueError(f"no row has {column} in {allowed}: the column holds {', '.join(present)}")
        return rows

    def _ids(self) -> list[str]:
        """The id column, numbered where it repeats, else the row numbers."""
        names = as_names(self.columns.get("id"))
        if not names:
            return [str(i) for i in range(len(self.table))]
        parts = self.table.part(sorted({head(name) for name in names}))
        return unique("/".join(as_text(value_at(row, name)) for name in names) for row in parts)

    def _join_images(self, config: Mapping[str, Any]) -> None:
        self.shared: tuple[Table, dict[Any, int], str, str] | None = None
        settings = config.get("images")
        if settings is None:
            return
        if not isinstance(settings, Mapping) or not {"key", "image", "reference"} <= set(settings) <= IMAGE_KEYS:
            raise ValueError(f"`images` must be a mapping with {', '.join(sorted(IMAGE_KEYS))}, not {settings!r}")
        table = load_table(config, settings.get("name"), settings.get("split", config.get("split")))
        check_columns(table.column_names, [settings["key"], settings["image"]])
        check_columns(self.table.column_names, settings["reference"])
        place = {key: i for i, key in enumerate(table.column(settings["key"]))}
        references = self.table.column(settings["reference"])
        if not any(reference in place for reference in references):
            raise ValueError(
                f"column {settings['key']} holds none of the images that column {settings['reference']} names, such as "
                f"{references[0]!r}"
            )
        self.shared = (table, place, settings["image"], settings["reference"])

    def _images(self, row: Mapping[str, Any]) -> list[Image.Image]:
        value = value_at(row, self.columns.get("image"))
        if self.shared is not None:
            table, place, image, reference = self.shared
            if row[reference] not in place:
                raise DamageError(f"image {row[reference]!r} is missing")
            value = value_at(table[place[row[reference]]], image)
        values = value if isinstance(value, list) else [value]
        images = [read_image(v, self.folder) for v in values if v is not None]
        if not images and (self.shared is not None or "image" in self.columns):
            raise DamageError("the row has no image")
        return images

    def _choices(self, row: Mapping[str, Any]) -> list[str]:
        value = value_at(row, self.columns.get("choices"))
        choices = ["" if v in EMPTY else str(v) for v in value or []]
        while choices and not choices[-1]:
            choices.pop()
        return choices

    def _answers(self, row: Mapping[str, Any], choices: list[str]) -> list[str]:
        value = value_at(row, self.columns.get("answers"))
        values = value if isinstance(value, list) else [value]
        if any(isinstance(v, Mapping) for v in values):
            column, field = self.columns["answers"], next(iter(values[0]))
            raise ValueError(f"column {column} holds dictionaries: name one of their fields, as in {column}.{field}")
        if "answers" in self.columns and all(map(is_blank, values)):
            raise DamageError("the answer is empty")
        if choices:
            values = [chr(65 + v) if isinstance(v, int) else v for v in values]
        return [str(v) for v in values if v is not None]
