"""Conversations about images: LLaVA's JSON files, and ``messages`` or ShareGPT columns of tables."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dyvte.data.columns import is_blank
from dyvte.data.config import SCORING
from dyvte.data.errors import DamageError
from dyvte.data.fingerprints import fingerprint
from dyvte.data.images import read_image
from dyvte.data.loading import JSON_FILES, Table, load_json, load_table
from dyvte.data.samples import IMAGE_MARK, MAX_CHARACTERS, Sample, Source
from dyvte.data.selection import selected, shuffled, unique
from dyvte.data.turns import Conversation

KEYS = {"path", "format", "columns", "images", "turns", "skip", "limit", "fraction", "seed", "max_characters", *SCORING}
TABLE_KEYS = {"name", "split", "revision"}
COLUMNS = {  # where each part of a row is looked for
    "messages": ["conversations", "messages"],
    "image": ["image", "images"],
    "id": ["id"],
    "system": ["system"],
    "kind": [],
}
TURNS = ("first", "single", "all")


class ConversationSamples(Source):
    """Turns of conversations: a sample asks one turn's question, and the turns before are its history.

    ``turns`` are the first of each row, those of rows that have a single one, or all; samples of all turns are called
    after their row and turn, ``id@2``. What there is without an image is left out and counted in ``left_out``.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.origin, path = str(config["path"]), Path(str(config["path"]))
        self.pictures_need_marks = config["format"] == "llava"
        is_json = config["format"] == "llava" or path.suffix in JSON_FILES
        others = set(config) - KEYS - (set() if is_json else TABLE_KEYS)
        if others:
            raise ValueError(f"conversations take no {sorted(others)}: choose from {', '.join(sorted(KEYS))}")
        self.turns = config.get("turns") or "first"
        if self.turns not in TURNS:
            raise ValueError(f"turns must be one of {', '.join(TURNS)}, not {self.turns!r}")
        columns = config.get("columns") or {}
        if not isinstance(columns, Mapping) or not set(columns) <= set(COLUMNS):
            raise ValueError(f"`columns` of conversations may name {', '.join(COLUMNS)}, not {columns!r}")
        self.columns = COLUMNS | {name: [column] for name, column in columns.items()}
        self.folder = Path(str(config.get("images") or (path if path.is_dir() else path.parent)))
        if config.get("images") is not None and not self.folder.is_dir():
            raise ValueError(
                f"there is no folder of images {self.folder}: give the one the rows' file names start from"
            )
        self.fingerprint = fingerprint(config)
        self.max_characters = config.get("max_characters") or MAX_CHARACTERS
        self.rows: Sequence[Any] = (
            load_json(path) if is_json else load_table(config, config.get("name"), config.get("split"))
        )
        self._check_columns(columns.values())
        self._choose(config)

    def read(self, index: int) -> Sample:
        row, turn = self.rows[self._row[index]], self._turn[index]
        talk = Conversation.parse(self._messages(row))
        values, marks = self._images(row), talk.marks()
        if sum(marks) != len(values) and (sum(marks) or self.pictures_need_marks):
            raise DamageError(f"{IMAGE_MARK} stands {sum(marks)} times for {len(values)} images")
        history, question, answer = talk.until(turn)
        shown = sum(marks[: turn + 1]) if sum(marks) else len(values)
        return Sample(
            id=self.ids[index],
            images=[read_image(value, self.folder) for value in values[:shown]],
            question=question,
            answers=[answer],
            choices=[],
            kind=self._kind(row, values),
            history=history,
            system=talk.system or str(self._get(row, "system") or ""),
        )

    def _check_columns(self, names: Iterable[str]) -> None:
        for name in names:
            present = self.rows.column_names if isinstance(self.rows, Table) else _keys(self.rows)
            if name not in present:
                raise ValueError(f"there is no column {name!r}: the rows have {', '.join(present)}")

    def _choose(self, config: Mapping[str, Any]) -> None:
        """Finds the turns to ask about, and lets go of the rows that nobody asks about."""
        left_out: Counter[str] = Counter()
        turns, lengths = {}, {}
        for i, (row, has_images) in enumerate(self._outlines()):
            asked = self._askable(row, has_images, left_out)
            if asked:
                turns[i], lengths[i] = asked, self._length(row)
        self.left_out = dict(+left_out)
        if not turns:
            raise ValueError(
                f"none of the {len(self.rows)} rows of {self.origin} can be used ({self.left_out}): there must be a "
                f"list of messages in {' or '.join(self.columns['messages'])}, images in "
                f"{' or '.join(self.columns['image'])}; `columns` may name others"
            )
        chosen = selected([(i, turn) for i in shuffled(turns, config) for turn in turns[i]], config)
        names = unique(self._names())
        self.ids = [f"{names[i]}@{turn + 1}" if self.turns == "all" else names[i] for i, turn in chosen]
        self.lengths = array("q", (lengths[i] for i, _ in chosen))
        used = sorted({i for i, _ in chosen})
        place = {i: new for new, i in enumerate(used)}
        self._row, self._turn = array("q", (place[i] for i, _ in chosen)), array("q", (turn for _, turn in chosen))
        self.rows = self.rows.select(used) if isinstance(self.rows, Table) else [self.rows[i] for i in used]

    def _length(self, row: Any) -> int:
        """Characters of a row's messages; 0 where reading it will say what is wrong."""
        try:
            return len(str(self._messages(row)))
        except DamageError:
            return 0

    def _askable(self, row: Any, has_images: bool, left_out: Counter[str]) -> list[int]:
        """The turns of a row to ask about: none where it is left out, the first where reading it will say why not."""
        try:
            talk = Conversation.parse(self._messages(row))
        except DamageError:
            lost = isinstance(row, Mapping) and not has_images and "image" not in str(self._get(row, "messages"))
            left_out["no image"] += lost
            return [] if lost else [0]
        marks = talk.marks()
        if not has_images and not sum(marks):
            left_out["no image"] += 1
            return []
        if self.turns == "single" and len(talk.questions) > 1:
            left_out["several turns"] += 1
            return []
        turns = range(len(talk.answers) if self.turns == "all" else 1)
        seen = [turn for turn in turns if sum(marks[: turn + 1]) or not sum(marks)]
        left_out["turns before the first image"] += len(turns) - len(seen)
        return seen

    def _outlines(self) -> Iterator[tuple[Any, bool]]:
        """Every row without its pictures, and whether it has any."""
        if not isinstance(self.rows, Table):
            yield from ((row, bool(self._images(row))) for row in self.rows)
            return
        present = set(self.rows.column_names)
        filled = [self.rows.filled(name) for name in present.intersection(self.columns["image"])]
        rows = self.rows.part(sorted(present.intersection(self.columns["messages"])))
        for i, row in enumerate(rows):
            yield row, any(column[i] for column in filled)

    def _names(self) -> list[str]:
        """The rows' ids, or their numbers."""
        if isinstance(self.rows, Table):
            present = [name for name in self.columns["id"] if name in self.rows.column_names]
            given = self.rows.column(present[0]) if present else [None] * len(self.rows)
        else:
            given = [self._get(row, "id") for row in self.rows]
        return [str(i if is_blank(name) else name) for i, name in enumerate(given)]

    def _get(self, row: Any, name: str) -> Any:
        """The first value there is in the columns of this name."""
        if not isinstance(row, Mapping):
            return None
        return next((row[column] for column in self.columns[name] if row.get(column) is not None), None)

    def _messages(self, row: Any) -> Any:
        if isinstance(row, DamageError):
            raise DamageError(row.reason)
        if not isinstance(row, Mapping):
            raise DamageError(f"a row is a mapping, not {type(row).__name__}")
        return self._get(row, "messages")

    def _images(self, row: Any) -> list[Any]:
        value = self._get(row, "image")
        return [v for v in (value if isinstance(value, list) else [value]) if v not in (None, "")]

    def _kind(self, row: Any, values: list[Any]) -> str:
        """The column that says it, else the part of a mixture that the first image is from: ``coco``, ``vg`` ..."""
        if self.columns["kind"]:
            return str(self._get(row, "kind") or "all")
        parts = PurePosixPath(values[0]).parts if values and isinstance(values[0], str) else ()
        return parts[0] if len(parts) > 1 else "all"


def _keys(rows: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(key for row in rows if isinstance(row, Mapping) for key in row))
